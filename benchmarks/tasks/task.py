"""What a benchmark trains: a model, its batches, its evaluation. One interface for every task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """One task with its data loaded.

    Attributes:
        name: of the file of results.
        make_model: seed → a model, its weights decided by the seed alone.
        batches: seed → endless training batches in an order that the seed alone decides.
        evaluate: model, whether this run tunes → "loss" (mean cross entropy) and, for images, "accuracy" (a share).
        final: model → what a reported run is measured by once, at its end ("bleu").
    """

    name: str
    make_model: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    evaluate: Callable[[nn.Module, bool], dict[str, float]]
    final: Callable[[nn.Module], dict[str, float]] | None = None
