"""The tasks by name: which there are, and how to load one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from benchmarks.tasks import cifar10, fine_tuning, translation
from benchmarks.tasks.task import Task

FROM_SCRATCH = (*translation.TASKS, "cifar10-resnet", "cifar10-vit")
FINE_TUNING = ("cifar10-efficientnet", *fine_tuning.PARTS)
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
    if name in translation.TASKS:
        return translation.make_task(name, data)
    if name == "cifar10-resnet":
        return cifar10.resnet(data)
    if name == "cifar10-vit":
        return cifar10.vit(data)
    if model is None:
        raise ValueError("--model: got none, accepted: the folder of a pretrained model")
    if name == "cifar10-efficientnet":
        return cifar10.fine_tuning(data, model)
    return fine_tuning.make_task(name, data, model)
