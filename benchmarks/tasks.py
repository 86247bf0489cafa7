"""What a benchmark trains: a model, its batches, its evaluation. One interface for every task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

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


FROM_SCRATCH = ("multi30k", "cifar10-resnet", "cifar10-vit")
FINE_TUNING = ("cifar10-efficientnet", "marian-multi30k", "marian-wmt")
TASKS = (*FROM_SCRATCH, *FINE_TUNING)


def check_task(name: str, accepted: Collection[str] = TASKS) -> None:
    """Raise ValueError for a task that there is not, or that is none of those `accepted`."""
    if name not in accepted:
        raise ValueError(f"--task: got {name!r}, accepted: {', '.join(accepted)}")


def load_task(name: str, data: Path, model: Path | None = None) -> Task:
    """The task of this name with its data.

    Args:
        data: the folder of its data.
        model: the folder of the pretrained model, for fine-tuning.

    Raises:
        ValueError: no such task, or its data are not there.
    """
    check_task(name)
    if name == "multi30k":
        from benchmarks.multi30k_task import make_task

        return make_task(data)
    if name in FINE_TUNING and model is None:
        raise ValueError("--model: got none, accepted: the folder of a pretrained model")
    from benchmarks import cifar10_tasks, fine_tuning_tasks

    if name == "cifar10-resnet":
        return cifar10_tasks.resnet(data)
    if name == "cifar10-vit":
        return cifar10_tasks.vit(data)
    assert model is not None
    if name == "cifar10-efficientnet":
        return cifar10_tasks.fine_tuning(data, model)
    return fine_tuning_tasks.make_task(name, data, model)
