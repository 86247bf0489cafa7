"""The loss that is the same however the batch of a step is split over micro-batches and processes.

The Trainer believes that a model whose forward takes ``**kwargs`` divides its loss by `num_items_in_batch`, and adds up
the losses of micro-batches. Marian, T5, Whisper, ResNet, CTC models and more do not divide: their loss comes out too
large by the number of micro-batches. What a model does is measured here, before the first step that is split.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers.trainer_pt_utils import find_batch_size

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
# What a model's loss is: divided by `num_items_in_batch`; the mean over labels that are not ignored, the same without
# the first of each row, over rows; a sum; none of these; a sum of which only a part is divided.
DIVIDED, LABELS, SHIFTED, ROWS, SUM, OTHER, PARTLY = "divided", "labels", "shifted", "rows", "sum", "other", "partly"
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)


class ExactLoss:
    """Makes a Trainer's loss of a step the mean over all terms of its batch.

    Args:
        trainer: a Trainer, whose `model_accepts_loss_kwargs` is set to what is measured.
        loss: (model, batch, `num_items_in_batch` or None) → loss, as the Trainer computes it.
    """

    def __init__(self, trainer: Any, loss: Callable[[Any, dict[str, Any], Any], Tensor]) -> None:
        self._trainer, self._loss = trainer, loss
        self.kind: str | None = None  # not measured yet

    def number(self, batches: Sequence[Any], number: Any) -> Any:
        """What is given to `compute_loss` as `num_items_in_batch`, of the micro-batches of a step in this process, in
        the place of the Trainer's `number`."""
        trainer, processes = self._trainer, self._trainer.accelerator.num_processes
        if self.kind is None and batches and (len(batches) > 1 or processes > 1):
            self._measure(batches, number)
        if self.kind in (OTHER, SUM):
            return None if self.kind == OTHER else 1
        if self.kind not in (LABELS, SHIFTED, ROWS):
            return number
        total = torch.as_tensor(sum(self._terms(batch) for batch in batches), device=trainer.args.device)
        across = processes > 1 and trainer.args.average_tokens_across_devices
        return trainer.accelerator.gather(total).sum() if across else total

    def terms(self, batch: Any, number: Any) -> Any:
        """How many terms the loss of a micro-batch has, which is then computed without a number and `scaled`; None: the
        Trainer's own is right."""
        if number is None or self.kind not in (LABELS, SHIFTED, ROWS, SUM):
            return None
        return 1 if self.kind == SUM else self._terms(batch)

    def scaled(self, loss: Tensor, terms: Any, number: Any) -> Tensor:
        """Its share of the step's loss."""
        across = self._trainer.args.average_tokens_across_devices
        processes = self._trainer.accelerator.num_processes if across else 1  # whose gradients are averaged
        loss = loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss
        return loss * (processes * terms) / number

    def _terms(self, batch: Any, kind: str | None = None) -> Any:
        """How many terms the mean of this batch has."""
        kind = self.kind if kind is None else kind
        if kind == ROWS:
            return find_batch_size(batch)
        labels = batch["labels"][..., 1:] if kind == SHIFTED else batch["labels"]
        ignored = getattr(getattr(self._trainer.model, "config", None), "semantic_loss_ignore_index", IGNORED_LABEL)
        return (labels != ignored).sum()

    def _measure(self, batches: Sequence[Any], number: Any) -> None:
        """Find out `kind`; every process has to call it. It stays unknown where losses are not finite."""
        trainer, reason = self._trainer, ""
        try:
            kind = self._kind_of(batches, number is not None)
        except _FAILURES as error:  # a batch that cannot be taken apart
            kind, reason = OTHER, f" ({type(error).__name__}: {error})"
        self.kind = kind = broadcast_object_list([kind])[0]
        if kind in (OTHER, PARTLY):
            what = "the mean of its micro-batches' losses" if kind == OTHER else "in part the sum over micro-batches"
            logger.warning(
                "%s: its loss is no mean over labels or rows%s. Under gradient accumulation, and over processes, the "
                "loss of a step is %s, which depends on how its batch is split",
                type(trainer.model).__name__,
                reason,
                what,
            )
        if kind is not None:
            trainer.model_accepts_loss_kwargs = kind != OTHER  # else the Trainer divides by the micro-batches

    @torch.no_grad()
    def _kind_of(self, batches: Sequence[dict[str, Any]], counted: bool) -> str | None:
        model, parts = self._trainer.model, _split(batches)
        calls: list[tuple[dict[str, Any], Any]] = [(part, None) for part in parts]
        if counted and self._trainer.model_accepts_loss_kwargs:
            count = self._terms(parts[2], LABELS)
            calls += [(parts[2], count), (parts[2], 2 * count)]
        model.eval()  # no dropout; the Trainer's next step sets it back
        with torch.random.fork_rng():
            losses = [float(self._loss(model, dict(part), number)) for part, number in calls]
        if not all(abs(loss) < float("inf") for loss in losses) or not losses[2]:
            return None
        one, other, whole, *divided = losses
        args, dtype = self._trainer.args, next(model.parameters()).dtype
        half = dtype in (torch.float16, torch.bfloat16) or ((args.bf16 or args.fp16) and dtype == torch.float32)
        rounding = abs(whole) * (2e-2 if half else 1e-5)  # of matmuls of one row beside several
        if divided and divided[0] != divided[1]:
            return DIVIDED if abs(divided[0] - 2 * divided[1]) < rounding else PARTLY
        errors = {}
        for kind in self._means(parts[2]):
            first, second = (float(self._terms(part, kind)) for part in parts[:2])
            errors[kind] = abs(whole - (first * one + second * other) / max(first + second, 1.0))
        errors[SUM] = abs(whole - one - other)
        best = min(errors, key=lambda kind: max(errors[kind], rounding))
        return best if errors[best] <= 0.05 * abs(one - other) + max(rounding, 1e-3 * abs(whole)) else OTHER

    def _means(self, batch: dict[str, Any]) -> list[str]:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return [ROWS]
        return [LABELS, SHIFTED, ROWS] if labels.dim() > 1 else [LABELS, ROWS]


def _split(batches: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Two batches and both as one: the first row of a batch and its other rows, or two batches of a row."""
    first = batches[0]
    rows = find_batch_size(first)
    if rows > 1:
        return _rows(first, slice(0, 1), rows), _rows(first, slice(1, None), rows), first
    if len(batches) < 2 or find_batch_size(batches[1]) != 1:
        raise ValueError("a batch of one row")
    one, other = dict(first), dict(batches[1])
    for name, value in first.items():
        if isinstance(value, Tensor) and value.dim() > 1:
            size = [max(pair) for pair in zip(value.shape, other[name].shape, strict=True)]
            fill = IGNORED_LABEL if name == "labels" else 0
            one[name], other[name] = (_padded(part, size, fill) for part in (value, other[name]))
    both = {name: torch.cat((v, other[name])) if isinstance(v, Tensor) and v.dim() else v for name, v in one.items()}
    return one, other, both


def _rows(batch: dict[str, Any], part: slice, rows: int) -> dict[str, Any]:
    """These rows of all that has one entry a row."""
    sized = (Tensor, list, tuple)
    return {
        name: value[part] if isinstance(value, sized) and getattr(value, "shape", [1]) and len(value) == rows else value
        for name, value in batch.items()
    }


def _padded(value: Tensor, size: list[int], fill: int) -> Tensor:
    result = value.new_full(size, fill)
    result[tuple(slice(0, length) for length in value.shape)] = value
    return result
