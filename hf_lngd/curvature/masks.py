"""Which positions of a batch carry signal: padding and ignored labels are left out of every mean."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

INPUTS = "inputs"
TARGETS = "targets"
# Of a layer that was seen without any mask: which one applies is asked of each batch that has some.
OPEN = "open"
_IGNORED_LABEL = -100
# Models whose layers see [T, B, d]: a mask of as many tokens as sentences fits either way round.
_TIME_FIRST = ("fsmt",)


class BatchMasks:
    """The masks of one forward pass, read from the model's own arguments.

    Attributes:
        by_stream: ``inputs`` → [B, S] and ``targets`` → [B, T], True where a position counts; absent if unknown.
        rows: B, the batch's first dimension (0: unknown).
        terms: number of terms of the mean loss, a tensor or a number: labels that are not −100, else rows.
    """

    def __init__(self, batch: Mapping[str, Any], config: Any = None) -> None:
        self.by_stream: dict[str, Tensor] = {}
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
        self.rows = next((value.shape[0] for value in _tensors(batch)), 0)
        labels = tensors.get("labels")
        if labels is not None and not labels.is_floating_point():
            self.terms: Tensor | int = (labels != _IGNORED_LABEL).sum()
        else:
            self.terms = self.rows
        attention = _mask_of(tensors.get("attention_mask"))
        if attention is not None:
            self.by_stream[INPUTS] = attention
        self._two_sided = "decoder_input_ids" in tensors or bool(getattr(config, "is_encoder_decoder", False))
        if self._two_sided or attention is None:
            targets = _target_mask(tensors, config)
            if targets is not None:
                self.by_stream[TARGETS] = targets
        if getattr(config, "model_type", None) in _TIME_FIRST:
            self.by_stream = {stream: mask.mT for stream, mask in self.by_stream.items()}

    def stream_of(self, name: str, shape: torch.Size, reads_encoder: bool) -> str | None:
        """Which mask belongs to a layer whose input has this shape, features left off.

        Lengths tell the two sides apart; where source and target are equally long, the layer's place in the model
        does (`reads_encoder`: its input is the encoder's output, as for the keys of cross attention). None: none does.
        """
        side = next((part for part in name.split(".") if part in ("encoder", "decoder")), None)
        encodes = reads_encoder or side == "encoder"
        if not self.by_stream or (self._two_sided and encodes and INPUTS not in self.by_stream):
            return OPEN
        fitting = [stream for stream, mask in self.by_stream.items() if mask.shape == shape]
        if len(fitting) < 2:
            return fitting[0] if fitting else None
        return INPUTS if encodes else TARGETS

    def flat(self, stream: str | None, shape: torch.Size) -> Tensor | None:
        """The mask of a stream as [N] numbers 0 and 1, or None where it does not fit the shape."""
        mask = self.by_stream.get(stream) if stream else None
        return mask.reshape(-1) if mask is not None and mask.shape == shape else None


def bind_batch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``model(*args, **kwargs)`` by name."""
    if not args:
        return dict(kwargs)
    try:
        names = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        names = []
    positional = {names[i] if i < len(names) else f"arg{i}": value for i, value in enumerate(args)}
    return {**positional, **kwargs}


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors with a batch dimension in nested mappings and sequences, in their order."""
    if isinstance(value, Tensor):
        if value.dim() > 0:
            yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _mask_of(value: Tensor | None) -> Tensor | None:
    return None if value is None or value.dim() != 2 else value != 0


def _target_mask(tensors: Mapping[str, Tensor], config: Any) -> Tensor | None:
    labels = tensors.get("labels")
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        return labels != _IGNORED_LABEL
    mask = _mask_of(tensors.get("decoder_attention_mask"))
    if mask is not None:
        return mask
    ids, pad = tensors.get("decoder_input_ids"), getattr(config, "pad_token_id", None)
    if ids is None or ids.dim() != 2 or pad is None:
        return None
    # the label of position t is the input of t + 1; a last input that is no end mark has a label that was cut off
    last = ids[:, -1:]
    eos = getattr(config, "eos_token_id", None)
    open_end = (last != pad) & (last != eos) if isinstance(eos, int) else last != pad
    return torch.cat((ids[:, 1:] != pad, open_end), 1)
