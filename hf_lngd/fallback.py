"""AdamW for the parameters that no layer owns, inside the same optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from .curvature.pooling import Pool
from .curvature.rounding import Rounding
from .sharding import local

# What of a parameter's moments has its shape, and is sharded as it is.
ROW_WISE = ("exp_avg", "exp_avg_sq")


class Fallback:
    """Moments of AdamW by parameter, in its dtype but at least float32 and sharded as it is, and its step.

    torch's own AdamW function does the arithmetic, fused where the parameters allow it.

    Args:
        betas: decay of the two moments.
        eps: added to the root of the second.
        rounding: of bfloat16 parameters.
    """

    def __init__(self, betas: tuple[float, float], eps: float, rounding: Rounding) -> None:
        self.betas, self.eps, self.rounding = betas, eps, rounding
        self.moments: dict[nn.Parameter, dict[str, Tensor]] = {}
        self.skipped: Tensor | int = 0  # steps of a group that were passed over
        self.pool: Pool | None = None  # the processes that have the other rows of sharded parameters

    def moments_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The moments of a parameter, made at its first step; they follow it to another device or dtype."""
        moments = self.moments.get(parameter)
        if moments is None:
            moments = self.moments[parameter] = self.new_moments(parameter)
        average, dtype = moments["exp_avg"], torch.promote_types(parameter.dtype, torch.float32)
        if average.dtype != dtype or average.device != parameter.device:
            moments = {key: value.to(parameter.device) for key, value in moments.items()}
            moments |= {key: moments[key].to(dtype) for key in ("exp_avg", "exp_avg_sq")}
            self.moments[parameter] = moments
        return moments

    @staticmethod
    def new_moments(parameter: nn.Parameter) -> dict[str, Tensor]:
        """The moments of a parameter before its first step; of what this rank holds, where it is sharded."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        zeros = torch.zeros_like(local(parameter.detach()), dtype=dtype, memory_format=torch.preserve_format)
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    @torch.no_grad()
    def step(self, group: dict[str, Any]) -> None:
        """One step of a parameter group with its ``lr`` and ``weight_decay``; parameters without gradient rest.

        So does the whole group where the norm of a gradient is no number or overflows: AdamW would never recover.
        """
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        moments = [self.moments_of(p) for p in parameters]
        gradients = [local(p.grad) for p in parameters]
        bad = _any_unusable(gradients, self.pool)
        self.skipped = self.skipped + bad
        with self.rounding.full(parameters) as whole:
            fused = all(w.is_floating_point() and w.device.type in ("cpu", "cuda") for w in whole)
            gradients = [g.to(w.dtype) for g, w in zip(gradients, whole, strict=True)]
            if not fused:  # which does not know `found_inf`: a gradient of zero comes closest
                gradients = [torch.where(bad > 0, torch.zeros_like(g), g) for g in gradients]
            adamw(
                whole,
                gradients,
                [m["exp_avg"] for m in moments],
                [m["exp_avg_sq"] for m in moments],
                [],
                [m["step"] for m in moments],
                foreach=None if fused else True,
                fused=True if fused else None,
                found_inf=bad.float() if fused else None,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=self.eps,
                maximize=False,
            )


def _any_unusable(gradients: list[Tensor], pool: Pool | None) -> Tensor:
    """1 if the norm of any gradient is not finite, else 0; on the device of the first. `pool` has the other rows."""
    dtype = torch.float32
    for gradient in gradients:
        dtype = torch.promote_types(dtype, gradient.dtype)  # in half precision norms would overflow
    norms = torch._foreach_norm(gradients, 2, dtype)
    squares = torch.stack([norm.to(norms[0].device) for norm in norms]).square()
    if pool is not None and pool.size > 1:
        (squares,) = pool.sum([squares])
    return (~torch.isfinite(squares)).any().long()
