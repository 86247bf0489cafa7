"""Running factors of many groups at once, and what is derived from them: whiteners and inverses, batched by shape. Each
unit of each group (a matrix of a grouped convolution; else there is one) is a row of a bank. Symmetric matrices are
kept packed, in half the memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import linalg
from .config import LNGDConfig
from .layers import Layer, factor_blocks


@dataclass(frozen=True)
class FactorSpec:
    """The factor of a group: the first of the layers that share it, what follows that, and `scale`, by which what is
    kept has to be multiplied to be the paper's Φ: m where φ' = 1 and E[a aᵀ] is kept, else 1."""

    layer: Layer
    follows: tuple[str, ...]
    scale: float

    @property
    def name(self) -> str:
        """Of the group."""
        return self.layer.name


class Bank:
    """Factors of several groups `specs` in one batch; `like`: a tensor with the device and dtype of the state.

    Attributes:
        rows: group → its rows.
        weight: [rows], of the averages, see `linalg.running_average`.
        damping, condition: [rows], λ and the condition estimate of what was inverted last.
        failures, skipped: inverses that failed, factors that were not finite; counts."""

    def __init__(self, specs: Sequence[FactorSpec], config: LNGDConfig, like: Tensor) -> None:
        self.specs, self.config = list(specs), config
        starts = [0, *accumulate(spec.layer.units for spec in specs)]
        self.rows = {spec.name: range(starts[i], starts[i + 1]) for i, spec in enumerate(specs)}
        self.count = starts[-1]
        self.weight, self.damping = like.new_zeros(self.count), like.new_zeros(self.count)
        self.condition = like.new_ones(self.count)
        self.failures, self.skipped = (torch.zeros((), dtype=torch.int64, device=like.device) for _ in range(2))

    def rows_of(self, names: Iterable[str]) -> tuple[int, ...]:
        """The rows of these groups, one after the other."""
        return tuple(row for name in names for row in self.rows[name])

    def new_packed(self, k: int, b: int) -> Tensor:
        """Where symmetric matrices of k blocks of size b are kept, one a row."""
        return self.weight.new_zeros(self.count, k, *linalg.packed_shape(b))

    def update(self, new: Mapping[str, Mapping[str, Tensor]], seen: Mapping[str, Tensor]) -> None:
        """Eq. 14 with the factors of one step: group → name → [units, …]. A row of which any is not finite stays.
        `seen`: group → a truth value, whether any process saw it; what nobody saw is left out, but does not count as
        skipped."""
        names = [name for name in new if name in self.rows]
        if not names:
            return
        rows = linalg.index_tensor(self.rows_of(names), self.weight.device)
        fresh = {key: torch.cat([new[name][key].to(self.weight.dtype) for name in names]) for key in new[names[0]]}
        valid = torch.stack([torch.isfinite(value.flatten(1)).all(1) for value in fresh.values()]).all(0)
        fresh = {key: torch.where(linalg.along(valid, value), value, torch.nan) for key, value in fresh.items()}
        self.average(rows, fresh)
        skipped = ~valid
        if seen:
            skipped &= torch.cat([seen[name].expand(len(self.rows[name])) for name in names])
        self.skipped += skipped.sum()

    def average(self, rows: Tensor, fresh: Mapping[str, Tensor]) -> None:
        """Take the factors of these rows into the averages; what is NaN is passed over."""
        raise NotImplementedError

    def invert(self) -> None:
        """Derive whiteners or inverses of all rows from the averages. A row that fails keeps the last."""
        raise NotImplementedError

    def keep(self, store: Tensor, value: Tensor, good: Tensor) -> None:
        """Write what was derived, where it is good."""
        store.copy_(torch.where(linalg.along(good, value), value, store))

    def precondition(self, grad: Tensor, rows: Tensor) -> Tensor:
        """The inverse of these rows' blocks times grad [n, m, d] → the same, a tensor of its own."""
        raise NotImplementedError

    def dense(self, rows: Tensor) -> dict[str, Tensor]:
        """The factors of these rows: bias-corrected, undamped, each [n, …]; see `LNGD.factors`."""
        raise NotImplementedError

    def basis_of(self, name: str) -> Any:
        """The coordinates in which a group's coming statistics are wanted; None: their own."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The state, a row in the first dimension."""
        return {"phi_weight": self.weight, "damping": self.damping, "condition": self.condition}


