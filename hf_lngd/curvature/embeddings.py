"""LNGD for embeddings: linear layers with one-hot inputs, whose Φ is diagonal, the frequency of each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import LNGDConfig
from ..sharding import local
from .compiled import run_eagerly
from .context import Hook, in_backward
from .dropped import Gradients
from .factors import damping, rms_rate
from .pooling import Pool, usable
from .rounding import Rounding

# A row's step is at most this multiple of the table's root mean square: a token seen once in many batches has next
# to no frequency, and would divide its gradient by the damping alone.
ROW_CAP = 4.0


def embedding_direction(
    grad: Tensor, frequency: Tensor, lam: Tensor, scale: float, rows: Pool | None = None, size: int = 0
) -> Tensor:
    """D = (diag(f) + λ)⁻¹ G scaled to RMS κ, each row's RMS at most `ROW_CAP`·κ: grad [V, d], frequency [V].

    Args:
        rows: processes that have a table's other rows; V is the number of this one's then.
        size: numbers in the whole table.
    """
    direction = grad / (frequency + lam).unsqueeze(-1)
    if rows is None:
        rate = rms_rate(direction, scale)
    else:
        (square,) = rows.sum([direction.square().sum()])
        rate = rms_rate(square.sqrt().view(1, 1) / size**0.5, scale)
    direction = direction * rate
    row_rms = direction.square().mean(-1, keepdim=True).sqrt()
    most = ROW_CAP * scale
    return direction * (most / row_rms.clamp_min(most))


class EmbeddingLayer:
    """One embedding table under LNGD: token counts of each step, their running mean, momentum.

    Args:
        name: the parameter's name.
        modules: the embeddings that share the table; `padding_idx` is not counted.
        config: the optimizer's.
        pool: the processes that train the model.
        rounding: of a bfloat16 table.

    Attributes:
        row_wise: what of the state is sharded as the table's rows are.
    """

    row_wise = ("momentum",)

    def __init__(
        self, name: str, modules: list[nn.Embedding], config: LNGDConfig, pool: Pool, rounding: Rounding
    ) -> None:
        self.name, self.module, self.config, self.pool, self.rounding = name, modules[0], config, pool, rounding
        self.momentum: Tensor | None = None
        self.frequency: Tensor | None = None
        self.weight: Tensor | None = None
        self._counts: Tensor | None = None
        self.enabled = True
        self.doubtful = False  # see `scaler`
        self.gradients = Gradients(lambda: (self.table,))
        self.skipped: Tensor | int = 0  # gradients that were not finite
        self.sharded: nn.Parameter | None = None
        self.rows: Pool | None = None
        self.where = slice(None)
        self._handles = [module.register_forward_hook(Hook(self._count)) for module in modules]
        run_eagerly(self, True)

    @property
    def table(self) -> Tensor:
        """The table: under FSDP2 the sharded one."""
        return self.module.weight if self.sharded is None else self.sharded

    def shard(self, weight: nn.Parameter, pool: Pool, where: slice) -> None:
        """From now on this process has these rows of the table alone, the pool's other processes the rest."""
        self.sharded, self.rows, self.where = weight, pool if pool.size > 1 else None, where
        self.momentum = None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        run_eagerly(self, False)

    def watch(self, enabled: bool) -> None:
        """Count, or look away."""
        self.enabled = enabled
        run_eagerly(self, enabled and bool(self._handles))

    def _count(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not self.enabled or not torch.is_grad_enabled() or in_backward() or not args:
            return
        ids = args[0].reshape(-1)
        if self._counts is None or self.doubtful or self.gradients.gone:
            self.doubtful = False
            self.gradients.reset()
            self._counts = torch.zeros(self.module.num_embeddings, device=ids.device)
        self.gradients.follow(output, self.module.weight)
        self._counts.index_add_(0, ids, torch.ones_like(ids, dtype=self._counts.dtype))

    def new_state(self) -> dict[str, Tensor]:
        """The state before the first step."""
        like = local(self.table.detach())
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        momentum, count = torch.zeros_like(like), self.module.num_embeddings
        return {"momentum": momentum, "frequency": like.new_zeros(count), "weight": like.new_zeros(())}

    def _start(self) -> None:
        if self.momentum is None:
            state = self.new_state()
            self.momentum, self.frequency, self.weight = state["momentum"], state["frequency"], state["weight"]

    def _average(self) -> Tensor:
        assert self.frequency is not None and self.weight is not None
        counts, self._counts = self._counts, None
        many = self.pool.size > 1
        if many:  # whether or not this rank has looked anything up
            none = torch.zeros_like(self.frequency, dtype=torch.float32)
            (counts,) = self.pool.sum([none if counts is None else counts])
        if counts is not None:
            seen = (counts.sum() > 0).to(self.frequency.dtype) if many else 1.0
            if self.module.padding_idx is not None:
                counts[self.module.padding_idx] = 0
            fresh = (1 - self.config.ema_decay) * seen
            self.frequency.mul_(1 - fresh).add_((counts / counts.sum().clamp_min(1)).to(self.frequency) * fresh)
            self.weight.mul_(1 - fresh).add_(fresh)
        uniform = torch.full_like(self.frequency, 1.0 / self.frequency.shape[0])
        return torch.where(self.weight > 0, self.frequency / self.weight.clamp_min(1e-30), uniform)

    @torch.no_grad()
    def step(self, group: dict[str, Any], turn: bool = False) -> None:
        """One step with the group's ``lr`` and ``weight_decay``, or none without a gradient."""
        if self.table.grad is None:
            self._counts = None
            return
        self._start()
        assert self.momentum is not None
        c = self.config
        frequency = self._average()
        lam = damping(frequency.mean(), c.damping, c.damping_rho, c.damping_min, c.damping_max)
        grad, bad = usable(local(self.table.grad).to(self.momentum.dtype, copy=True), self.rows)
        self.skipped = self.skipped + bad
        if c.momentum_on == "gradient":
            self.momentum.lerp_(grad, 1 - c.momentum)
            grad = grad.lerp(self.momentum, c.momentum) if c.nesterov else self.momentum
        rows, size = self.rows, self.table.numel()
        update = embedding_direction(grad, frequency[self.where], lam, c.rate_scale, rows, size) * group["lr"]
        if c.momentum_on == "update":
            self.momentum.mul_(c.momentum).add_(update)
            update = update.add(self.momentum, alpha=c.momentum) if c.nesterov else self.momentum
        with self.rounding.full([self.table]) as (whole,):
            whole.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update)

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint; empty before the first step."""
        if self.momentum is None or self.frequency is None or self.weight is None:
            return {}
        return {"momentum": self.momentum, "frequency": self.frequency, "weight": self.weight}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        self.momentum = self.frequency = self.weight = self._counts = None
        if state:
            self._start()
            assert self.momentum is not None and self.frequency is not None and self.weight is not None
            self.momentum.copy_(state["momentum"])
            self.frequency.copy_(state["frequency"])
            self.weight.copy_(state["weight"])
