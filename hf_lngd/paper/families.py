"""KFAC, EKFAC, TKFAC and NG+: other approximations of a layer's Fisher block F, behind the interface of LNGD's.

A family is a class of statistics, which a factor step sums, and a bank (see `factors.Bank`). Left is the side of a
matrix's m outputs, right that of its d inputs (with the bias, where it is in the factor); both are cut into k diagonal
blocks past `max_factor_dim`. Averages are undamped; only what is inverted is damped.

With g the gradient of the mean of a batch's T terms with respect to a layer's output, the layer's Fisher block is
F = T Σ_t (a_t a_tᵀ) ⊗ (g_t g_tᵀ); T is the `scale` below (see `PaperCapture.scale`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import linalg
from ..config import LNGDConfig
from ..factors import Bank, FactorSpec, block_diagonal, corrected
from ..layers import MOST_PATCHES, SMALLEST_BLOCK, Layer, factor_blocks
from ..statistics import InputStatistics, Statistics, exact
from ..topology import Group
from .natural import WeightedStatistics, estimates_psi

LEFT, RIGHT = "left", "right"
# Eigenvectors of a layer's left factor [u, k, b, b] and of its right one.
Basis = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sides:
    """A layer's matrices [m, columns], and how factors of either side are cut: (k, b) of the outputs, of the inputs."""

    m: int
    columns: int
    left: tuple[int, int]
    right: tuple[int, int]

    @classmethod
    def of(cls, layer: Layer, max_factor_dim: int | str) -> Sides:
        """The sides of a layer; a factor of the outputs is cut as that of the inputs."""
        narrow = max(min(layer.d, layer.m), SMALLEST_BLOCK)
        left = linalg.block_layout(layer.m, max_factor_dim if isinstance(max_factor_dim, int) else narrow)
        return cls(layer.m, layer.columns, left, factor_blocks(layer, max_factor_dim))

    @property
    def smaller(self) -> str:
        """The side with the fewer rows: ``right`` where it is a tie."""
        return RIGHT if self.columns <= self.m else LEFT

    def size(self, side: str) -> int:
        """m or columns."""
        return self.m if side == LEFT else self.columns

    def blocks(self, side: str) -> tuple[int, int]:
        """(k, b) of a side."""
        return self.left if side == LEFT else self.right


def rotate(x: Tensor, basis: Tensor) -> Tensor:
    """x · blockdiag(basis) with all k·b coordinates: x [..., n, d], basis [..., k, b, b] → [..., n, k·b]."""
    k, b = basis.shape[-3], basis.shape[-1]
    return linalg.from_blocks(linalg.to_blocks(x, k, b) @ basis, k * b)


