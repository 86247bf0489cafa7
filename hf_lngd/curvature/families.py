"""KFAC, EKFAC, TKFAC and NG+: other approximations of a layer's Fisher block F, behind the interface of LNGD's.

A family is a bank (see `Bank`): it names the sums that a factor step pools, takes them into its running averages
(`update`), inverts what is due (`refresh`) and multiplies gradients by the inverse (`precondition`). All is batched
over the layers of one shape. Capture, damping settings, intervals, momentum, rates and state are LNGD's own.

Left is the side of a matrix's m outputs, right that of its d inputs (with the bias, where it is in the factor). Both
are cut into k diagonal blocks past `max_factor_dim`. Averages are undamped (Eq. 14 of the LNGD paper), corrected for
their start; only what is inverted is damped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..config import LNGDConfig
from ..placement import Speed
from .factor_bank import Bank, FactorSpec, averaged, index_tensor
from .factors import add_damping, apply_left, apply_right, damping, running_average, trace
from .family_sums import Basis, EKFACSums, FamilySums, KFACSums, NGPlusSums, TKFACSums, rotate
from .inverses import eigenbasis, inverse, pack, unpack
from .layers import LEFT, RIGHT, Layer, Sides, factor_blocks, sides_of
from .patches import MIB_OF_FLOATS
from .rounding import Draws
from .sums import GroupSums


def _along(flags: Tensor, value: Tensor) -> Tensor:
    """[n] in the shape of a value [n, ...]."""
    return flags.view(-1, *[1] * (value.dim() - 1))


class FamilyBank(Bank):
    """Curvature of L layers with one shape, none of them shared.

    Args:
        specs: the layers.
        sides: their shape and how it is cut.
        offsets: step within an interval at which each layer is inverted.
        config: damping, intervals.
        like: a tensor with the device and dtype of the state.
    """

    sums: ClassVar[type[FamilySums]]

    def __init__(
        self, specs: list[FactorSpec], sides: Sides, offsets: list[int], config: LNGDConfig, like: Tensor
    ) -> None:
        super().__init__(specs, offsets, config, like)
        self.sides, self.like = sides, like
        self.averages = {side: self._new_average(*sides.blocks(side)) for side in self.kept_sides()}
        self.derived = self._start()

    def kept_sides(self) -> tuple[str, ...]:
        """The sides that there is a factor of."""
        return (LEFT, RIGHT)

    def _eye(self, side: str) -> Tensor:
        k, b = self.sides.blocks(side)
        return torch.eye(b, dtype=self.like.dtype, device=self.like.device).repeat(self.count, k, 1, 1)

    def _start(self) -> dict[str, Tensor]:
        """What is derived from the averages, as it is before: D = G."""
        return {f"inverse_{side}": pack(self._eye(side)) for side in self.kept_sides()}

    # Update

    def update(self, new: Mapping[str, dict[str, Tensor]], seen: Mapping[str, Tensor], draws: Draws) -> None:
        """Eq. 14 with the statistics of one step: layer → statistic → [u, ...]. If one of a row is not finite, none
        of the row's is used."""
        names = [name for name in new if name in self.rows]
        if not names:
            return
        fresh = {key: torch.cat([new[name][key].to(self.like.dtype) for name in names]) for key in new[names[0]]}
        valid = torch.stack([torch.isfinite(value.flatten(1)).all(1) for value in fresh.values()]).all(0)
        fresh = {key: torch.where(_along(valid, value), value, torch.nan) for key, value in fresh.items()}
        self._count_skipped(valid, names, seen)
        rows = index_tensor(self.rows_of(names), self.weight.device)
        old_weight = self.weight[rows]
        for side in self.kept_sides():
            self.weight[rows] = self._average(self.averages[side], rows, pack(fresh[side]), old_weight, draws)
        self._take(rows, fresh)

    def _take(self, rows: Tensor, fresh: dict[str, Tensor]) -> None:
        """Statistics other than those of the sides."""

    def dense(self, side: str, rows: Tensor) -> Tensor:
        """A side's running average, undamped: [n, k, b, b]; the identity for a layer not seen yet."""
        return averaged(self.averages[side][rows], self.weight[rows], self.sides.blocks(side)[1])

    def whole(self, side: str, rows: Tensor) -> Tensor:
        """The same as matrices [n, size, size], zero outside the blocks."""
        size = self.sides.size(side)
        return torch.stack([torch.block_diag(*row)[:size, :size] for row in self.dense(side, rows)])

    # Invert

    def _mean(self, blocks: Tensor, side: str) -> Tensor:
        """Mean eigenvalue of each row, in float64: products of two of them leave the range of float32."""
        return trace(blocks).double() / self.sides.size(side)

    def _damping(self, mean: Tensor) -> Tensor:
        """λ of F itself, from the mean eigenvalue that the family gives it."""
        c = self.config
        return damping(mean, c.damping, c.damping_rho, c.damping_min, c.damping_max)

    def _keep(self, rows: Tensor, good: Tensor, found: dict[str, Tensor], condition: Tensor) -> None:
        """Take what was derived where all of it is good; a failed row keeps the last."""
        for name, value in found.items():
            store = self.derived[name]
            store[rows] = torch.where(_along(good, value), value, store[rows])
        self.condition[rows] = torch.where(good, condition.to(self.condition.dtype), self.condition[rows])
        self.failures += (~good).sum()

    def seconds(self, speed: Speed) -> float:
        """What a row's inverses cost, roughly."""
        return sum(k * b**3 for k, b in map(self.sides.blocks, self.kept_sides())) / self._rate(speed)

    def _rate(self, speed: Speed) -> float:
        return speed.cholesky

    # What it tells

    def factors(self, rows: Tensor) -> dict[str, Tensor]:
        """The family's factors of these rows, dense, undamped, each [n, ...]; see `LNGD.factors`."""
        raise NotImplementedError

    def basis_of(self, name: str) -> Basis | None:
        """The coordinates in which a layer's coming sums are wanted, left and right [u, k, b, b]; None: its own."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, with a row of each unit of each layer in the first dimension."""
        return self.averages | {"weight": self.weight} | super().tensors()