def corrected(packed: Tensor, weight: Tensor, b: int) -> Tensor:
    """Running averages as kept, packed, and their weights [n] → bias-corrected, [n, k, b, b]; the identity for 0."""
    seen = (weight > 0)[:, None, None, None]
    average = linalg.unpack(packed, b) / weight.clamp_min(torch.finfo(weight.dtype).tiny)[:, None, None, None]
    return torch.where(seen, average, torch.eye(b, dtype=average.dtype, device=average.device))


def block_diagonal(blocks: Tensor, size: int) -> Tensor:
    """[n, k, b, b] → matrices [n, size, size], zero outside the blocks."""
    return torch.stack([torch.block_diag(*row)[:size, :size] for row in blocks])


class FactorBank(Bank):
    """Φ of G groups with k blocks of size b; `blocks`: (k, b).

    Attributes:
        phi: the averages, packed.
        derived: of `kind` ``whitener``: lower triangular V with VᵀV = Φ̂⁻¹, of Φ scaled to mean eigenvalue 1, in the
            precision of a step's matmuls. ``inverse``: Φ̂⁻¹, packed."""

    has_psi = False  # something of the layers' outputs is kept, too

    def __init__(
        self, specs: Sequence[FactorSpec], blocks: tuple[int, int], kind: str, config: LNGDConfig, like: Tensor
    ) -> None:
        super().__init__(specs, config, like)
        (self.k, self.b), self.kind = blocks, kind
        self.phi = self.new_packed(self.k, self.b)
        eye = torch.eye(self.b, dtype=like.dtype, device=like.device)
        eye = eye.to(linalg.kept_dtype(eye.dtype)) if kind == "whitener" else linalg.pack(eye)
        self.derived = eye.repeat(self.count, self.k, 1, 1)
        self._columns = like.new_tensor([float(s.layer.columns) for s in specs for _ in range(s.layer.units)])
        self._scale = like.new_tensor([s.scale for s in specs for _ in range(s.layer.units)])

    def average(self, rows: Tensor, fresh: Mapping[str, Tensor]) -> None:
        """Eq. 14 of Φ [n, k, b, b]."""
        old, new, decay = self.phi[rows], linalg.pack(fresh["phi"]), self.config.ema_decay
        self.phi[rows], self.weight[rows] = linalg.running_average(old, new, self.weight[rows], decay)

    def invert(self) -> None:
        phi, c = corrected(self.phi, self.weight, self.b), self.config
        mean = linalg.trace(phi) / self._columns
        lam = linalg.damping(mean, c.damping, c.damping_bounds, self._scale)
        self.damping.copy_(lam * self._scale)
        if self.kind == "whitener":
            safe = mean.clamp_min(torch.finfo(mean.dtype).tiny)
            phi, lam = phi / safe[:, None, None, None], lam / safe
        damped = linalg.add_damping(phi, lam[:, None].expand(-1, self.k))
        value, ok, condition = linalg.whitener(damped) if self.kind == "whitener" else linalg.inverse(damped)
        good = ok.all(1)  # all blocks of a row
        self.keep(self.derived, value.to(self.derived.dtype) if self.kind == "whitener" else linalg.pack(value), good)
        self.keep(self.condition, condition.amax(1), good)
        self.failures += (~good).sum()

    def whitener(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """V of these rows: [n, k, b, b]."""
        return self.derived[rows].to(dtype)

    def precondition(self, grad: Tensor, rows: Tensor) -> Tensor:
        """G Φ̂⁻¹ (of what is kept); the rows' Ψ̂⁻¹ is the layers'."""
        return linalg.apply_right(grad, linalg.unpack(self.derived[rows], self.b))

    def dense(self, rows: Tensor) -> dict[str, Tensor]:
        blocks = corrected(self.phi[rows], self.weight[rows], self.b)
        return {"phi": block_diagonal(blocks, self.specs[0].layer.columns)}

    def tensors(self) -> dict[str, Tensor]:
        return {"phi": self.phi, self.kind: self.derived} | super().tensors()


def factor_banks(
    specs: Sequence[FactorSpec], kind: str, config: LNGDConfig, bank: type[FactorBank] = FactorBank
) -> list[Bank]:
    """Banks of Φ, one for each shape, device and dtype."""
    keyed: dict[tuple, list[FactorSpec]] = {}
    for spec in specs:
        layer, blocks = spec.layer, factor_blocks(spec.layer, config.max_factor_dim)
        shape = (blocks, layer.columns, layer.m if bank.has_psi else 0)
        keyed.setdefault((*shape, layer.weight.device, layer.like.dtype), []).append(spec)
    return [bank(own, blocks, kind, config, own[0].layer.like) for (blocks, *_), own in keyed.items()]
