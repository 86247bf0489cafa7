"""A model to look at before any training: from its configuration alone, on the meta device where its forward allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from .doctor_batch import batch_of
from .scripts import LOAD_ERRORS
from .usage import UsageError

FACTORIES: dict[str, Any] = {
    "translation": AutoModelForSeq2SeqLM,
    "image": AutoModelForImageClassification,
    "text": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
}
# Above this many parameters a model is not built on the CPU.
MOST_ON_CPU = 50_000_000


@dataclass(frozen=True)
class Subject:
    """A model in training mode with a batch of its task.

    Attributes:
        kind: the class's name.
        batch: its size in words.
        notes: in what the model is another one than the configuration's.
    """

    kind: str
    batch: str
    model: nn.Module
    inputs: dict[str, Tensor]
    notes: tuple[str, ...] = ()

    def loss(self) -> Tensor:
        """Of one forward pass."""
        return self.model(**self.inputs).loss


def load(name: str) -> Any:
    """The configuration of a local folder, a config.json or a model of the Hub.

    Raises:
        UsageError: there is none.
    """
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UsageError("model", f"got {name!r}, which is not there, accepted: a folder, a config.json, a Hub name")
    if path.is_dir() and not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        what = "which holds an adapter: give the model that it belongs to" if adapter else "which has no config.json"
        raise UsageError("model", f"got {name!r}, {what}")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise UsageError("model", f"got {name!r}, which has no configuration that can be read: {error}") from error


def task_of(config: Any, wanted: str) -> str:
    """The task, or for ``auto`` that of the architecture that the configuration names, else the first that fits.

    Raises:
        UsageError: the model is none of the task's, or of no task.
    """
    if wanted not in ("auto", *FACTORIES):
        raise UsageError("task", f"got {wanted!r}, accepted: auto, {', '.join(FACTORIES)}")
    fitting = {task: _class_of(config, task) for task in FACTORIES}
    fitting = {task: name for task, name in fitting.items() if name is not None}
    if wanted in fitting:
        return wanted
    if wanted != "auto" or not fitting:
        others = f"this one can do: {', '.join(fitting) or 'none of them'}"
        raise UsageError("task" if fitting else "model", f"got {config.model_type!r} for {wanted}; {others}")
    named = [task for task, name in fitting.items() if name in (getattr(config, "architectures", None) or ())]
    return (named or list(fitting))[0]


def build(config: Any, task: str, rows: int, length: int, device: str = "meta") -> Subject:
    """The model with random weights and a batch.

    Args:
        rows, length: of the batch; length is that of a text, in tokens.
        device: ``meta`` or ``cpu``.

    Raises:
        UsageError: it cannot be built.
    """
    wanted = list(getattr(config, "architectures", None) or [])
    config.architectures = wanted  # which the Auto classes go through
    half = getattr(config, "dtype", None) in (torch.float16, "float16")
    dtype = {"dtype": torch.float32} if half else {}
    try:
        with torch.device(device):
            # sdpa looks into the masks, which the meta device has not got; the products are the same
            model = FACTORIES[task].from_config(config, attn_implementation="eager", trust_remote_code=False, **dtype)
    except LOAD_ERRORS as error:
        raise UsageError("model", f"got {config.model_type!r}, which cannot be built: {error}") from error
    kind, notes = type(model).__name__, []
    if wanted and kind not in wanted:
        notes.append(
            f"{kind} stands for {', '.join(wanted)}, which the configuration names and task={task} does not have"
        )
    if half:
        notes.append(
            "built in float32, not the configuration's float16: LNGD takes no such weights (fp16: by autocast)"
        )
    batch, inputs = batch_of(config, task, rows, length, device, model.dtype)
    return Subject(kind, batch, model.train(), inputs, tuple(notes))


def look(config: Any, task: str, rows: int, length: int, see: Callable[[Subject], Any]) -> Any:
    """What `see` makes of the model: on the meta device, and where its forward reads numbers on the CPU, if small.

    Raises:
        UsageError: neither goes.
    """
    subject = build(config, task, rows, length)
    try:
        return see(subject)
    except LOAD_ERRORS as error:
        numbers = sum(p.numel() for p in subject.model.parameters())
        if numbers > MOST_ON_CPU:
            what = f"whose forward does not run on the meta device, and {numbers:,} parameters are too many to build"
            raise UsageError("model", f"got {config.model_type!r}, {what} ({error})") from error
    try:
        return see(build(config, task, rows, length, "cpu"))
    except LOAD_ERRORS as error:
        raise UsageError("model", f"got {config.model_type!r}, whose forward fails: {error}") from error
    except IndexError as error:  # a table of positions, or of tokens, that no field of the configuration tells of
        what = f"got {length} for {config.model_type!r}, which has no such position or token ({error})"
        raise UsageError("length", what) from error


def _class_of(config: Any, task: str) -> str | None:
    mapping = FACTORIES[task]._model_mapping
    found = mapping.get(type(config), None)
    found = found[0] if isinstance(found, tuple) else found
    return None if found is None else found.__name__
