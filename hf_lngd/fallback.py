"""AdamW for the parameters that no layer owns, inside the same optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from .sharding import local

# What of a parameter's moments has its shape, and is sharded as it is.
ROW_WISE = ("exp_avg", "exp_avg_sq")


class Fallback:
    """Moments of AdamW by parameter, in its dtype and sharded as it is, and its step.

    torch's own AdamW function does the arithmetic, fused where the parameters allow it.

    Args:
        betas: decay of the two moments.
        eps: added to the root of the second.
    """

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self.betas, self.eps = betas, eps
        self.moments: dict[nn.Parameter, dict[str, Tensor]] = {}

    def moments_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The moments of a parameter, made at its first step."""
        if parameter not in self.moments:
            self.moments[parameter] = self.new_moments(parameter)
        return self.moments[parameter]

    @staticmethod
    def new_moments(parameter: nn.Parameter) -> dict[str, Tensor]:
        """The moments of a parameter before its first step; of what this rank holds, where it is sharded."""
        zeros = torch.zeros_like(local(parameter.detach()), memory_format=torch.preserve_format)
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    @torch.no_grad()
    def step(self, group: dict[str, Any]) -> None:
        """One step of a parameter group with its ``lr`` and ``weight_decay``; parameters without gradient rest."""
        held = [p for p in group["params"] if p.grad is not None]
        if not held:
            return
        moments = [self.moments_of(p) for p in held]
        parameters, grads = [local(p) for p in held], [local(p.grad) for p in held]
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        adamw(
            parameters,
            grads,
            [m["exp_avg"] for m in moments],
            [m["exp_avg_sq"] for m in moments],
            [],
            [m["step"] for m in moments],
            foreach=None if fused else True,
            fused=True if fused else None,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.eps,
            maximize=False,
        )
