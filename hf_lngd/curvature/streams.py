"""Which of a batch's masks the positions of a layer have: the sources' or the targets'."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .compiled import plain_name
from .context import Hook
from .layers import Layer, call_input
from .masks import OPEN, BatchMasks
from .topology import Group, same_tensor


class Streams:
    """The masks of one forward, and what was made of its encoder's output.

    Attributes:
        masks: of the batch.
    """

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
        """The stream of a call of a layer: `masks.INPUTS`, `masks.TARGETS`, `masks.OPEN`, or None."""
        name = layer.modules[0][0]
        reads_encoder = self._is_encoders(a) or name.startswith(tuple(self._readers))
        return self.masks.stream_of(name, layer.positions(output), reads_encoder)

    def mask(self, group: Group, layer: Layer, a: Tensor, output: Tensor) -> Tensor | None:
        """Which positions of the call count, see `BatchMasks.flat`."""
        stream = self.of(layer, a, output) if group.stream == OPEN else group.stream
        return self.masks.flat(stream, layer.positions(output))

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
