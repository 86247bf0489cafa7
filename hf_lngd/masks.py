"""Which tokens of a batch count: padding and ignored labels are left out of every mean."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .layers import Layer
from .torch_internals import Hook, call_input, plain_name, same_tensor

# The two mask sources of a batch, and that of a layer which was seen without any mask: each batch tells again.
INPUTS, TARGETS, OPEN = "inputs", "targets", "open"
_IGNORED_LABEL = -100
# Models whose layers see [T, B, d]: a mask of as many tokens as sentences fits either way round.
_TIME_FIRST = ("fsmt",)


class BatchMasks:
    """The masks of one forward pass, read from the model's own arguments.

    Attributes:
        by_source: ``inputs`` → [B, S] and ``targets`` → [B, T], True where a token counts; absent if unknown.
        samples: B, the batch's first dimension (0: unknown).
        terms: number of terms of the mean loss, a tensor or a number: labels that are not −100, else samples."""

    def __init__(self, batch: Mapping[str, Any], config: Any = None) -> None:
        self.by_source: dict[str, Tensor] = {}
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
        self.samples = next((value.shape[0] for value in _tensors(batch)), 0)
        labels = tensors.get("labels")
        self.terms: Tensor | int = self.samples
        if labels is not None and not labels.is_floating_point():
            self.terms = (labels != _IGNORED_LABEL).sum()
        attention = _mask_of(tensors.get("attention_mask"))
        if attention is not None:
            self.by_source[INPUTS] = attention
        self._two_sided = "decoder_input_ids" in tensors or bool(getattr(config, "is_encoder_decoder", False))
        if self._two_sided or attention is None:
            targets = _target_mask(tensors, config)
            if targets is not None:
                self.by_source[TARGETS] = targets
        if getattr(config, "model_type", None) in _TIME_FIRST:
            self.by_source = {source: mask.mT for source, mask in self.by_source.items()}

    def source_of(self, name: str, shape: torch.Size, reads_encoder: bool) -> str | None:
        """Which mask belongs to a layer whose input has this shape, features left off.

        Lengths tell the two sides apart; where source and target are equally long, the layer's place in the model
        does (`reads_encoder`: its input is the encoder's output, as for the keys of cross attention). None: none does.
        """
        side = next((part for part in name.split(".") if part in ("encoder", "decoder")), None)
        encodes = reads_encoder or side == "encoder"
        if not self.by_source or (self._two_sided and encodes and INPUTS not in self.by_source):
            return OPEN
        fitting = [source for source, mask in self.by_source.items() if mask.shape == shape]
        if len(fitting) < 2:
            return fitting[0] if fitting else None
        return INPUTS if encodes else TARGETS

    def flat(self, source: str | None, shape: torch.Size) -> Tensor | None:
        """The mask of a source as [N] numbers 0 and 1, or None where it does not fit the shape."""
        mask = self.by_source.get(source) if source else None
        return mask.reshape(-1) if mask is not None and mask.shape == shape else None


def bind_batch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``model(*args, **kwargs)`` by name."""
    if not args:
        return dict(kwargs)
    try:
        names = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        names = []
    names += [f"arg{i}" for i in range(len(names), len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}


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


class MaskSources:
    """The masks of one forward pass, and which modules read its encoder's output."""

    def __init__(self) -> None:
        self.begin(BatchMasks({}))

    def begin(self, masks: BatchMasks) -> None:
        """A forward with these masks."""
        self.masks = masks
        self._outputs: list[weakref.ref[Tensor]] = []  # of encoders
        self._readers: list[str] = []  # modules that are called with one

    def attach(self, name: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """The hooks on a module, in a step in which layers are placed."""
        if plain_name(name).rpartition(".")[2] == "encoder":
            yield module.register_forward_hook(Hook(self._after_encoder))
        elif name and any(True for _ in module.children()):
            yield module.register_forward_pre_hook(Hook(self._reader_hook(plain_name(name))), with_kwargs=True)

    def of(self, layer: Layer, a: Tensor, output: Tensor) -> str | None:
        """The mask source of a call of a layer: `INPUTS`, `TARGETS`, `OPEN`, or None."""
        name = layer.modules[0][0]
        reads_encoder = self._is_encoders(a) or name.startswith(tuple(self._readers))
        return self.masks.source_of(name, layer.locations(output), reads_encoder)

    def mask(self, source: str | None, layer: Layer, a: Tensor, output: Tensor) -> Tensor | None:
        """Which tokens of the call count, see `BatchMasks.flat`; `OPEN` is decided for this call."""
        source = self.of(layer, a, output) if source == OPEN else source
        return self.masks.flat(source, layer.locations(output))

    def _after_encoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Mapping):
            output = tuple(output.values())
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(first, Tensor):
            self._outputs.append(weakref.ref(first))

    def _reader_hook(self, name: str) -> Any:
        """For a module of several layers (LoRA's) that is called with the encoder's output, as one layer would be."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_encoders(call_input(args, kwargs)):
                self._readers.append(f"{name}.")

        return hook

    def _is_encoders(self, a: Tensor | None) -> bool:
        return a is not None and any(same_tensor(ref(), a) for ref in self._outputs)
