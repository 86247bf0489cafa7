"""Running factors Φ of many groups at once, and their inverses.

Groups whose Φ has one layout (k blocks of size b) are kept in one batch. Everything symmetric is stored packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..config import LNGDConfig, is_due
from ..placement import Speed
from .factors import add_damping, apply_right, damping, running_average, trace
from .inverses import inverse, inverse_sqrt, pack, packed_shape, unpack, uses_newton, whitener
from .precision import kept_dtype, root_dtype
from .rounding import Draws, round_at_random


@lru_cache(maxsize=4096)
def index_tensor(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Indices on a device. Cached: to copy a list there waits for the device, and the same ones come again."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class FactorSpec:
    """One group's Φ: its name, its columns, its units (matrices: groups of a convolution), and for λ the first
    member's m where φ' = 1 (E[a aᵀ] is kept), else 1."""

    name: str
    columns: int
    scale: float
    units: int = 1


class Bank:
    """Curvature of several groups in one batch: which rows are a group's, when each is inverted, what failed.

    What :meth:`LNGD.step` asks of every family, LNGD's included: :meth:`update` with the factors of one step,
    :meth:`invert` what is :meth:`due`, :meth:`precondition` a gradient.

    Attributes:
        derived: what :meth:`invert` makes of the averages; rows (units of groups) are the first dimension.

    Args:
        specs: the groups; each of their units is a row of its own.
        offsets: step within an interval at which each group is inverted.
        config: damping, intervals.
        like: a tensor with the device and dtype of the state.
    """

    def __init__(self, specs: list[FactorSpec], offsets: list[int], config: LNGDConfig, like: Tensor) -> None:
        self.specs, self.config = specs, config
        starts = [0, *accumulate(spec.units for spec in specs)]
        self.rows = {spec.name: range(starts[i], starts[i + 1]) for i, spec in enumerate(specs)}
        self.count = starts[-1]
        self.weight = like.new_zeros(self.count)  # of the averages, see `running_average`
        self.damping = like.new_zeros(self.count)
        self.condition = like.new_ones(self.count)
        self.failures = torch.zeros((), dtype=torch.int64, device=like.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=like.device)
        self.derived: dict[str, Tensor] = {}
        self._due: dict[int, tuple[int, ...]] = {}
        for offset in sorted(set(offsets)):
            members = [spec.name for spec, own in zip(specs, offsets, strict=True) if own == offset]
            self._due[offset] = self.rows_of(members)
        self.inverted = False

    def rows_of(self, names: Iterable[str]) -> tuple[int, ...]:
        """The rows of these groups, one after the other."""
        return tuple(row for name in names for row in self.rows[name])

    def update(self, new: Mapping[str, Any], seen: Mapping[str, Tensor], draws: Draws) -> None:
        """Eq. 14 with the factors of one step: group → what the family makes of its sums.

        Args:
            seen: group → a truth value: whether any process saw it; no entry: it was seen. What nobody saw is left
                out, but does not count as skipped.
            draws: for averages that are kept in bfloat16.
        """
        raise NotImplementedError

    def _new_average(self, k: int, b: int) -> Tensor:
        """Where running matrices of k blocks of size b are kept: packed, for each row."""
        shape = (self.count, k, *packed_shape(b))
        return self.weight.new_zeros(shape, dtype=kept_dtype(self.config, self.weight.dtype))

    def _average(self, store: Tensor, rows: Tensor, packed: Tensor, old_weight: Tensor, draws: Draws) -> Tensor:
        """Eq. 14 of some rows of what :meth:`_new_average` made; returns their weights. Rows that are not finite stay.

        In bfloat16 an average moves by less than the gap between its numbers as soon as a factor is within 8 % of it:
        rounded to the nearest it would stand still there, so it is rounded at random.
        """
        old = store[rows]
        average, weight = running_average(old.to(packed.dtype), packed, old_weight, self.config.ema_decay)
        if store.dtype != packed.dtype and not store.is_meta:  # which has no generators
            average = round_at_random(average.float(), draws.on(store.device))
        store[rows] = average.to(store.dtype)
        return weight

    def _count_skipped(self, valid: Tensor, names: list[str], seen: Mapping[str, Tensor]) -> None:
        """Count the rows of these groups that were seen and are of no use: valid [rows]."""
        skipped = ~valid
        if seen:
            skipped &= torch.cat([seen[name].expand(len(self.rows[name])) for name in names])
        self.skipped += skipped.sum()

    def due(self, step: int) -> tuple[int, ...]:
        """The rows whose turn it is to be inverted: all of them at the first time and at early factor steps."""
        early = 0 < step < self.config.inverse_interval and is_due(step, self.config.inverse_interval, self.config)
        if not self.inverted or early:
            return tuple(range(self.count))
        return self._due.get(step % self.config.inverse_interval, ())

    def invert(self, due: tuple[int, ...]) -> None:
        """Invert these rows. A failed one keeps the last."""
        self._refresh(index_tensor(due, self.damping.device))

    def _refresh(self, rows: Tensor) -> None:
        raise NotImplementedError

    def results(self) -> dict[str, Tensor]:
        """What :meth:`invert` writes."""
        return {"damping": self.damping, "condition": self.condition, **self.derived}

    def seconds(self, speed: Speed) -> float:
        """What a row's inverse costs, roughly."""
        raise NotImplementedError

    def precondition(self, grad: Tensor, rows: Tensor) -> Tensor:
        """What is known of the inverse of these rows' blocks times grad [n, m, d] → the same, a tensor of its own."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, with a row of each unit of each group in the first dimension."""
        return self.results()


