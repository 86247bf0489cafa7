"""What a factor step of KFAC, EKFAC, TKFAC and NG+ pools: plain sums over positions, divided once at the end.

With g the gradient of the mean of a batch's T terms with respect to a layer's output, the layer's Fisher block is
F = T Σ_t (a_t a_tᵀ) ⊗ (g_t g_tᵀ); T is the `scale` below (see `FisherSource.scale`). Every entry of `FamilySums.parts`
is a sum over positions or rows: those of micro-batches, calls and processes add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .factors import from_blocks, input_statistic, to_blocks
from .layers import LEFT, RIGHT, Sides
from .sums import seen_over_kept

# Eigenvectors of a layer's left factor [u, k, b, b] and of its right one.
Basis = tuple[Tensor, Tensor]


def rotate(x: Tensor, basis: Tensor) -> Tensor:
    """x · blockdiag(basis) with all k·b coordinates: x [..., n, d], basis [..., k, b, b] → [..., n, k·b]."""
    k, b = basis.shape[-3], basis.shape[-1]
    return from_blocks(to_blocks(x, k, b) @ basis, k * b)


@dataclass
class FamilySums:
    """Sums of one layer over the positions of a step.

    Attributes:
        sides: the layer's.
        units: u.
        most: numbers that a temporary may hold, where a family has large ones.
        basis: the coordinates of some of the sums; only EKFAC has any.
        parts: statistic → its sum, [u, ...].
        n: positions.
        seen, kept: rows of the batch in the step, and those of them that were summed.
    """

    sides: Sides
    units: int
    most: int
    basis: Basis | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    n: Tensor | None = None
    seen: int | Tensor = 0
    kept: int | Tensor = 0

    def add_gradient(self, a: Tensor, g: Tensor, mask: Tensor | None, per_row: int) -> None:
        """Add some positions.

        Args:
            a: inputs [u, N, columns].
            g: gradients [u, N, m] with respect to the pre-activation.
            mask: [N], 1 where the position counts, or None.
            per_row: positions of one row of the batch, which follow each other: N is a multiple of it, or less than
                it where a row comes in pieces.
        """
        if a.is_meta:  # which knows no autocast
            return self._add(a, g, mask, per_row)
        with torch.autocast(a.device.type, enabled=False):  # sums in half precision would be off by more than λ
            self._add(a, g, mask, per_row)

    def _add(self, a: Tensor, g: Tensor, mask: Tensor | None, per_row: int) -> None:
        g = g.to(a.dtype)
        if mask is None:
            count = a.new_full((), a.shape[-2])
        else:
            mask = mask.to(a.dtype)
            g, count = g * mask[:, None], mask.sum()
        self.n = count if self.n is None else self.n + count
        for name, value in self._statistics(a, g, mask, per_row):
            self.parts[name] = self.parts[name].add_(value) if name in self.parts else value

    def _statistics(self, a: Tensor, g: Tensor, mask: Tensor | None, per_row: int) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each sum; g is zero where masked."""
        raise NotImplementedError

    def factors(self, scale: Tensor | float | None) -> dict[str, Tensor]:
        """The statistics of the step, each [u, ...], where there are any; non-finite ones are not to be used."""
        return {name: self._mean(value, scale) for name, value in self.parts.items()}

    def _mean(self, value: Tensor, scale: Tensor | float | None) -> Tensor:
        assert scale is not None  # these families take gradients, whose scale is known
        return value * (scale * seen_over_kept(self.seen, self.kept))

    # Over several processes

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each sum of one unit."""
        return {side: (k, b, b) for side in (LEFT, RIGHT) for k, b in (self.sides.blocks(side),)}

    def plain(self, like: Tensor) -> dict[str, Tensor]:
        """Every sum by name, zeros of this dtype and device where there is none yet; those of `SYMMETRIC` are."""
        zeros = {name: like.new_zeros(self.units, *shape) for name, shape in self._shapes().items()}
        return zeros | self.parts | {"n": like.new_zeros(()) if self.n is None else self.n}

    def pooled(self, plain: dict[str, Tensor], seen: Tensor, kept: Tensor) -> FamilySums:
        """Sums with these in place of its own."""
        return replace(self, parts={k: v for k, v in plain.items() if k != "n"}, n=plain["n"], seen=seen, kept=kept)


class KFACSums(FamilySums):
    """A = E[a aᵀ] and B = E[g gᵀ] (Martens & Grosse 2015)."""

    def _statistics(self, a: Tensor, g: Tensor, mask: Tensor | None, per_row: int) -> Iterator[tuple[str, Tensor]]:
        yield RIGHT, input_statistic(a, mask, *self.sides.right)
        yield LEFT, input_statistic(g, None, *self.sides.left)

    def factors(self, scale: Tensor | float | None) -> dict[str, Tensor]:
        """A [u, k, b, b] is the mean over positions; B takes the rest of F's scale, so that tr A · tr B is right where
        a and g are independent."""
        assert self.n is not None
        return super().factors(scale) | {RIGHT: self.parts[RIGHT] / self.n}


class EKFACSums(KFACSums):
    """KFAC's, and E[(U_Bᵀ g)² (aᵀ U_A)²] in the eigenbasis at hand (George et al. 2018), if there is one yet."""

    def _statistics(self, a: Tensor, g: Tensor, mask: Tensor | None, per_row: int) -> Iterator[tuple[str, Tensor]]:
        yield from super()._statistics(a, g, mask, per_row)
        if self.basis is not None:
            left, right = self.basis
            yield "moments", rotate(g, left).square().mT @ rotate(a, right).square()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        (k, b), (n, c) = self.sides.left, self.sides.right
        return super()._shapes() | ({} if self.basis is None else {"moments": (k * b, n * c)})


