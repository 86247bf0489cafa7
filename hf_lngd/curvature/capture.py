"""Hooks: which tensors are looked at, and when.

Hooks are attached for factor steps only (each step under ``rate="adaptive"``), from the end of one ``step()`` to the
next, so a factor step takes in all its micro-batches and nothing is left in the model between. A forward pass counts
if gradients are enabled where it starts; evaluation and recomputation by activation checkpointing never count.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .fisher import FisherSource
from .layers import Layer, call_input, factor_blocks, is_elementwise
from .masks import BatchMasks, bind_batch
from .sums import GroupSums, RowSamples
from .topology import Group, Topology


def in_backward() -> bool:
    """True within a backward pass, where checkpointing runs forwards again."""
    return torch._C._current_graph_task_id() != -1


class Capture:
    """Watches a model's layers and pools their statistics between two steps.

    Args:
        model: the model whose forward starts a batch.
        layers: the layers owned by LNGD.
        source: where g² comes from.
        max_factor_dim: see `LNGDConfig`.
        rate_rows: one row of the batch in this many is kept for Eq. 12-13; 0 keeps none.
        share_by_width: layers of unlike width never share Φ (needed where λ depends on m).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        source: FisherSource,
        max_factor_dim: int | str,
        rate_rows: int = 0,
        share_by_width: bool = False,
    ) -> None:
        self._model = weakref.ref(model)
        self.layers = {layer.name: layer for layer in layers}
        self._owned = {id(module) for layer in layers for _, module in layer.modules}
        self.source = source
        self._max_factor_dim = max_factor_dim
        self._rate_rows = rate_rows
        self._share_by_width = share_by_width
        self.topology = Topology()
        self.enabled = True
        self.closed = False
        self.seconds = 0.0
        self._handles: list[RemovableHandle] = []
        self._factors_wanted = False
        self._forwards = 0
        self._next_batch: Mapping[str, Any] | None = None
        self._reset_forward()
        self.reset()

    # Life of a step

    def reset(self) -> None:
        """Forget what was gathered for the current step."""
        self.sums: dict[str, GroupSums] = {}
        self.rows: dict[str, RowSamples] = {}
        self.terms: Tensor | int = 0
        self.rows_seen = 0
        self._pending: list[tuple[Layer, Tensor, Tensor, str]] = []
        self.source.reset()

    def close(self) -> None:
        """Remove every hook, for good."""
        self.closed = True
        self.disarm()
        self.reset()

    def arm(self, factors: bool) -> None:
        """Attach what the coming step needs: factor hooks, row samples, or nothing. Nothing at all once closed."""
        self.disarm()
        self.reset()
        self._factors_wanted = factors
        model = self._model()
        if self.closed or model is None or not self.layers or not (factors or self._rate_rows):
            return
        add = self._handles.append
        add(model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        add(model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True))
        for layer in self.layers.values():
            for _, module in layer.modules:
                add(module.register_forward_hook(self._layer_hook(layer), with_kwargs=True))
        if factors and not self.topology.frozen:
            for name, module in model.named_modules():
                if is_elementwise(module):
                    add(module.register_forward_pre_hook(self._activation_hook(name), with_kwargs=True))
                elif name.rsplit(".", 1)[-1] == "encoder":
                    add(module.register_forward_hook(self._encoder_hook))

    def disarm(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def set_batch(self, inputs: Mapping[str, Any]) -> None:
        """Name the tensors of the next forward, where the model does not see them all (labels taken out)."""
        self._next_batch = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}

    def finish(self) -> dict[str, GroupSums]:
        """Close the step: settle what is open, freeze the topology, hand over the sums."""
        self.settle()
        if self.sums and not self.topology.frozen:
            self.topology.freeze(list(self.layers))
        return self.sums

    # Hooks

    def _reset_forward(self) -> None:
        self._inside = False
        self._masks = BatchMasks({})
        self._last_input: dict[str, weakref.ref[Tensor]] = {}
        self._encoder_outputs: list[weakref.ref[Tensor]] = []

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch, self._next_batch = self._next_batch, None
        if self._inside or not self.enabled or not torch.is_grad_enabled() or in_backward():
            return
        self._reset_forward()
        self._inside = True
        self._forwards += 1
        bound = bind_batch(model, args, kwargs)
        self._masks = BatchMasks({**bound, **(batch or {})}, getattr(model, "config", None))
        self._first_row = self.rows_seen
        self.rows_seen += self._masks.rows
        self.terms = self.terms + self._masks.terms

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._inside and not in_backward():
            self.settle()
            self._inside = False

    def _active(self) -> bool:
        if not self.enabled or in_backward():
            return False
        if self._inside:
            return True
        return torch.is_grad_enabled()  # a part of the model called by itself

    def _layer_hook(self, layer: Layer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            a = call_input(args, kwargs)
            if a is None or not self._active() or id(module) not in self._owned:  # a copy of the model has our hooks
                return
            start = time.perf_counter()
            if self._rate_rows:
                self._keep_rows(layer, a, output)
            if self._factors_wanted:
                if layer.name in self.topology.of_layer:
                    self._observe(layer, a, output)
                elif not self.topology.frozen:
                    self._pending.append((layer, a, output, ""))
                    if self.source.uses_gradients:  # of the output as it is now, whatever works on it in place
                        self.settle()
            self.seconds += time.perf_counter() - start

        return hook

    def _activation_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            s = call_input(args, kwargs)
            for i, (layer, a, output, _) in enumerate(self._pending):
                if output is s:
                    kept = output.detach().clone() if getattr(module, "inplace", False) else output
                    self._pending[i] = (layer, a, kept, name)

        return hook

    def _encoder_hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Mapping):
            output = tuple(output.values())
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(first, Tensor):
            self._encoder_outputs.append(weakref.ref(first))

    # What they gather

    def settle(self) -> None:
        """Place the layers that this forward showed for the first time into groups, then take in their calls."""
        pending, self._pending = self._pending, []
        shared: list[tuple[Tensor, Group]] = []
        for layer, a, _, activation in pending:
            if layer.name in self.topology.of_layer:
                continue
            reads_encoder = any(ref() is a for ref in self._encoder_outputs)
            stream = self._masks.stream_of(layer.modules[0][0], a.shape[:-1], reads_encoder)
            if activation or self.source.differs_by_layer:
                self.topology.add(layer.name, activation or None, stream)
                continue
            group = next((g for tensor, g in shared if tensor is a and self._compatible(layer, g)), None)
            if group is None:
                shared.append((a, self.topology.add(layer.name, None, stream)))
            else:
                self.topology.join(layer.name, group)
        for layer, a, output, _ in pending:
            self._observe(layer, a, output)

    def _compatible(self, layer: Layer, group: Group) -> bool:
        first = self.layers[group.name]
        same_width = layer.out_features == first.out_features or not self._share_by_width
        return same_width and (layer.bias_name is None) == (first.bias_name is None)

    def _observe(self, layer: Layer, a: Tensor, output: Tensor) -> None:
        group = self.topology.of_layer[layer.name]
        if len(group.members) > 1:  # its Φ is summed at the first member's call with this tensor
            last = self._last_input.get(group.name)
            if last is not None and last() is a:
                return
            self._last_input[group.name] = weakref.ref(a)
        mask = self._masks.flat(group.stream, a.shape[:-1])
        activation = None if group.activation is None else self._module(group.activation)
        self.source.observe(self._sums(group), layer, a, output, mask, activation)

    def _sums(self, group: Group) -> GroupSums:
        if group.name not in self.sums:
            members = [self.layers[name] for name in group.members]
            self.sums[group.name] = GroupSums(factor_blocks(members, self._max_factor_dim))
        return self.sums[group.name]

    def _keep_rows(self, layer: Layer, a: Tensor, output: Tensor) -> None:
        if not output.requires_grad:
            return
        # counted over the micro-batches of a step, so that how a batch is split changes nothing
        start = -self._first_row % self._rate_rows if self._inside else 0
        forward = self._forwards
        kept = a.detach()[start :: self._rate_rows].clone()
        samples = self.rows.setdefault(layer.name, RowSamples())

        def receive(g: Tensor) -> None:
            if self.source.in_pass:
                return
            samples.add(forward, kept, g.detach()[start :: self._rate_rows].clone())

        output.register_hook(receive)

    def _module(self, name: str) -> nn.Module:
        model = self._model()
        assert model is not None
        return model.get_submodule(name)
