"""Other readings of the paper's text than ours, as changes of the code for one run (see `paper_frame`).

What the text leaves open: what a sample of a convolution is, whether φ is the activation alone or the norm before it,
too, which F stands in Eq. 13, μ, and whether momentum stands inside the rate. The public unofficial version in
hseung88/mac reads most of it otherwise; `unofficial` makes its choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from hf_lngd import linalg
from hf_lngd.batches import Job
from hf_lngd.paper import capture, chains, natural, rate
from hf_lngd.paper.capture import PaperCapture
from hf_lngd.paper.natural import WeightedStatistics

IMAGES = 128  # in a batch of the study
Reading = Callable[[], Any]


@contextmanager
def _changed(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(patch.object(owner, name, value))
        yield


def _per_image(self: WeightedStatistics, scale: Tensor | float | None) -> dict[str, Tensor]:
    """Φ as a sum over an image's locations, in place of their mean."""
    found = _FACTORS(self, scale)
    assert self.n is not None
    return found | {"phi": found["phi"] * (self.n / IMAGES)}


def _activation_alone(self: chains.Chain) -> Tensor | None:
    """φ' of the activation: a norm before it is left out."""
    links = self.links[: len(self.names())]
    slopes = [link.slope for link in links if link.kind == "activation" and link.slope is not None]
    return slopes[-1] if slopes else None


def _of_batch(slope: Tensor, curvature: Tensor, mu: float) -> Tensor:
    """Eq. 13 with the batch's gradient for that of each sample: DᵀFD = ⟨D, G⟩²."""
    return torch.where(torch.isfinite(slope), slope / (slope.square() + mu), 0.0)


def _separate(self: WeightedStatistics, scale: Tensor | float | None) -> dict[str, Tensor]:
    """Φ = E[a aᵀ] E‖g‖² and Ψ = E[g²] E‖a‖² / (E‖a‖² + E‖g‖²), of the mean loss's gradients."""
    assert self.n is not None
    a2, g2 = linalg.trace(self.sums["phi"])[:, None] / self.n, self.sums["g2"] / self.n
    size = g2.sum(-1, keepdim=True)
    return {"phi": self.sums["phi"] / self.n * size[..., None, None], "psi": g2 * a2 / (a2 + size)}


def _add_apart(self: WeightedStatistics, a: Tensor, g: Tensor, mask: Tensor | None, per_sample: int) -> None:
    """Σ a aᵀ and Σ g² apart from each other."""
    g2 = g.to(a.dtype).square()
    phi = linalg.input_statistic(a, None, *self.blocks)
    psi = natural.output_statistic(a, g2)  # kept for its shape
    self.accumulate([("phi", phi), ("psi", psi), ("g2", g2.sum(-2))], a.new_full((), a.shape[-2]))


def _held_rates(core: Any, jobs: list[Job], *given: Any) -> list[Any]:
    """Eq. 12-13 in factor steps; between them each layer's α is the one before."""
    if core.capture.samples:
        return _RATES(core, jobs, *given)
    return [job.batch.rate[job.batch.index(job.layers, 1)] for job in jobs]


def _check_factor_steps(self: PaperCapture) -> None:
    if self.armed:
        _CHECK(self)


def _every_row(start: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(range(count)), (1,) * count


_FACTORS = WeightedStatistics.factors
_RATES, _CHECK = rate.rates, PaperCapture.check_gradients
TEXT = (capture, "rows_read", _every_row)  # Eq. 13 of the whole batch; ours reads a part of its rows


def mu(value: float) -> Reading:
    """Another μ of Eq. 13."""
    return partial(_changed, TEXT, (rate, "MU", value))


as_built: Reading = _changed
text: Reading = partial(_changed, TEXT)
per_image: Reading = partial(_changed, TEXT, (WeightedStatistics, "factors", _per_image))
activation_alone: Reading = partial(_changed, TEXT, (chains.Chain, "slope", _activation_alone))
no_activation: Reading = partial(_changed, TEXT, (chains.Chain, "slope", lambda self: None))
of_batch: Reading = partial(_changed, TEXT, (rate, "adaptive_rate", _of_batch), (rate, "MU", 1e-3))
held: Reading = partial(
    _changed,
    TEXT,
    (rate, "rates", _held_rates),
    (PaperCapture, "check_gradients", _check_factor_steps),
    (PaperCapture, "wants_hooks", lambda self, factors: factors),
)
eighth: Reading = partial(_changed, (rate, "FIRST_ROWS", 0))
unofficial: Reading = partial(
    _changed,
    TEXT,
    (rate, "adaptive_rate", _of_batch),
    (rate, "MU", 1e-3),
    (WeightedStatistics, "factors", _separate),
    (WeightedStatistics, "add_gradient", _add_apart),
)