class TKFACSums(FamilySums):
    """δP = E[a aᵀ‖g‖²] and δQ = E[‖a‖² g gᵀ] (Gao et al. 2021); the trace of both is δ = E[‖a‖²‖g‖²] = tr F."""

    def _statistics(self, a: Tensor, g: Tensor, mask: Tensor | None, per_row: int) -> Iterator[tuple[str, Tensor]]:
        yield RIGHT, input_statistic(a, g.square().sum(-1), *self.sides.right)
        yield LEFT, input_statistic(g, a.square().sum(-1), *self.sides.left)


@dataclass
class NGPlusSums(FamilySums):
    """E_n[∇_n ∇_nᵀ], or E_n[∇_nᵀ ∇_n] where that is smaller; ∇_n = Σ_t g_t a_tᵀ over the positions of a row n."""

    _open: Tensor | None = None  # ∇_n of a row of which pieces are still to come
    _open_positions: int = 0

    def _statistics(self, a: Tensor, g: Tensor, mask: Tensor | None, per_row: int) -> Iterator[tuple[str, Tensor]]:
        side = self.sides.smaller
        if a.shape[1] % per_row:
            part = g.mT @ a
            self._open = part if self._open is None else self._open + part
            self._open_positions += a.shape[1]
            if self._open_positions == per_row:
                yield side, self._gram(self._open if side == RIGHT else self._open.mT)
                self._open, self._open_positions = None, 0
            return
        a, g = a.unflatten(1, (-1, per_row)), g.unflatten(1, (-1, per_row))
        own, other = (a, g) if side == RIGHT else (g, a)
        if per_row <= min(self.sides.m, self.sides.columns):  # ∇ᵀ∇ = aᵀ (g gᵀ) a: no ∇ has to be made
            pairs = other @ other.mT
            blocks, turned = self._blocks(own.flatten(1, 2)), self._blocks((pairs @ own).flatten(1, 2))
            yield side, blocks.mT @ turned
            return
        rows = max(1, self.most // max(1, a.shape[0] * self.sides.m * self.sides.columns))
        for x, y in zip(own.split(rows, 1), other.split(rows, 1), strict=True):
            yield side, self._gram((y.mT @ x).flatten(1, 2))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.sides.smaller: super()._shapes()[self.sides.smaller]}

    def _gram(self, x: Tensor) -> Tensor:
        blocks = self._blocks(x)
        return blocks.mT @ blocks

    def _blocks(self, x: Tensor) -> Tensor:
        return to_blocks(x, *self.sides.blocks(self.sides.smaller))
