"""AdamW in the eigenbasis of a table's gradients: for embeddings, whose other side is too long for a factor.

A tied table is also the head, a linear layer. Its curvature on the side of the features is that of the head's inputs,
d × d; rotated into its eigenvectors, Adam's diagonal stands for the rest (one side of SOAP, Vyas et al. 2024; the
eigenbasis is that of the gradient's Gram matrix, looked at in factor steps only).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import LNGDConfig
from ..sharding import local
from .dropped import Gradients
from .inverses import pack, packed_shape, unpack
from .pooling import Pool, usable
from .precision import product_dtype
from .rounding import Rounding


class RotatedTable:
    """One table [V, d] under AdamW with both moments kept in coordinates Q: G → G Q, update → D Qᵀ.

    Args:
        name: the parameter's name.
        modules: the embeddings that share the table.
        config: the optimizer's.
        rounding: of a bfloat16 table.

    Attributes:
        row_wise: what of the state has the table's rows, and is sharded as they are.
    """

    row_wise = ("mean", "square")

    def __init__(self, name: str, modules: list[nn.Embedding], config: LNGDConfig, rounding: Rounding) -> None:
        self.name, self.module, self.config, self.rounding = name, modules[0], config, rounding
        self.doubtful, self.gradients = False, Gradients(tuple)  # of no use without hooks
        self.skipped: Tensor | int = 0  # gradients that were not finite
        self.tensors: dict[str, Tensor] = {}
        self.sharded: nn.Parameter | None = None
        self.pool: Pool | None = None

    @property
    def table(self) -> Tensor:
        """The table: under FSDP2 the sharded one."""
        return self.module.weight if self.sharded is None else self.sharded

    def shard(self, weight: nn.Parameter, pool: Pool) -> None:
        """From now on this process has rows of the table alone, the pool's other processes the rest."""
        self.sharded, self.pool, self.tensors = weight, pool, {}

    def close(self) -> None:
        """Nothing to remove: no hooks."""

    def watch(self, enabled: bool) -> None:
        """Nothing to look at."""

    def new_state(self) -> dict[str, Tensor]:
        """The state before the first step."""
        weight = local(self.table.detach())
        like = weight.to(torch.promote_types(weight.dtype, torch.float32))
        d = like.shape[-1]
        return {
            "step": like.new_zeros((), dtype=torch.float32),
            "mean": torch.zeros_like(like),
            "square": torch.zeros_like(like),
            "gram": like.new_zeros(packed_shape(d)),
            "basis": torch.eye(d, dtype=like.dtype, device=like.device),
        }

    def _start(self) -> dict[str, Tensor]:
        if not self.tensors:
            self.tensors = self.new_state()
        return self.tensors

    def _turn(self, grad: Tensor) -> None:
        """A new basis, with the moments turned into it: the square as a diagonal second moment turns.

        SOAP keeps the square. A table's rows are seen rarely: the square of a row that was seen once is near zero along
        some old axes, and a mean that is turned onto them would make a step of many learning rates.
        """
        s, d = self.tensors, grad.shape[-1]
        fresh = grad.mT @ grad
        if self.pool is not None and self.pool.size > 1:
            (fresh,) = self.pool.sum([fresh])
        size = fresh.diagonal().sum()
        decay = (s["step"] > 0).to(grad.dtype) * self.config.ema_decay
        ok = torch.isfinite(size) & (size > 0)
        fresh = fresh / torch.where(ok, size, torch.ones_like(size))
        gram = torch.where(ok, unpack(s["gram"], d).lerp(fresh, 1 - decay), unpack(s["gram"], d))
        # row by row, as a loaded basis is: a product's last bit depends on the layout
        try:
            basis = torch.linalg.eigh(gram).eigenvectors.contiguous()
        except torch.linalg.LinAlgError:  # no convergence: the last basis will do until the next turn
            return
        turn = s["basis"].mT @ basis
        s["mean"], s["square"] = s["mean"] @ turn, s["square"] @ turn.square()
        s["gram"], s["basis"] = pack(gram), basis

    @torch.no_grad()
    def step(self, group: dict[str, Any], turn: bool) -> None:
        """One step with the group's ``lr`` and ``weight_decay``, or none without a gradient; `turn`: a new basis."""
        if self.table.grad is None:
            return
        s, c = self._start(), self.config
        grad, bad = usable(local(self.table.grad).to(s["mean"].dtype, copy=True), self.pool)
        self.skipped = self.skipped + bad
        if turn:
            self._turn(grad)
        low = product_dtype(c, grad.dtype, grad.device)
        basis = s["basis"].to(low)
        rotated = (grad.to(low) @ basis).to(grad.dtype)
        s["step"] += 1
        beta1, beta2 = c.betas
        s["mean"].lerp_(rotated, 1 - beta1)
        s["square"].mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        root = (s["square"] / (1 - beta2 ** s["step"])).sqrt_().add_(c.eps)
        direction = s["mean"].div(root).to(low) @ basis.mT
        lr = group["lr"]
        with self.rounding.full([self.table]) as (whole,):
            whole.mul_(1 - lr * group["weight_decay"])
            whole.sub_(direction.to(grad.dtype) * (lr / (1 - beta1 ** s["step"])))

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint; empty before the first step."""
        return dict(self.tensors)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        self.tensors = {}
        if state:
            own = self._start()
            for key in own:
                own[key].copy_(state[key])
