"""One step of many layers of the same shape at once: momentum, direction, rate.

A bank holds the layers with one weight shape, one layout of Φ and one device; their momenta are one tensor, so that
each operation below is one call for all of them. A layer with several matrices (a grouped convolution: its units) has
a row for each; what is a layer's and not a matrix's (its rate) is taken over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import LNGDConfig
from .factor_bank import Bank, FactorBank, index_tensor
from .factors import (
    adaptive_rate,
    apply_right,
    normalized,
    orthogonalize,
    psi_inverse,
    quadratic_form,
    rms_rate,
    running_average,
    trust_rate,
)
from .inverses import inverse_sqrt, pack, packed_shape, unpack, uses_newton
from .layers import Layer
from .owners import Owners
from .pooling import Pool, pool_curvature, usable
from .precision import product_dtype, root_dtype
from .sums import RowSamples

# Added to the Gram matrix of mean eigenvalue 1 before its root is taken: what the polar factor does to directions
# that carry less than a thousandth of the mean is noise.
GRAM_SHIFT = 1e-3


def gram_side(m: int, columns: int) -> str:
    """Where the Gram matrix of an m × d layer stands: on its smaller side."""
    return "right" if columns <= m else "left"


# The interval between two roots grows by one each so many steps (`early_factors`).
POLAR_RAMP = 8


def polar_interval(step: int, n: int, config: LNGDConfig) -> int:
    """Steps between two inverse roots of an n × n Gram matrix, at this step: an untrained model changes fast."""
    settled = config.polar_interval
    if isinstance(settled, str):
        settled = 4 if n <= 128 else 8
    return max(1, min(settled, step // POLAR_RAMP)) if config.early_factors else settled


class LayerBank:
    """State and step of L layers with one shape.

    Args:
        members: the layers of all ranks.
        factors: the bank that holds their Φ, or all of their curvature where the family is not LNGD.
        rows: [L · u], the rows of `factors` that belong to the matrices of each layer that this rank keeps.
        estimate_psi: Ψ is estimated (the layers feed an activation, or g² is drawn), else it is 1/m throughout.
        offset: number of layers in the banks before: staggers the recomputed roots over all banks.
        config: the optimizer's.
        like: a tensor with the device and dtype of the state.
        pool: the processes that train the model.
        owners: which rank keeps which layer; None: each keeps all.
    """

    def __init__(
        self,
        members: list[Layer],
        factors: Bank,
        rows: Tensor,
        estimate_psi: bool,
        offset: int,
        config: LNGDConfig,
        like: Tensor,
        pool: Pool,
        owners: Owners | None = None,
    ) -> None:
        self.pool, self.owners = pool, owners
        self.members, self.factors, self.rows, self.config = members, factors, rows, config
        kept = [i for i, layer in enumerate(members) if owners is None or owners.has_layer(layer.name)]
        layers = self.layers = [members[i] for i in kept]
        self._turns = [offset + i for i in kept]
        first = members[0]
        self.m, self.columns, self.units = first.out_features, first.columns, first.units
        # Φ = m·E[a aᵀ] where φ' = 1, and what layers share is E[a aᵀ]
        self.scale = 1.0 if estimate_psi else float(self.m)
        count = len(layers) * self.units
        self.momentum = like.new_zeros(count, self.m, self.columns)
        self.psi = like.new_zeros(count, self.m) if estimate_psi else None
        self.psi_weight = like.new_zeros(count) if estimate_psi else None
        self.rate = like.new_zeros(len(layers))
        self.row_square = like.new_zeros(count, self.m) if config.row_decay and config.direction != "natural" else None
        self.failures = torch.zeros((), dtype=torch.int64, device=like.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=like.device)  # gradients that were not finite
        self._product_dtype = product_dtype(config, like.dtype, like.device)
        self.side = gram_side(self.m, self.columns)
        self.gram: Tensor | None = None
        self.polar: Tensor | None = None
        self.started = False
        if config.direction == "gram":
            n = self.columns if self.side == "right" else self.m
            self.gram = like.new_zeros(count, *packed_shape(n))
            self.polar = torch.eye(n, dtype=root_dtype(config, like.dtype), device=like.device).repeat(count, 1, 1)
            self._n = n

    @property
    def _phi(self) -> FactorBank:
        """The bank of Φ: what LNGD's own directions and rates take apart."""
        assert isinstance(self.factors, FactorBank)
        return self.factors

    # Ψ

    def update_psi(self, new: dict[str, Tensor]) -> None:
        """Eq. 14 for Ψ: layer → [u, m], trace 1."""
        if self.psi is None or self.psi_weight is None:
            return
        seen = [i for i, layer in enumerate(self.layers) if layer.name in new]
        if seen:
            fresh = torch.cat([new[self.layers[i].name].to(self.psi.dtype) for i in seen])
            rows = self.rows_of(seen)
            self.psi[rows], self.psi_weight[rows] = running_average(
                self.psi[rows], fresh, self.psi_weight[rows], self.config.ema_decay
            )

    def rows_of(self, layers: list[int]) -> Tensor:
        """The rows of these layers' matrices, one after the other."""
        rows = tuple(i * self.units + j for i in layers for j in range(self.units))
        return index_tensor(rows, self.momentum.device)

    def dense_psi(self, index: Tensor | slice) -> Tensor:
        """Ψ, bias-corrected and undamped: [n, m]; 1/m where it is not estimated or not seen yet."""
        count = self.momentum[index].shape[0]
        uniform = self.momentum.new_full((count, self.m), 1.0 / self.m)
        if self.psi is None or self.psi_weight is None:
            return uniform
        weight = self.psi_weight[index][:, None]
        return torch.where(weight > 0, self.psi[index] / weight.clamp_min(torch.finfo(weight.dtype).tiny), uniform)

    # The step

    def update(self, grad: Tensor, present: list[int], lr: float | Tensor, step: int, samples: dict[str, RowSamples],
               terms: Tensor | float) -> Sequence[Tensor]:  # fmt: skip
        """What is to be subtracted from the layers `present` (those with a gradient): a [u, m, columns] each.

        Args:
            grad: their gradients, [n · u, m, columns]; may be written to.
            present: indices of layers.
            lr: α of Algorithm 1.
            samples: rows for Eq. 12-13, by layer.
            terms: T, with which Σ q² over all rows becomes DᵀFD.
        """
        whole = len(present) == len(self.layers)
        index: slice | Tensor = slice(None) if whole else self.rows_of(present)
        average = self.config.momentum_on == "gradient"
        grad, bad = usable(grad)
        self.skipped += bad
        if average:
            grad = self._averaged_gradient(grad, index)
        direction = self.direction(grad, present, index, step)
        scale: Tensor | None = None  # of rows: with the rate in one pass over D, where the rate needs but their sizes
        if self.row_square is not None:
            sizes = torch.linalg.vector_norm(direction, dim=-1) / self.columns**0.5
            scale = self._row_scale(sizes, index)
            if self.config.rate != "rms":
                direction.mul_(scale.unsqueeze(-1))
                scale = None
        if scale is None:
            rate = self._rate(direction, grad, present, index, samples, terms)
        else:
            rate = rms_rate((sizes * scale).view(len(present), -1, 1), self.config.rate_scale)
        factor = (rate * lr).repeat_interleave(self.units)[:, None]
        factor = factor if scale is None else scale * factor
        if whole:
            self.rate.copy_(rate)
        else:
            self.rate[index_tensor(tuple(present), rate.device)] = rate
        update = direction.mul_(factor.unsqueeze(-1))
        if not average:
            update = self._averaged_update(update, index)
        return update.unflatten(0, (-1, self.units)).unbind(0)

    def direction(self, grad: Tensor, present: list[int], index: slice | Tensor, step: int) -> Tensor:
        """D of these layers: grad [n · u, m, d] → the same. May recompute the roots of ``gram`` that are due."""
        c, rows = self.config, self.rows[index]
        if c.direction == "natural":
            direction = self.factors.precondition(grad, rows)
            if c.family != "lngd":
                return direction
            psi_inv = psi_inverse(self.dense_psi(index), c.damping, c.damping_rho, c.damping_min, c.damping_max)
            psi_inv = psi_inv / self.scale  # what is inverted is E[a aᵀ], see `scale`
            return direction.mul_(psi_inv.unsqueeze(-1))
        if c.direction == "polar":
            # any V with VᵀV = Φ̂⁻¹ does: the polar factor of G Vᵀ turns with V, and the last product turns it back
            whitener = self._phi.get("whitener", rows, self._product_dtype)
            white = apply_right(grad.to(whitener.dtype), whitener.mT)
            return apply_right(orthogonalize(white), whitener).to(grad.dtype)
        self._refresh_polar(grad, present, step)
        assert self.polar is not None
        polar = self.polar[index].to(self._product_dtype)
        grad = grad.to(polar.dtype)
        if self.side == "left":
            grad = apply_right(grad, self._phi.get("inverse", rows).to(polar.dtype))
        return (grad @ polar if self.side == "right" else polar @ grad).to(self.momentum.dtype)

    def _row_scale(self, sizes: Tensor, index: slice | Tensor) -> Tensor:
        """One over the root of the running mean square of each row of D (Li et al. 2025, NorMuon); its start-up bias
        cancels in the layer's rate. sizes: the rows' root mean squares, [n · u, m] → the same."""
        assert self.row_square is not None
        average = self.row_square[index].lerp(sizes.square(), 1 - self.config.row_decay)
        self.row_square[index] = average
        return (average + torch.finfo(average.dtype).tiny).rsqrt()

    def _refresh_polar(self, grad: Tensor, present: list[int], step: int) -> None:
        """``gram``: average the whitened Gram matrix of the layers whose turn it is, take its inverse root."""
        assert self.gram is not None and self.polar is not None
        r = polar_interval(step, self._n, self.config)
        turn = [row for row, i in enumerate(present) if not self.started or (self._turns[i] - step) % r == 0]
        self.started = True
        if not turn:
            return
        due = self.rows_of(turn)
        chosen = self.rows_of([present[row] for row in turn])
        # eigh passes over the small negative eigenvalues that half precision brings, Newton's iteration does not
        full = self.gram.dtype
        low = full if uses_newton(self.config.inverse_root, grad.device) else self._product_dtype
        x, rows = grad[due].to(low), self.rows[chosen]
        whitener = self._phi.get("root" if self.side == "right" else "inverse", rows).to(low)
        white = apply_right(x, whitener)
        fresh = (white.mT @ white if self.side == "right" else white @ x.mT).to(full)
        size = fresh.diagonal(dim1=-2, dim2=-1).sum(-1)
        old = unpack(self.gram[chosen], self._n)
        started = old.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
        decay = started[:, None, None].to(full) * self.config.gram_decay**r
        gram = old * decay + fresh / size[:, None, None] * (1 - decay)
        polar, ok, _ = inverse_sqrt(normalized(gram), GRAM_SHIFT, self.config.inverse_root)
        ok = ok & torch.isfinite(size) & (size > 0)
        low = self._product_dtype
        polar, whitener = polar.to(low), whitener.to(low)
        if self.side == "right":
            polar = apply_right(apply_right(polar, whitener).mT, whitener)
        keep = ok[:, None, None]
        self.gram[chosen] = torch.where(keep, pack(gram), self.gram[chosen])
        self.polar[chosen] = torch.where(keep, polar.to(self.polar.dtype), self.polar[chosen])
        self.failures += (~ok).sum()

    # Its parts

    def _averaged_gradient(self, grad: Tensor, index: slice | Tensor) -> Tensor:
        """M ← τM + (1 − τ)G; returns M, or with Nesterov τM + (1 − τ)G once more."""
        tau = self.config.momentum
        if isinstance(index, slice):
            momentum = self.momentum.lerp_(grad, 1 - tau)
        else:
            momentum = self.momentum[index].lerp_(grad, 1 - tau)
            self.momentum[index] = momentum
        return grad.lerp_(momentum, tau) if self.config.nesterov else momentum

    def _averaged_update(self, update: Tensor, index: slice | Tensor) -> Tensor:
        """M ← τM + αα_l D (Algorithm 1); returns M, or with Nesterov τM + αα_l D."""
        tau = self.config.momentum
        momentum = self.momentum[index].mul(tau).add_(update)
        self.momentum[index] = momentum
        return update.add_(momentum, alpha=tau) if self.config.nesterov else momentum

    def _rate(self, direction: Tensor, grad: Tensor, present: list[int], index: slice | Tensor,
              samples: dict[str, RowSamples], terms: Tensor | float) -> Tensor:  # fmt: skip
        """α_l of each layer: [n]."""
        c, u = self.config, self.units
        if c.rate == "rms":
            return rms_rate(direction.view(len(present), u * self.m, self.columns), c.rate_scale)
        if c.rate == "none":
            return direction.new_ones(len(present))
        if c.rate == "trust":
            rows = self.rows[index]
            phi = self._phi.dense(rows) * self.scale
            form = quadratic_form(direction, phi, self.dense_psi(index))
            return trust_rate(form.view(-1, u).sum(-1), c.rate_scale)
        slope = (direction * grad).sum((-2, -1)).view(-1, u).sum(-1)
        curvature, seen = self._curvature(direction, [self.layers[i] for i in present], samples, terms)
        rates = adaptive_rate(slope, curvature, c.rate_mu)
        # with no curvature at all the rate would be about 1/μ
        return rates if seen is None else torch.where(seen, rates, 0.0)

    def _curvature(self, direction: Tensor, layers: list[Layer], samples: dict[str, RowSamples],
                   terms: Tensor | float) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """DᵀFD of Eq. 13 of these layers [n], and of which there were rows on any rank (None: it is infinite then)."""
        everyone, u = layers, self.units
        if self.owners is not None:  # each rank has rows of all layers, and the directions of its own
            everyone = [layer for layer in self.members if layer.weight.grad is not None]
            direction = self.owners.everyone(everyone, direction)
        kept = [samples.get(layer.name, RowSamples()) for layer in everyone]
        squares = [
            own.sum_of_squares(layer, direction[row * u : (row + 1) * u])
            for row, (layer, own) in enumerate(zip(everyone, kept, strict=True))
        ]
        if self.pool.size == 1:  # of no rows nothing is known: the rate is 0, not 1/μ
            known = [
                s * own.seen_over_kept if own.kept else torch.inf + s for s, own in zip(squares, kept, strict=True)
            ]
            return torch.stack(known) * terms, None
        curvature, seen = pool_curvature(torch.stack(squares), kept, terms, self.pool)
        if self.owners is None:
            return curvature, seen
        mine = index_tensor(tuple(everyone.index(layer) for layer in layers), curvature.device)
        return curvature[mine], seen[mine]

    def wait_for_others(self, samples: dict[str, RowSamples], terms: Tensor | float) -> None:
        """In place of :meth:`update` where only other ranks have a layer to update: Eq. 12-13 takes all of them."""
        if self.config.rate == "adaptive" and any(layer.weight.grad is not None for layer in self.members):
            self._curvature(self.momentum[:0], [], samples, terms)

    def count(self, key: str) -> int:
        """How many entries of the state's first dimension are a layer's."""
        return 1 if key == "rate" else self.units

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, with the layers' matrices (of the rate: the layers) in the first dimension."""
        named = {"momentum": self.momentum, "psi": self.psi, "psi_weight": self.psi_weight, "rate": self.rate}
        return {
            k: v
            for k, v in {**named, "gram": self.gram, "polar": self.polar, "row_square": self.row_square}.items()
            if v is not None
        }