class FamilyStatistics(Statistics):
    """Sums of one layer over the tokens of a step; `basis`: the coordinates of some of the sums; only EKFAC has any."""

    SYMMETRIC: ClassVar[tuple[str, ...]] = (LEFT, RIGHT)

    def __init__(self, sides: Sides, units: int, basis: Basis | None = None) -> None:
        super().__init__()
        self.sides, self.units, self.basis = sides, units, basis

    def add_gradient(self, a: Tensor, g: Tensor, mask: Tensor | None, per_sample: int) -> None:
        """Add some tokens: inputs a [u, N, columns], gradients g [u, N, m] with respect to the output, mask [N] or
        None. `per_sample`: tokens of one sample of the batch, which follow each other: N is a multiple of it, or less
        than it where a sample comes in pieces."""
        with exact(a):
            g, count = g.to(a.dtype), a.new_full((), a.shape[-2])
            if mask is not None:
                mask = mask.to(a.dtype)
                g, count = g * mask[:, None], mask.sum()
            self.accumulate(self.of(a, g, mask, per_sample), count)

    def of(self, a: Tensor, g: Tensor, mask: Tensor | None, per_sample: int) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each sum; g is zero where masked."""
        raise NotImplementedError

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {side: (self.units, k, b, b) for side in (LEFT, RIGHT) for k, b in (self.sides.blocks(side),)}

    def factors(self, scale: Tensor | float | None) -> dict[str, Tensor]:
        """The statistics of the step, each [u, ...]."""
        assert scale is not None  # these families take gradients, whose scale is known
        return {name: value * (scale * self.scale_of_samples) for name, value in self.sums.items()}


class KFACStatistics(FamilyStatistics):
    """A = E[a aᵀ] and B = E[g gᵀ] (Martens & Grosse 2015)."""

    def of(self, a: Tensor, g: Tensor, mask: Tensor | None, per_sample: int) -> Iterator[tuple[str, Tensor]]:
        yield RIGHT, linalg.input_statistic(a, mask, *self.sides.right)
        yield LEFT, linalg.input_statistic(g, None, *self.sides.left)

    def factors(self, scale: Tensor | float | None) -> dict[str, Tensor]:
        """A [u, k, b, b] is the mean over positions; B takes the rest of F's scale, so that tr A · tr B is right where
        a and g are independent."""
        assert self.n is not None
        return super().factors(scale) | {RIGHT: self.sums[RIGHT] / self.n}


class EKFACStatistics(KFACStatistics):
    """KFAC's, and E[(U_Bᵀ g)² (aᵀ U_A)²] in the eigenbasis at hand (George et al. 2018), if there is one yet."""

    def of(self, a: Tensor, g: Tensor, mask: Tensor | None, per_sample: int) -> Iterator[tuple[str, Tensor]]:
        yield from super().of(a, g, mask, per_sample)
        if self.basis is not None:
            left, right = self.basis
            yield "moments", rotate(g, left).square().mT @ rotate(a, right).square()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        (k, b), (n, c) = self.sides.left, self.sides.right
        return super().shapes() | ({} if self.basis is None else {"moments": (self.units, k * b, n * c)})


class TKFACStatistics(FamilyStatistics):
    """δP = E[a aᵀ‖g‖²] and δQ = E[‖a‖² g gᵀ] (Gao et al. 2021); the trace of both is δ = E[‖a‖²‖g‖²] = tr F."""

    def of(self, a: Tensor, g: Tensor, mask: Tensor | None, per_sample: int) -> Iterator[tuple[str, Tensor]]:
        yield RIGHT, linalg.input_statistic(a, g.square().sum(-1), *self.sides.right)
        yield LEFT, linalg.input_statistic(g, a.square().sum(-1), *self.sides.left)


class NGPlusStatistics(FamilyStatistics):
    """E_n[∇_n ∇_nᵀ], or E_n[∇_nᵀ ∇_n] where that is smaller; ∇_n = Σ_t g_t a_tᵀ over the positions of a row n."""

    _open: Tensor | None = None  # ∇_n of a row of which pieces are still to come
    _open_positions: int = 0

    def of(self, a: Tensor, g: Tensor, mask: Tensor | None, per_sample: int) -> Iterator[tuple[str, Tensor]]:
        side = self.sides.smaller
        if a.shape[1] % per_sample:
            part = g.mT @ a
            self._open = part if self._open is None else self._open + part
            self._open_positions += a.shape[1]
            if self._open_positions == per_sample:
                yield side, self._gram(self._open if side == RIGHT else self._open.mT)
                self._open, self._open_positions = None, 0
            return
        a, g = a.unflatten(1, (-1, per_sample)), g.unflatten(1, (-1, per_sample))
        own, other = (a, g) if side == RIGHT else (g, a)
        if per_sample <= min(self.sides.m, self.sides.columns):  # ∇ᵀ∇ = aᵀ (g gᵀ) a: no ∇ has to be made
            pairs = other @ other.mT
            yield side, self._blocks(own.flatten(1, 2)).mT @ self._blocks((pairs @ own).flatten(1, 2))
            return
        rows = max(1, MOST_PATCHES // max(1, a.shape[0] * self.sides.m * self.sides.columns))
        for x, y in zip(own.split(rows, 1), other.split(rows, 1), strict=True):
            yield side, self._gram((y.mT @ x).flatten(1, 2))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.sides.smaller: super().shapes()[self.sides.smaller]}

    def _gram(self, x: Tensor) -> Tensor:
        blocks = self._blocks(x)
        return blocks.mT @ blocks

    def _blocks(self, x: Tensor) -> Tensor:
        return linalg.to_blocks(x, *self.sides.blocks(self.sides.smaller))


