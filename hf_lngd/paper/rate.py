"""The paper's adaptive rate (Eq. 12, 13): α_l = ⟨D, M⟩ / (DᵀF_l D + μ), F_l of the rows of the batch.

With g the gradient of the global mean loss over T terms with respect to a layer's output, DᵀF_l D = T · Σ_n q_n²,
q_n = Σ_{t∈n} g_tᵀ D a_t over the tokens t of row n. DDP averages gradients: with W ranks the gradient of the loss with
respect to a rank's activation is 1/W of the one that this rank's hooks see.

q_n costs a forward pass of the layer, so of a large batch a part stands for all, see `rows_read`."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..batches import Job
from ..layers import Layer

# μ of Eq. 13; the paper gives no value.
MU = 1e-8
# Of the rows that a layer sees in a step the first FIRST_ROWS are read, and one in EVERY of the others, for so many.
FIRST_ROWS, EVERY = 16, 8


def rows_read(start: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which of `count` rows are read, and for how many each stands; `start`: rows of the step before them, so that how
    a batch is split changes nothing."""
    rows = tuple(i for i in range(count) if start + i < FIRST_ROWS or (start + i) % EVERY == 0)
    return rows, tuple(1 if start + i < FIRST_ROWS else EVERY for i in rows)


@dataclass
class RowSamples:
    """Inputs and output gradients of the rows of the batch that are read, of one layer.

    Attributes:
        calls: forward pass → list of (a [n, ...], g [n, ...]), one entry a call of the layer.
        weights: forward pass → [n], how many rows each stands for.
        seen: rows of its calls, read or not."""

    calls: dict[Hashable, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    weights: dict[Hashable, Tensor] = field(default_factory=dict)
    seen: int = 0

    def add(self, forward: Hashable, a: Tensor, g: Tensor, weights: Tensor, seen: int) -> None:
        """Keep the rows of one call, of `seen`."""
        self.calls.setdefault(forward, []).append((a, g))
        self.weights[forward] = weights
        self.seen += seen

    def sum_of_squares(self, layer: Layer, direction: Tensor) -> Tensor:
        """Σ q_n²; direction [u, m, columns].

        A layer that is called twice in one forward adds both calls to a row's q; other forwards are other rows."""
        total = direction.new_zeros(())
        for forward, calls in self.calls.items():
            q = torch.as_tensor(sum(_row_products(layer, direction, a, g) for a, g in calls))
            total = total + q.square() @ self.weights[forward].to(q.dtype)
        return total


def _row_products(layer: Layer, direction: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """q_n: D a is what the layer would give with D for its weight."""
    return (layer.apply(a.to(direction.dtype), direction) * g.to(direction.dtype)).flatten(1).sum(1)


def adaptive_rate(slope: Tensor, curvature: Tensor, mu: float) -> Tensor:
    """Eq. 12-13: α = ⟨D, M⟩₊ / (DᵀFD + μ); 0 where a sample's gradient is not finite."""
    return torch.where(torch.isfinite(curvature), slope.clamp_min(0) / (curvature + mu), 0.0)


def rates(core: Any, jobs: list[Job], directions: list[Any], gradients: list[Any], loss_scale: Any) -> list[Any]:
    """α_l of the layers that this process computes, [n] for each job. A collective over several processes.

    Args:
        directions, gradients: D and M [n · units, m, columns] of each job; None: this process has none.
        loss_scale: what the loss was multiplied by; None: one."""
    layout, capture = core.layout, core.capture
    terms = unscaled(capture.terms, loss_scale)
    found: list[Any] = []
    every = layout.all_matrices(jobs, directions)
    for job, whole, own, gradient in zip(jobs, every, directions, gradients, strict=True):
        layers, u = job.members, job.batch.units
        rows = [capture.samples.get(layer.name, RowSamples()) for layer in layers]
        parts = zip(layers, rows, whole.unflatten(0, (-1, u)).unbind(0), strict=True)
        squares = torch.stack([one.sum_of_squares(layer, part) for layer, one, part in parts])
        curvature, known = _over_ranks(squares, rows, terms, layout)
        if own is None:
            found.append(None)
            continue
        mine = set(job.layers)
        # numbers, not a mask: a mask waits for the device, and the meta device cannot
        chosen = torch.tensor([i for i, layer in enumerate(layers) if layer in mine], device=squares.device)
        slope = (own * gradient).sum((-2, -1)).view(-1, u).sum(-1)
        # with no curvature at all the rate would be about 1/μ
        found.append(torch.where(known[chosen], adaptive_rate(slope, curvature[chosen], MU), 0.0))
    return found


def _over_ranks(squares: Tensor, rows: list[RowSamples], terms: Any, layout: Any) -> tuple[Tensor, Tensor]:
    """T Σ q² over all processes [n], and where [n] any of them kept a row and its gradient."""
    seen = torch.tensor([float(own.seen) for own in rows], dtype=squares.dtype)
    total = torch.as_tensor(terms).to(squares.device, squares.dtype, non_blocking=True)
    parts = [squares, seen.to(squares.device, non_blocking=True), total]
    squares, seen, total = layout.everyone.all_reduce(parts)
    return squares * (total / layout.everyone.size**2), seen > 0


def unscaled(factor: Any, loss_scale: Tensor | None) -> Any:
    """A factor of sums of products of two gradients, for those of a loss that was multiplied by `loss_scale`."""
    return factor if loss_scale is None else factor / loss_scale.square()