class KFAC(FamilyBank):
    """F ≈ A ⊗ B, D = B̂⁻¹ G Â⁻¹, A = E[a aᵀ], B = E[g gᵀ] (Martens & Grosse 2015, ICML; positions are the samples, as
    in KFC, Grosse & Martens 2016).

    Damping is factored (§6.3): Â = A + πγ I, B̂ = B + γ/π I with γ² = λ and π² = (tr A/d) / (tr B/m). λ is that of F,
    whose mean eigenvalue is tr A · tr B / (d m); ``relative`` gives λ_A = √ρ tr A/d and λ_B = √ρ tr B/m.
    """

    sums: ClassVar[type[FamilySums]] = KFACSums

    def _refresh(self, rows: Tensor) -> None:
        left, right = self.dense(LEFT, rows), self.dense(RIGHT, rows)
        lam, on_left, on_right, gain = self._split(left, right)
        self.damping[rows] = lam.to(self.damping.dtype)
        inverses, good, condition = {}, torch.ones_like(lam, dtype=torch.bool), torch.ones_like(lam)
        for side, blocks, shift in ((LEFT, left, on_left), (RIGHT, right, on_right)):
            shift = shift.to(blocks.dtype)[:, None].expand(-1, blocks.shape[1])
            value, ok, own = inverse(add_damping(blocks, shift))
            if side == LEFT:
                value = value * gain.to(value.dtype)[:, None, None, None]
            inverses[f"inverse_{side}"] = pack(value)
            good, condition = good & ok.all(1) & torch.isfinite(value.flatten(1)).all(1), condition * own.amax(1)
        self._keep(rows, good, inverses, condition)

    def _split(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """λ of F, its parts on the left and on the right, and δ of F = left ⊗ right / δ; each [n] in float64."""
        on_left, on_right = self._mean(left, LEFT), self._mean(right, RIGHT)
        lam = self._damping(on_left * on_right)
        pi = (on_right / on_left).sqrt()
        return lam, lam.sqrt() / pi, lam.sqrt() * pi, torch.ones_like(lam)

    def precondition(self, grad: Tensor, rows: Tensor) -> Tensor:
        """B̂⁻¹ G Â⁻¹."""
        right = unpack(self.derived["inverse_right"][rows], self.sides.right[1])
        left = unpack(self.derived["inverse_left"][rows], self.sides.left[1])
        return apply_left(left, apply_right(grad, right))

    def factors(self, rows: Tensor) -> dict[str, Tensor]:
        """``a`` = A [n, d, d], ``b`` = B [n, m, m]."""
        return {"a": self.whole(RIGHT, rows), "b": self.whole(LEFT, rows)}


class TKFAC(KFAC):
    """F ≈ δ P ⊗ Q with tr P = tr Q = 1 and δ = tr F (Gao et al. 2021, AAAI): δ = E[‖a‖²‖g‖²], P = E[a aᵀ‖g‖²]/δ,
    Q = E[‖a‖² g gᵀ]/δ. Averages are of δP and δQ.

    Damping is the paper's plain one, (√δ P + √λ I) ⊗ (√δ Q + √λ I), not its variant for convolutions; λ is that of F,
    whose mean eigenvalue is δ/(d m).
    """

    sums = TKFACSums

    def _split(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        delta = trace(right).double()
        lam = self._damping(delta / (self.sides.m * self.sides.columns))
        shift = (delta * lam).sqrt()  # √λ on √δ P, whose √δ-fold is what is kept
        return lam, shift, shift, delta

    def factors(self, rows: Tensor) -> dict[str, Tensor]:
        """``delta`` [n], ``p`` [n, d, d], ``q`` [n, m, m]; of a layer not seen yet P = I/d, Q = I/m, δ = d m."""
        p, q = self.whole(RIGHT, rows), self.whole(LEFT, rows)
        sizes = [x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (p, q)]
        seen = self.weight[rows] > 0
        delta = torch.where(seen, sizes[0], sizes[0] * sizes[1])
        return {"delta": delta, "p": p / sizes[0][:, None, None], "q": q / sizes[1][:, None, None]}


class EKFAC(FamilyBank):
    """F ≈ (U_A ⊗ U_B) diag(s) (U_A ⊗ U_B)ᵀ, D = U_B [(U_Bᵀ G U_A) / (s + λ)] U_Aᵀ (George et al. 2018, NeurIPS): the
    eigenvectors are KFAC's, s = E[(U_Bᵀ g)² (aᵀ U_A)²] is the diagonal of F in them, so the best there is.

    s is a running average over factor steps (the paper's EKFAC-ra), taken under the basis of its time. A new basis
    turns it as the diagonal of a matrix turns, s ← (U_BᵀU_B')²ᵀ s (U_AᵀU_A')², which keeps its sum (ours); before the
    first estimate KFAC's eigenvalues stand in. λ is relative to the mean of s, or bounded; it is added to s.
    With factors in blocks the basis is that of the blocks, and s still the diagonal of the whole F. Where a factor is
    singular, rounding picks the eigenvectors: unlike the others, EKFAC then is the same from run to run, but not to the
    last digits under another split into micro-batches.
    """

    sums = EKFACSums

    def _start(self) -> dict[str, Tensor]:
        (k, b), (n, c) = self.sides.left, self.sides.right
        return {
            "basis_left": self._eye(LEFT),
            "basis_right": self._eye(RIGHT),
            "moments": self.like.new_ones(self.count, k * b, n * c),
            "moments_weight": self.like.new_zeros(self.count),
        }

    def _rate(self, speed: Speed) -> float:
        return speed.eigh

    def basis_of(self, name: str) -> Basis | None:
        """The eigenvectors, once there are any."""
        rows = slice(self.rows[name].start, self.rows[name].stop)
        return (self.derived["basis_left"][rows], self.derived["basis_right"][rows]) if self.inverted else None

    def _take(self, rows: Tensor, fresh: dict[str, Tensor]) -> None:
        if "moments" not in fresh:  # the first step's, which had no basis
            return
        moments = fresh["moments"]
        moments = torch.where(moments.sum((1, 2), keepdim=True) > 0, moments, torch.nan)  # no gradient tells nothing
        old, weight = self.derived["moments"][rows], self.derived["moments_weight"][rows]
        total, new_weight = running_average(old * weight[:, None, None], moments, weight, self.config.ema_decay)
        tiny = torch.finfo(old.dtype).tiny
        mean = total / new_weight.clamp_min(tiny)[:, None, None]
        self.derived["moments"][rows] = torch.where((new_weight > 0)[:, None, None], mean, old)
        self.derived["moments_weight"][rows] = new_weight
        self._damp(rows)

    def _damp(self, rows: Tensor) -> None:
        s = self.derived["moments"][rows]
        mean = s.sum((1, 2)).double() / (self.sides.m * self.sides.columns)
        self.damping[rows] = self._damping(mean).to(self.damping.dtype)

    def _refresh(self, rows: Tensor) -> None:
        turns, values, found, good = {}, {}, {}, torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        for side in (LEFT, RIGHT):
            own, basis, ok = eigenbasis(self._separated(side, rows))
            turns[side] = (self.derived[f"basis_{side}"][rows].mT @ basis).square()
            values[side] = own.clamp_min(0).flatten(1)
            found[f"basis_{side}"] = basis
            good = good & ok.all(1)
        stand_in = values[LEFT][:, :, None] * values[RIGHT][:, None, :]
        old = self.derived["moments"][rows]
        turned = apply_left(turns[LEFT].mT, apply_right(old, turns[RIGHT]))
        seen = (self.derived["moments_weight"][rows] > 0)[:, None, None]
        found["moments"] = torch.where(seen, turned, stand_in)
        size = found["moments"].sum((1, 2))
        good = good & torch.isfinite(size) & (size > 0)
        self._keep(rows, good, found, self.condition[rows])
        self._damp(rows)
        s, lam = self.derived["moments"][rows].flatten(1), self.damping[rows]
        self.condition[rows] = (s.amax(1) + lam) / (s.amin(1) + lam)

    def _separated(self, side: str, rows: Tensor) -> Tensor:
        """A factor whose columns past the last have an eigenvalue of their own, below all others: at zero they would
        mix with what the factor does not see either."""
        blocks = self.dense(side, rows)
        blocks = (blocks + blocks.mT) * 0.5
        past = torch.arange(blocks.shape[1] * blocks.shape[2], device=rows.device) >= self.sides.size(side)
        below = trace(blocks)[:, None, None] * past.view(blocks.shape[1:3]).to(blocks.dtype)
        blocks.diagonal(dim1=-2, dim2=-1).sub_(below)
        return blocks

    def precondition(self, grad: Tensor, rows: Tensor) -> Tensor:
        """U_B [(U_Bᵀ G U_A) / (s + λ)] U_Aᵀ."""
        left, right = self.derived["basis_left"][rows], self.derived["basis_right"][rows]
        inside = rotate(rotate(grad, right).mT, left).mT
        tiny = torch.finfo(grad.dtype).tiny
        inside = inside / (self.derived["moments"][rows] + self.damping[rows][:, None, None]).clamp_min(tiny)
        back = apply_left(left, apply_right(inside, right.mT))
        return back[:, : self.sides.m, : self.sides.columns].contiguous()

    def factors(self, rows: Tensor) -> dict[str, Tensor]:
        """``a`` and ``b`` as KFAC's; ``basis_a`` [n, d, ·], ``basis_b`` [n, m, ·], ``moments`` s of their columns."""
        bases = {
            key: torch.stack([torch.block_diag(*row)[: self.sides.size(side)] for row in self.derived[name][rows]])
            for key, name, side in (("basis_a", "basis_right", RIGHT), ("basis_b", "basis_left", LEFT))
        }
        moments = {"moments": self.derived["moments"][rows]}
        return {"a": self.whole(RIGHT, rows), "b": self.whole(LEFT, rows)} | bases | moments


class NGPlus(FamilyBank):
    """One-sided: D = (C + λI)⁻¹ G with C = E_n[∇_n ∇_nᵀ], or G (C + λI)⁻¹ with E_n[∇_nᵀ ∇_n] where d ≤ m (Yang et al.
    2021, arXiv:2106.07454, the generalized Fisher matrix). ∇_n is the gradient of a row of the batch, all its positions
    summed. λ is relative to tr C/dim, or bounded.

    The authors' code always takes the left side, adds √damping, and divides C of a convolution by √(positions); here
    the smaller side is taken, and λ carries the scale.
    """

    sums = NGPlusSums

    def kept_sides(self) -> tuple[str, ...]:
        """The smaller one."""
        return (self.sides.smaller,)

    def _refresh(self, rows: Tensor) -> None:
        (side,) = self.kept_sides()
        blocks = self.dense(side, rows)
        lam = self._damping(self._mean(blocks, side)).to(blocks.dtype)
        self.damping[rows] = lam
        value, ok, condition = inverse(add_damping(blocks, lam[:, None].expand(-1, blocks.shape[1])))
        self._keep(rows, ok.all(1), {f"inverse_{side}": pack(value)}, condition.amax(1))

    def precondition(self, grad: Tensor, rows: Tensor) -> Tensor:
        """Ĉ⁻¹ G or G Ĉ⁻¹."""
        (side,) = self.kept_sides()
        blocks = unpack(self.derived[f"inverse_{side}"][rows], self.sides.blocks(side)[1])
        return apply_left(blocks, grad) if side == LEFT else apply_right(grad, blocks)

    def factors(self, rows: Tensor) -> dict[str, Tensor]:
        """C as ``left`` [n, m, m] or ``right`` [n, d, d]."""
        return {side: self.whole(side, rows) for side in self.kept_sides()}


# Value of the field `family` → its bank; LNGD's are `FactorBank` and the Ψ of `LayerBank`.
FAMILIES: dict[str, type[FamilyBank]] = {"kfac": KFAC, "ekfac": EKFAC, "tkfac": TKFAC, "ng+": NGPlus}


def new_sums(members: list[Layer], config: LNGDConfig, basis: Basis | None, estimated: bool) -> GroupSums | FamilySums:
    """Empty sums for a factor step of these layers, which share a factor; other families than LNGD share none.

    Args:
        basis: of the family's bank, see `FamilyBank.basis_of`.
        estimated: Ψ is, see `Group.estimates_psi`.
    """
    first = members[0]
    if config.family == "lngd":
        shape = (first.units, first.out_features if estimated else None)
        return GroupSums(factor_blocks(members, config.max_factor_dim), *shape)
    most = config.conv_memory * MIB_OF_FLOATS
    return FAMILIES[config.family].sums(sides_of(first, config.max_factor_dim), first.units, most, basis)