class FamilyBank(Bank):
    """Curvature of L layers with one shape, none of them shared; `sides`: their shape and how it is cut."""

    statistics: ClassVar[type[FamilyStatistics]]

    def __init__(self, specs: Sequence[FactorSpec], sides: Sides, config: LNGDConfig, like: Tensor) -> None:
        super().__init__(specs, config, like)
        self.sides, self.like = sides, like
        self.averages = {side: self.new_packed(*sides.blocks(side)) for side in self.kept_sides()}
        self.derived = self._start()

    def kept_sides(self) -> tuple[str, ...]:
        """The sides that there is a factor of."""
        return (LEFT, RIGHT)

    def _eye(self, side: str) -> Tensor:
        k, b = self.sides.blocks(side)
        return torch.eye(b, dtype=self.like.dtype, device=self.like.device).repeat(self.count, k, 1, 1)

    def _start(self) -> dict[str, Tensor]:
        """What is derived from the averages, as it is before: D = G."""
        return {f"inverse_{side}": linalg.pack(self._eye(side)) for side in self.kept_sides()}

    def average(self, rows: Tensor, fresh: Mapping[str, Tensor]) -> None:
        """Eq. 14 of each side."""
        old_weight, decay = self.weight[rows], self.config.ema_decay
        for side in self.kept_sides():
            old, new = self.averages[side][rows], linalg.pack(fresh[side])
            self.averages[side][rows], self.weight[rows] = linalg.running_average(old, new, old_weight, decay)

    def blocks(self, side: str, rows: Tensor | slice = slice(None)) -> Tensor:
        """A side's running average, undamped: [n, k, b, b]; the identity for a layer not seen yet."""
        return corrected(self.averages[side][rows], self.weight[rows], self.sides.blocks(side)[1])

    def whole(self, side: str, rows: Tensor) -> Tensor:
        """The same as matrices [n, size, size], zero outside the blocks."""
        return block_diagonal(self.blocks(side, rows), self.sides.size(side))

    def inverse_of(self, side: str, rows: Tensor) -> Tensor:
        """What a side's damped average was inverted to: [n, k, b, b]."""
        return linalg.unpack(self.derived[f"inverse_{side}"][rows], self.sides.blocks(side)[1])

    def _mean(self, blocks: Tensor, side: str) -> Tensor:
        """Mean eigenvalue of each row, in float64: products of two of them leave the range of float32."""
        return linalg.trace(blocks).double() / self.sides.size(side)

    def _damping(self, mean: Tensor) -> Tensor:
        """λ of F itself, from the mean eigenvalue that the family gives it."""
        c = self.config
        return linalg.damping(mean, c.damping, c.damping_bounds)

    def _keep(self, good: Tensor, found: dict[str, Tensor], condition: Tensor) -> None:
        """Take what was derived where all of it is good; a failed row keeps the last."""
        for name, value in found.items():
            self.keep(self.derived[name], value, good)
        self.keep(self.condition, condition.to(self.condition.dtype), good)
        self.failures += (~good).sum()

    def tensors(self) -> dict[str, Tensor]:
        return self.averages | self.derived | super().tensors()


