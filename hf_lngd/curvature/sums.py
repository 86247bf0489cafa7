"""Sufficient statistics of one factor step: pooled over calls and micro-batches, divided once at the end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .factors import input_statistic, output_statistic, trace
from .layers import LEFT, RIGHT, Layer

# Sums that equal their transpose: half of each tells all.
SYMMETRIC = ("s", LEFT, RIGHT)


@dataclass
class GroupSums:
    """S = Σ_t w_t a_t a_tᵀ as [u, k, b, b], v = Σ_t ‖a_t‖² g_t² as [u, m] (None where φ' = 1), n positions.

    Attributes:
        blocks: (k, b).
        units: u.
        out_features: m, where Ψ is estimated; None where φ' = 1.
        seen, kept: rows of the batch in the step, and those of them that were summed; tensors over several processes.
    """

    blocks: tuple[int, int]
    units: int = 1
    out_features: int | None = None
    s: Tensor | None = None
    v: Tensor | None = None
    n: Tensor | None = None
    seen: int | Tensor = 0
    kept: int | Tensor = 0

    def add(self, a: Tensor, g2: Tensor | None, mask: Tensor | None) -> None:
        """Add some positions.

        Args:
            a: inputs [u, N, d].
            g2: squared gradients [u, N, m] with respect to the pre-activation, or None where they are all one.
            mask: [N], 1 where the position counts, or None.
        """
        if a.is_meta:  # which knows no autocast
            return self._add(a, g2, mask)
        with torch.autocast(a.device.type, enabled=False):  # sums in half precision would be off by more than λ
            self._add(a, g2, mask)

    def add_gradient(self, a: Tensor, g: Tensor, mask: Tensor | None, per_row: int) -> None:
        """Add some positions with the gradients of a loss, g [u, N, m]; `per_row`: see `FamilySums`."""
        self.add(a, g.square(), mask)

    def _add(self, a: Tensor, g2: Tensor | None, mask: Tensor | None) -> None:
        weight = None if mask is None else mask.to(a.dtype)
        count = a.new_full((), a.shape[-2]) if weight is None else weight.sum()
        if g2 is not None:
            g2 = g2.to(a.dtype) if weight is None else g2.to(a.dtype) * weight[:, None]
            v = output_statistic(a, g2)
            self.v = v if self.v is None else self.v + v
            weight = g2.sum(-1)
        s = input_statistic(a, weight, *self.blocks)
        self.s = s if self.s is None else self.s.add_(s)
        self.n = count if self.n is None else self.n + count

    def factors(self, scale: Tensor | float | None = None) -> tuple[Tensor, Tensor | None]:
        """Φ = S·scale (Eq. 4; `scale` 1/n by default) [u, k, b, b] and Ψ = v / tr S (Eq. 5) [u, m], tr Ψ = 1.

        With no positions at all Φ is NaN, which the running average passes over.
        """
        assert self.s is not None and self.n is not None
        phi = self.s / self.n if scale is None else self.s * (scale * seen_over_kept(self.seen, self.kept))
        if self.v is None:
            return phi, None
        size = trace(self.s)[:, None]  # may overflow where v does not: then Ψ is no more to be used than Φ
        return phi, torch.where(torch.isfinite(size), self.v / size, torch.nan)

    # Over several processes

    def plain(self, like: Tensor) -> dict[str, Tensor]:
        """Every sum by name, zeros of this dtype and device where there is none yet; those of `SYMMETRIC` are."""
        k, b = self.blocks
        s = like.new_zeros(self.units, k, b, b) if self.s is None else self.s
        found = {"s": s, "n": like.new_zeros(()) if self.n is None else self.n}
        if self.out_features is not None:
            found["v"] = like.new_zeros(self.units, self.out_features) if self.v is None else self.v
        return found

    def pooled(self, plain: dict[str, Tensor], seen: Tensor, kept: Tensor) -> GroupSums:
        """Sums with these in place of its own."""
        return replace(self, s=plain["s"], v=plain.get("v"), n=plain["n"], seen=seen, kept=kept)


def seen_over_kept(seen: int | Tensor, kept: int | Tensor) -> float | Tensor:
    """Rows of the step over those of them that were summed; over several processes a tensor, NaN for none."""
    return seen / kept if isinstance(kept, Tensor) or kept else 1.0


@dataclass
class RowSamples:
    """What Eq. 12-13 needs of one layer: inputs and output gradients of some rows of the batch.

    Attributes:
        calls: forward pass → list of (a [n, ...], g [n, ...]), one entry a call of the layer.
        seen, kept: rows of its calls, and those of them that were kept.
    """

    calls: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    seen: int = 0
    kept: int = 0

    def add(self, forward: int, a: Tensor, g: Tensor) -> None:
        """Keep the rows of one call."""
        self.calls.setdefault(forward, []).append((a, g))

    def sum_of_squares(self, layer: Layer, direction: Tensor) -> Tensor:
        """Σ q_n² over the rows kept; q_n = Σ_t g_tᵀ D a_t, direction [u, m, columns].

        A layer that is called twice in one forward adds both calls to a row's q; other forwards are other rows.
        """
        total = direction.new_zeros(())
        for calls in self.calls.values():
            q = sum(_row_products(layer, direction, a, g) for a, g in calls)
            total = total + torch.as_tensor(q).square().sum()
        return total

    @property
    def seen_over_kept(self) -> float:
        """What makes a sum over the rows kept one over all rows."""
        return self.seen / self.kept if self.kept else 1.0


def _row_products(layer: Layer, direction: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """q_n: D a is what the layer would give with D for its weight."""
    return (layer.apply(a.to(direction.dtype), direction) * g.to(direction.dtype)).flatten(1).sum(1)
