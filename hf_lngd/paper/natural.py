"""The paper's direction: D = Ψ̂⁻¹ G Φ̂⁻¹ with Φ = E[a aᵀ ‖g‖²] and the diagonal Ψ = E[‖a‖² g²] / E[‖a‖² ‖g‖²] (Eq. 4,
5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..config import LNGDConfig
from ..directions import Inputs, of_units
from ..factors import Bank, FactorBank, FactorSpec, factor_banks
from ..layers import Layer
from ..linalg import damping, input_statistic, rms_rate, running_average, trace
from ..statistics import InputStatistics, exact


class WeightedStatistics(InputStatistics):
    """Σ_t a_t a_tᵀ ‖g_t‖² as ``phi`` [u, k, b, b] and Σ_t ‖a_t‖² g_t² as ``psi`` [u, m]; m outputs of a matrix."""

    def __init__(self, units: int, blocks: tuple[int, int], m: int) -> None:
        super().__init__(units, blocks)
        self._m = m

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return super().shapes() | {"psi": (self.units, self._m)}

    def add(self, a: Tensor, mask: Tensor | None, g2: Tensor) -> None:  # type: ignore[override]
        """Add some tokens: a [u, N, d], mask [N] or None, g2 [u, N, m]."""
        with exact(a):
            g2 = g2.to(a.dtype) if mask is None else g2.to(a.dtype) * mask.to(a.dtype)[:, None]
            count = a.new_full((), a.shape[-2]) if mask is None else mask.to(a.dtype).sum()
            phi = input_statistic(a, g2.sum(-1), *self.blocks)
            self.accumulate([("phi", phi), ("psi", output_statistic(a, g2))], count)

    def add_gradient(self, a: Tensor, g: Tensor, mask: Tensor | None, per_sample: int) -> None:
        """Add some tokens with the gradients of a loss, g [u, N, m]."""
        self.add(a, mask, g.square())

    def factors(self, scale: Tensor | float | None) -> dict[str, Tensor]:
        """Φ and Ψ with tr Ψ = 1."""
        assert self.n is not None
        s = self.sums["phi"]
        size, v = trace(s)[:, None], self.sums["psi"]
        psi = torch.where(size > 0, v / size, 1.0 / self._m)  # of a matrix whose inputs or gradients are all zero
        psi = torch.where(torch.isfinite(size), psi, torch.nan)  # it may overflow where Ψ's sums do not
        return {"phi": s / self.n if scale is None else s * (scale * self.scale_of_samples), "psi": psi}


def output_statistic(a: Tensor, g2: Tensor) -> Tensor:
    """v = Σ_t ‖a_t‖² g_t² (numerator of Eq. 5): a [..., N, d], g2 [..., N, m] (zero where masked) → [..., m]."""
    return (a.square().sum(-1).unsqueeze(-2) @ g2).squeeze(-2)


def psi_inverse(psi: Tensor, rho: float | str, bounds: tuple[float, float]) -> Tensor:
    """(Ψ + λ_Ψ)⁻¹ of a diagonal Ψ: [..., m] → [..., m]. λ_Ψ from tr Ψ/m as for Φ."""
    return 1.0 / (psi + damping(psi.mean(-1), rho, bounds).unsqueeze(-1))


def estimates_psi(follows: Sequence[str], fisher: str) -> bool:
    """Whether g² is anything but one at every token, so that Ψ has to be estimated."""
    return bool(follows) or fisher != "expected"


class PsiBank(FactorBank):
    """Φ and Ψ of groups with one m."""

    has_psi = True

    def __init__(
        self, specs: Sequence[FactorSpec], blocks: tuple[int, int], kind: str, config: LNGDConfig, like: Tensor
    ) -> None:
        super().__init__(specs, blocks, kind, config, like)
        self.psi = like.new_zeros(self.count, specs[0].layer.m)

    def average(self, rows: Tensor, fresh: Mapping[str, Tensor]) -> None:
        """Eq. 14 of Φ [n, k, b, b] and Ψ [n, m]."""
        self.psi[rows], _ = running_average(self.psi[rows], fresh["psi"], self.weight[rows], self.config.ema_decay)
        super().average(rows, fresh)

    def dense_psi(self, rows: Tensor) -> Tensor:
        """Ψ, bias-corrected and undamped, [n, m]; 1/m where it was not seen yet."""
        psi, weight = self.psi[rows], self.weight[rows][:, None]
        uniform = torch.full_like(psi, 1.0 / psi.shape[1])
        return torch.where(weight > 0, psi / weight.clamp_min(torch.finfo(weight.dtype).tiny), uniform)

    def tensors(self) -> dict[str, Tensor]:
        return {"psi": self.psi} | super().tensors()


def banks(specs: Sequence[FactorSpec], kind: str, config: LNGDConfig) -> list[Bank]:
    """Banks of Φ, with Ψ where it is estimated."""
    psi = [spec for spec in specs if estimates_psi(spec.follows, config.fisher)]
    plain = [spec for spec in specs if not estimates_psi(spec.follows, config.fisher)]
    return factor_banks(plain, kind, config) + factor_banks(psi, kind, config, PsiBank)


class Natural:
    """D = Ψ̂⁻¹ G Φ̂⁻¹, or what another family has in its place."""

    factor = "inverse"

    def __init__(self, config: LNGDConfig) -> None:
        self.config = config

    def new_state(self, layer: Layer) -> dict[str, Tensor]:
        return {}

    def _psi(self, bank: Bank, rows: Tensor, m: int) -> tuple[Tensor, float]:
        """Ψ [n, m] of a bank's rows, and by what its Φ has to be multiplied."""
        if isinstance(bank, PsiBank):
            return bank.dense_psi(rows), 1.0
        return bank.weight.new_full((len(rows), m), 1.0 / m), float(m)

    def factors(self, layer: Layer, bank: Bank, rows: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``phi`` [u, d, d] and ``psi`` [u, m]; other families' own."""
        found = bank.dense(rows)
        if self.config.family != "lngd":
            return found
        psi, scale = self._psi(bank, rows, layer.m)
        return {"phi": found["phi"] * scale, "psi": psi}

    def __call__(self, x: Inputs) -> tuple[Tensor, Tensor | None]:
        c, n = self.config, len(x.layers)
        direction = x.bank.precondition(x.gradient, x.rows)
        if c.family == "lngd":
            psi, scale = self._psi(x.bank, x.rows, direction.shape[1])
            inverse = psi_inverse(psi, c.damping, c.damping_bounds) / scale  # E[a aᵀ] was inverted
            direction = direction.mul_(inverse.unsqueeze(-1))
        if c.rate == "adaptive":
            return direction, None
        rate = direction.new_ones(n)
        if c.rate == "rms":
            whole = direction.reshape(n, -1)
            rate = rms_rate(torch.linalg.vector_norm(whole, dim=-1), whole.shape[1], c.rate_scale)
        return direction.mul_(of_units(rate * x.lr, x.units)[:, None, None]), rate