class KFAC(FamilyBank):
    """F ≈ A ⊗ B, D = B̂⁻¹ G Â⁻¹, A = E[a aᵀ], B = E[g gᵀ] (Martens & Grosse 2015, ICML; positions are the samples, as
    in KFC, Grosse & Martens 2016).

    Damping is factored (§6.3): Â = A + πγ I, B̂ = B + γ/π I with γ² = λ and π² = (tr A/d) / (tr B/m). λ is that of F,
    whose mean eigenvalue is tr A · tr B / (d m); ``relative`` gives λ_A = √ρ tr A/d and λ_B = √ρ tr B/m."""

    statistics: ClassVar[type[FamilyStatistics]] = KFACStatistics

    def invert(self) -> None:
        left, right = self.blocks(LEFT), self.blocks(RIGHT)
        lam, on_left, on_right, gain = self._split(left, right)
        self.damping.copy_(lam)
        inverses, good, condition = {}, torch.ones_like(lam, dtype=torch.bool), torch.ones_like(lam)
        for side, blocks, shift in ((LEFT, left, on_left), (RIGHT, right, on_right)):
            value, ok, own = linalg.inverse(
                linalg.add_damping(blocks, shift.to(blocks.dtype)[:, None].expand(-1, blocks.shape[1]))
            )
            if side == LEFT:
                value = value * gain.to(value.dtype)[:, None, None, None]
            inverses[f"inverse_{side}"] = linalg.pack(value)
            good, condition = good & ok.all(1) & torch.isfinite(value.flatten(1)).all(1), condition * own.amax(1)
        self._keep(good, inverses, condition)

    def _split(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """λ of F, its parts on the left and on the right, and δ of F = left ⊗ right / δ; each [n] in float64."""
        on_left, on_right = self._mean(left, LEFT), self._mean(right, RIGHT)
        lam = self._damping(on_left * on_right)
        pi = (on_right / on_left).sqrt()
        return lam, lam.sqrt() / pi, lam.sqrt() * pi, torch.ones_like(lam)

    def precondition(self, grad: Tensor, rows: Tensor) -> Tensor:
        left, right = (self.inverse_of(side, rows) for side in (LEFT, RIGHT))
        return linalg.apply_left(left, linalg.apply_right(grad, right))

    def dense(self, rows: Tensor) -> dict[str, Tensor]:
        """``a`` = A [n, d, d], ``b`` = B [n, m, m]."""
        return {"a": self.whole(RIGHT, rows), "b": self.whole(LEFT, rows)}


class TKFAC(KFAC):
    """F ≈ δ P ⊗ Q with tr P = tr Q = 1 and δ = tr F (Gao et al. 2021, AAAI): δ = E[‖a‖²‖g‖²], P = E[a aᵀ‖g‖²]/δ, Q =
    E[‖a‖² g gᵀ]/δ. Averages are of δP and δQ. Damping is the paper's plain one, (√δ P + √λ I) ⊗ (√δ Q + √λ I), not its
    variant for convolutions; λ is that of F, whose mean eigenvalue is δ/(d m)."""

    statistics = TKFACStatistics

    def _split(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        delta = linalg.trace(right).double()
        lam = self._damping(delta / (self.sides.m * self.sides.columns))
        shift = (delta * lam).sqrt()  # √λ on √δ P, whose √δ-fold is what is kept
        return lam, shift, shift, delta

    def dense(self, rows: Tensor) -> dict[str, Tensor]:
        """``delta`` [n], ``p`` [n, d, d], ``q`` [n, m, m]; of a layer not seen yet P = I/d, Q = I/m, δ = d m."""
        p, q = self.whole(RIGHT, rows), self.whole(LEFT, rows)
        sizes = [x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (p, q)]
        seen = self.weight[rows] > 0
        delta = torch.where(seen, sizes[0], sizes[0] * sizes[1])
        return {"delta": delta, "p": p / sizes[0][:, None, None], "q": q / sizes[1][:, None, None]}


class EKFAC(FamilyBank):
    """F ≈ (U_A ⊗ U_B) diag(s) (U_A ⊗ U_B)ᵀ, D = U_B [(U_Bᵀ G U_A) / (s + λ)] U_Aᵀ (George et al. 2018, NeurIPS): the
    eigenvectors are KFAC's, s = E[(U_Bᵀ g)² (aᵀ U_A)²] is the diagonal of F in them, so the best there is.

    s is a running average over factor steps (EKFAC-ra), taken under the basis of its time. A new basis turns it as the
    diagonal of a matrix turns, s ← (U_BᵀU_B')²ᵀ s (U_AᵀU_A')², which keeps its sum (ours); before the first estimate
    KFAC's eigenvalues stand in. λ is relative to the mean of s, or bounded; it is added to s. With factors in blocks
    the basis is that of the blocks, and s still the diagonal of the whole F. Where a factor is singular, rounding picks
    the eigenvectors: EKFAC then is the same from run to run, but not to the last digits under another split into
    micro-batches."""

    statistics = EKFACStatistics

    def _start(self) -> dict[str, Tensor]:
        (k, b), (n, c) = self.sides.left, self.sides.right
        return {
            "basis_left": self._eye(LEFT),
            "basis_right": self._eye(RIGHT),
            "moments": self.like.new_ones(self.count, k * b, n * c),
            "moments_weight": self.like.new_zeros(self.count),
        }

    def basis_of(self, name: str) -> Basis:
        """The eigenvectors, left and right [u, k, b, b]."""
        rows = slice(self.rows[name].start, self.rows[name].stop)
        return self.derived["basis_left"][rows], self.derived["basis_right"][rows]

    def average(self, rows: Tensor, fresh: Mapping[str, Tensor]) -> None:
        """Eq. 14 of each side, and of s."""
        super().average(rows, fresh)
        if "moments" not in fresh:  # the first step's, which had no basis
            return
        moments = fresh["moments"]
        moments = torch.where(moments.sum((1, 2), keepdim=True) > 0, moments, torch.nan)  # no gradient tells nothing
        old, weight = self.derived["moments"][rows], self.derived["moments_weight"][rows]
        total, new_weight = linalg.running_average(old * weight[:, None, None], moments, weight, self.config.ema_decay)
        tiny = torch.finfo(old.dtype).tiny
        mean = total / new_weight.clamp_min(tiny)[:, None, None]
        self.derived["moments"][rows] = torch.where((new_weight > 0)[:, None, None], mean, old)
        self.derived["moments_weight"][rows] = new_weight
        self._damp()

    def _damp(self) -> None:
        mean = self.derived["moments"].sum((1, 2)).double() / (self.sides.m * self.sides.columns)
        self.damping.copy_(self._damping(mean))

    def invert(self) -> None:
        turns, values, found, good = {}, {}, {}, torch.ones_like(self.weight, dtype=torch.bool)
        for side in (LEFT, RIGHT):
            own, basis, ok = eigenbasis(self._separated(side))
            turns[side] = (self.derived[f"basis_{side}"].mT @ basis).square()
            values[side] = own.clamp_min(0).flatten(1)
            found[f"basis_{side}"] = basis
            good = good & ok.all(1)
        stand_in = values[LEFT][:, :, None] * values[RIGHT][:, None, :]
        turned = linalg.apply_left(turns[LEFT].mT, linalg.apply_right(self.derived["moments"], turns[RIGHT]))
        seen = (self.derived["moments_weight"] > 0)[:, None, None]
        found["moments"] = torch.where(seen, turned, stand_in)
        size = found["moments"].sum((1, 2))
        good = good & torch.isfinite(size) & (size > 0)
        self._keep(good, found, self.condition)
        self._damp()
        s, lam = self.derived["moments"].flatten(1), self.damping
        self.condition.copy_((s.amax(1) + lam) / (s.amin(1) + lam))

    def _separated(self, side: str) -> Tensor:
        """A factor whose columns past the last have an eigenvalue of their own, below all others: at zero they would
        mix with what the factor does not see either."""
        blocks = self.blocks(side)
        blocks = (blocks + blocks.mT) * 0.5
        past = torch.arange(blocks.shape[1] * blocks.shape[2], device=blocks.device) >= self.sides.size(side)
        below = linalg.trace(blocks)[:, None, None] * past.view(blocks.shape[1:3]).to(blocks.dtype)
        blocks.diagonal(dim1=-2, dim2=-1).sub_(below)
        return blocks

    def precondition(self, grad: Tensor, rows: Tensor) -> Tensor:
        left, right = self.derived["basis_left"][rows], self.derived["basis_right"][rows]
        inside = rotate(rotate(grad, right).mT, left).mT
        tiny = torch.finfo(grad.dtype).tiny
        inside = inside / (self.derived["moments"][rows] + self.damping[rows][:, None, None]).clamp_min(tiny)
        back = linalg.apply_left(left, linalg.apply_right(inside, right.mT))
        return back[:, : self.sides.m, : self.sides.columns].contiguous()

    def dense(self, rows: Tensor) -> dict[str, Tensor]:
        """``a`` and ``b`` as KFAC's; ``basis_a`` [n, d, ·], ``basis_b`` [n, m, ·], ``moments`` s of their columns."""
        found = {"a": self.whole(RIGHT, rows), "b": self.whole(LEFT, rows)}
        for key, side in (("basis_a", RIGHT), ("basis_b", LEFT)):
            blocks = self.derived[f"basis_{side}"][rows]
            found[key] = torch.stack([torch.block_diag(*row)[: self.sides.size(side)] for row in blocks])
        return found | {"moments": self.derived["moments"][rows]}


class NGPlus(FamilyBank):
    """One-sided: D = (C + λI)⁻¹ G with C = E_n[∇_n ∇_nᵀ], or G (C + λI)⁻¹ with E_n[∇_nᵀ ∇_n] where d ≤ m (Yang et al.
    2021, arXiv:2106.07454, the generalized Fisher matrix). ∇_n is the gradient of a row of the batch, all its positions
    summed. λ is relative to tr C/dim, or bounded. The authors' code always takes the left side, adds √damping, and
    divides C of a convolution by √(positions); here the smaller side is taken, and λ carries the scale."""

    statistics = NGPlusStatistics

    def kept_sides(self) -> tuple[str, ...]:
        return (self.sides.smaller,)

    def invert(self) -> None:
        (side,) = self.kept_sides()
        blocks = self.blocks(side)
        lam = self._damping(self._mean(blocks, side)).to(blocks.dtype)
        self.damping.copy_(lam)
        value, ok, condition = linalg.inverse(linalg.add_damping(blocks, lam[:, None].expand(-1, blocks.shape[1])))
        self._keep(ok.all(1), {f"inverse_{side}": linalg.pack(value)}, condition.amax(1))

    def precondition(self, grad: Tensor, rows: Tensor) -> Tensor:
        (side,) = self.kept_sides()
        blocks = self.inverse_of(side, rows)
        return linalg.apply_left(blocks, grad) if side == LEFT else linalg.apply_right(grad, blocks)

    def dense(self, rows: Tensor) -> dict[str, Tensor]:
        """C as ``left`` [n, m, m] or ``right`` [n, d, d]."""
        return {side: self.whole(side, rows) for side in self.kept_sides()}


_FAMILIES: dict[str, type[FamilyBank]] = {"kfac": KFAC, "ekfac": EKFAC, "tkfac": TKFAC, "ng+": NGPlus}


def family_banks(specs: Sequence[FactorSpec], config: LNGDConfig) -> list[Bank]:
    """The banks of a family, one for each shape, device and dtype."""
    keyed: dict[Any, list[FactorSpec]] = {}
    for spec in specs:
        sides = Sides.of(spec.layer, config.max_factor_dim)
        keyed.setdefault((sides, spec.layer.weight.device, spec.layer.like.dtype), []).append(spec)
    return [_FAMILIES[config.family](own, key[0], config, own[0].layer.like) for key, own in keyed.items()]


def new_statistics(layer: Layer, group: Group, config: LNGDConfig, basis: Basis | None) -> Statistics:
    """Empty statistics for a factor step of a group, of any family; `basis`: of its bank."""
    if config.family != "lngd":
        return _FAMILIES[config.family].statistics(Sides.of(layer, config.max_factor_dim), layer.units, basis)
    blocks = factor_blocks(layer, config.max_factor_dim)
    if estimates_psi(group.follows, config.fisher):
        return WeightedStatistics(layer.units, blocks, layer.m)
    return InputStatistics(layer.units, blocks)


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues [..., n], ascending, and eigenvectors [..., n, n] in columns of symmetric matrices, ok [...] (False:
    they are not to be used); waits for the device. Single precision fails now and then where many eigenvalues are zero,
    and may not say so: the vectors are NaN. Such a matrix is tried again in float64."""
    finite = torch.isfinite(matrix.flatten(-2)).all(-1)
    # LAPACK refuses the whole batch for one bad matrix
    safe = torch.where(finite[..., None, None], matrix, linalg.eye_like(matrix))
    values, vectors, ok = _eigh(safe)
    if matrix.dtype != torch.float64 and not matrix.is_meta and not bool(ok.all()):
        bad = ~ok
        again, again_vectors, ok[bad] = _eigh(safe[bad].double())
        values[bad], vectors[bad] = again.to(matrix.dtype), again_vectors.to(matrix.dtype)
    return values, vectors, finite & ok


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        nothing = torch.zeros(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
        return torch.ones_like(matrix[..., 0]), matrix.clone(), nothing
    return values, vectors, torch.isfinite(vectors.flatten(-2)).all(-1)