def averaged(packed: Tensor, weight: Tensor, b: int) -> Tensor:
    """Running averages as kept, packed, and their weights [n] → bias-corrected, [n, k, b, b], in the weights' dtype;
    the identity for 0."""
    seen = (weight > 0)[:, None, None, None]
    average = unpack(packed.to(weight.dtype), b) / weight.clamp_min(torch.finfo(weight.dtype).tiny)[:, None, None, None]
    return torch.where(seen, average, torch.eye(b, dtype=average.dtype, device=average.device))


class FactorBank(Bank):
    """Φ of G groups with k blocks of size b; each unit of a group is a row of its own.

    Args:
        specs: the groups.
        blocks: (k, b).
        kinds: which of ``inverse`` (Φ̂⁻¹), ``root`` (Φ̂^(−1/2)) and ``whitener`` (lower triangular V with VᵀV = Φ̂⁻¹) are
            kept; of Φ scaled to mean eigenvalue 1 unless the direction is ``natural``.
        offsets: step within an interval at which each group is inverted.
        config: damping, intervals.
        like: a tensor with the device and dtype of the factors.
    """

    def __init__(
        self,
        specs: list[FactorSpec],
        blocks: tuple[int, int],
        kinds: frozenset[str],
        offsets: list[int],
        config: LNGDConfig,
        like: Tensor,
    ) -> None:
        super().__init__(specs, offsets, config, like)
        self.k, self.b = blocks
        self.phi = self._new_average(self.k, self.b)
        # what every step multiplies with in half precision is kept ready for that, in as much memory
        self.ready = config.direction == "polar" and root_dtype(config, like.dtype) != like.dtype
        eye = self._stored(torch.eye(self.b, dtype=like.dtype, device=like.device))
        self.derived = {kind: eye.repeat(self.count, self.k, 1, 1) for kind in sorted(kinds)}
        self._columns = like.new_tensor([float(spec.columns) for spec in specs for _ in range(spec.units)])
        self._scale = like.new_tensor([spec.scale for spec in specs for _ in range(spec.units)])

    def update(self, new: Mapping[str, Tensor], seen: Mapping[str, Tensor], draws: Draws) -> None:
        """Eq. 14 with the factors of one step: name → Φ [u, k, b, b], undamped. Non-finite ones are left out."""
        names = [name for name in new if name in self.rows]
        if not names:
            return
        rows = index_tensor(self.rows_of(names), self.phi.device)
        packed = pack(torch.cat([new[name].to(self.weight.dtype) for name in names]))
        self.weight[rows] = self._average(self.phi, rows, packed, self.weight[rows], draws)
        self._count_skipped(torch.isfinite(packed.flatten(1)).all(1), names, seen)

    def _refresh(self, rows: Tensor) -> None:
        phi = self.dense(rows)
        mean = trace(phi) / self._columns[rows]
        c = self.config
        lam = damping(mean, c.damping, c.damping_rho, c.damping_min, c.damping_max, self._scale[rows])
        self.damping[rows] = lam * self._scale[rows]
        if c.direction != "natural":  # whitening is of Φ scaled to mean eigenvalue 1
            safe = mean.clamp_min(torch.finfo(mean.dtype).tiny)
            phi, lam = phi / safe[:, None, None, None], lam / safe
        shift = lam[:, None].expand(-1, self.k)
        if "inverse" in self.derived:
            self._keep("inverse", rows, *inverse(add_damping(phi, shift)))
        if "root" in self.derived:
            self._keep("root", rows, *inverse_sqrt(phi, shift, c.inverse_root))
        if "whitener" in self.derived:
            self._keep("whitener", rows, *whitener(add_damping(phi, shift)))

    def _keep(self, kind: str, rows: Tensor, value: Tensor, ok: Tensor, condition: Tensor) -> None:
        good = ok.all(1)  # of all blocks of a row
        store = self.derived[kind]
        store[rows] = torch.where(good[:, None, None, None], self._stored(value, kind), store[rows])
        self.condition[rows] = torch.where(good, condition.amax(1), self.condition[rows])
        self.failures += (~good).sum()

    def _stored(self, value: Tensor, kind: str = "inverse") -> Tensor:
        if self.ready:
            return value.to(root_dtype(self.config, value.dtype))
        return pack(value + value.tril(-1).mT if kind == "whitener" else value)

    def dense(self, rows: Tensor) -> Tensor:
        """Φ as kept, bias-corrected and undamped: [n, k, b, b]; the identity for a group not seen yet."""
        return averaged(self.phi[rows], self.weight[rows], self.b)

    def get(self, kind: str, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``inverse``, ``root`` or ``whitener`` of these groups, dense: [n, k, b, b], in `dtype` if given."""
        found = self.derived[kind][rows].to(dtype)
        if self.ready:
            return found
        dense = unpack(found, self.b)
        return dense.tril() if kind == "whitener" else dense

    def precondition(self, grad: Tensor, rows: Tensor) -> Tensor:
        """G Φ̂⁻¹ (of what is kept); the rows' Ψ̂⁻¹ is the layers'."""
        return apply_right(grad, self.get("inverse", rows))

    def seconds(self, speed: Speed) -> float:
        """What a row's inverses cost, roughly."""
        method = "newton" if uses_newton(self.config.inverse_root, self.phi.device) else "eigh"
        rates = {"inverse": speed.cholesky, "whitener": speed.cholesky, "root": getattr(speed, method)}
        return sum(self.k * self.b**3 / rates[kind] for kind in self.derived)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, with a row of each unit of each group in the first dimension."""
        return {"phi": self.phi, "weight": self.weight} | super().tensors()
