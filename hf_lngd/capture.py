"""Forward hooks: a layer's input becomes a statistic of its group.

Hooks are attached for factor steps only, from the end of one ``step()`` to the next, so a factor step takes in all its
micro-batches and nothing is left in the model between. A forward pass counts if gradients are enabled where it starts;
evaluation and recomputation by activation checkpointing never count. `paper.capture` adds what the paper needs."""

from __future__ import annotations

import logging
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import torch_internals as internals
from .config import LNGDConfig
from .layers import Layer, factor_blocks
from .masks import OPEN, BatchMasks, MaskSources, bind_batch
from .statistics import InputStatistics, Statistics
from .topology import Group, Topology
from .torch_internals import Collector, Hook, call_input, in_backward, is_sharded, run_eagerly, same_tensor

logger = logging.getLogger("hf_lngd")

# Of the samples of a batch one in so many estimates the factors of a convolution.
CONVOLUTION_SAMPLES = 8


@dataclass(frozen=True)
class Coming:
    """The step that hooks are attached for: steps made before it; this process's number among those that train the
    model, and how many they are; group → the bank of its factor."""

    step: int = 0
    rank: int = 0
    size: int = 1
    bank_of: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Call:
    """One call of a layer: its input; its output, and the version of its memory as it was then; `note`: what a subclass
    of `Capture` has to remember."""

    layer: Layer
    a: Tensor
    output: Tensor
    version: int
    note: Any = None


class Capture(Collector):
    """Collects the statistics of a model's layers between two steps; the model's forward starts a batch.

    Attributes:
        topology: who shares a factor with whom.
        terms: terms of the mean loss in this step.
        seconds: spent in hooks."""

    convolution_samples = CONVOLUTION_SAMPLES
    shares = True  # layers that read the same tensor have one factor
    needs_fisher_pass = False

    def __init__(self, model: nn.Module, layers: list[Layer], config: LNGDConfig) -> None:
        super().__init__(lambda: (layer.weight for layer in self.layers.values()))
        self._model = weakref.ref(model)
        self.layers = {layer.name: layer for layer in layers}
        self._modules = {id(module) for layer in layers for _, module in layer.modules}
        self.config = config
        self.topology = Topology()
        self.armed = False
        self.seconds, self.masks, self.coming = 0.0, MaskSources(), Coming()
        self._next_batch: Mapping[str, Any] | None = None
        self._warned: set[str] = set()
        self.terms: Tensor | int = 0
        self._reset_forward()
        self.forget()

    @property
    def model(self) -> nn.Module | None:
        """The model, as long as it lives."""
        return self._model()

    def forget(self) -> None:
        self.statistics: dict[str, Statistics] = {}
        self._pending: list[Call] = []
        self.samples_seen, self.terms, self.doubtful = 0, 0, False
        self.gradients.reset()

    def wants_hooks(self, factors: bool) -> bool:
        """Whether the coming step needs any."""
        return factors

    def arm(self, factors: bool, coming: Coming) -> None:
        """Attach the hooks that the coming step (a factor step or none) needs; nothing at all once closed."""
        self.coming = coming
        self.disarm()
        self.forget()
        self.armed = factors
        model = self._model()
        if self.closed or model is None or not self.layers or not self.wants_hooks(factors):
            return
        add = self._handles.append
        add(model.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True))
        add(model.register_forward_hook(Hook(self._after_forward), with_kwargs=True, always_call=True))
        run_eagerly(self, self.enabled)
        for layer in self.layers.values():
            for _, module in layer.modules:
                # FSDP2's own hook, which takes the weight away, comes after it
                first = is_sharded(layer.weight)
                add(module.register_forward_hook(Hook(self._layer_hook(layer)), with_kwargs=True, prepend=first))
        seeks = not self.topology.frozen or any(group.source == OPEN for group in self.topology.groups)
        for name, module in model.named_modules() if factors else ():
            found = list(self.module_hooks(module))
            self._handles.extend(found or (self.masks.attach(name, module) if seeks else ()))

    def module_hooks(self, module: nn.Module) -> Iterator[RemovableHandle]:
        """Further hooks on a module of the model, in a factor step."""
        yield from ()

    def disarm(self) -> None:
        """Remove every hook."""
        self._reset_forward()
        super().disarm()

    def set_batch(self, inputs: Mapping[str, Any]) -> None:
        """Name the tensors of the next forward, where the model does not see them all (labels taken out)."""
        self._next_batch = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}

    def finish(self, all_gather: Callable[[Any], list[Any]] = lambda own: [own]) -> dict[str, Statistics]:
        """Close the step: flush what is open, freeze the topology (`all_gather`: own one → that of every rank), hand
        over the statistics."""
        self.flush()
        if not self.topology.frozen:
            self.topology.learn(all_gather(self.topology.state()))
            if self.topology.groups:
                self.topology.freeze(list(self.layers))
        return self.statistics

    def warn_of_untrained(self, trained: Iterable[nn.Parameter]) -> None:
        """Warn once of each parameter of the model that has a gradient and is in no parameter group."""
        model, known = self._model(), set(trained)
        for name, parameter in [] if model is None else model.named_parameters():
            if parameter.grad is not None and parameter not in known:
                self._warn_once(
                    f"parameter '{name}' has a gradient and is not trained: it was frozen, or no part of the model, "
                    "when LNGD was made. To have it trained: optimizer.add_param_group({'params': [...]}) (AdamW), or "
                    "make LNGD anew"
                )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            logger.warning("LNGD: %s", text)
        self._warned.add(text)

    def fisher_backward(self, logits: Tensor, mask: Tensor | None) -> None:
        """A second backward pass, with labels drawn from the model."""

    def scalars(self) -> list[Tensor | int]:
        """Numbers of this step that are summed over processes."""
        return []

    def scale(self, scalars: list[Tensor], size: int, loss_scale: Tensor | None) -> Tensor | float | None:
        """By what statistics are multiplied to become factors; None: one over the number of tokens.

        Args:
            scalars: of :meth:`scalars`, of all processes, `size` of them.
            loss_scale: what the loss was multiplied by (a gradient scaler's); None: one."""
        return None

    def only_zeros(self) -> bool:
        """Whether all gradients are zero: a step that makes the state, as torch.distributed.checkpoint makes one. Waits
        for the device, so it is asked only where a step would raise."""
        return not any(bool(y.weight.grad.any()) for y in self.layers.values() if y.weight.grad is not None)

    def check_gradients(self) -> None:
        """Raise RuntimeError if a step lacks what it needs of every one."""

    def check(self, started: bool) -> None:
        """Raise RuntimeError for a factor step that saw no forward pass. `started`: there are factors of earlier
        steps."""
        if self.topology.groups or started or self.only_zeros():
            return
        stance = internals.stance_in_the_way()
        raise RuntimeError(
            "LNGD.step(): the layers have gradients, but no forward pass of the model was seen. Call the model "
            "that was given to LNGD (a wrapper around it is fine), with gradients enabled, after LNGD was made "
            "and without optimizer.eval(); if it is compiled, with no torch.compiler.set_stance around the "
            f"call{'' if stance is None else f', got {stance!r}'}."
        )

    def _reset_forward(self) -> None:
        self._inside, self._gathered, self._depth = False, False, 0
        self._first_sample, self._terms_before = 0, self.terms
        self.masks.begin(BatchMasks({}))
        self._last_input: dict[str, weakref.ref[Tensor]] = {}

    def forward_begins(self) -> None:
        """A forward pass that counts begins."""

    def forward_ends(self, finished: bool) -> None:
        """It is over; not finished: of it nothing is counted but what its layers summed already."""
        if not finished:
            self._pending = []
            self.samples_seen, self.terms = self._first_sample, self._terms_before

    def _begin_anew_if_skipped(self) -> None:
        if self.doubtful or self.gradients.gone:  # what was gathered is of a step left out
            self.forget()

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self._model():  # a copy or replica of the model has our hooks
            return
        if self._inside and internals.calls_under_way(model) > 1:  # a model that calls itself
            self._depth += 1
            return
        if self._inside:  # an interrupt ended the last forward, and no hook saw it
            self.forward_ends(finished=False)
        batch, self._next_batch = self._next_batch, None
        if not torch.is_grad_enabled() or not self._may_count():
            return
        self._begin_anew_if_skipped()
        self._reset_forward()
        self._inside = True
        self._gathered = internals.is_fully_sharded(model)
        masks = BatchMasks({**bind_batch(model, args, kwargs), **(batch or {})}, getattr(model, "config", None))
        self.masks.begin(masks)
        self._first_sample, self._terms_before = self.samples_seen, self.terms
        self.samples_seen += masks.samples
        self.terms = self.terms + masks.terms
        self.forward_begins()

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if model is not self._model() or not self._inside or in_backward():
            return
        if self._depth:
            self._depth -= 1
            return
        finished = output is not None or sys.exc_info()[0] is None  # else the loss has no such terms
        self.forward_ends(finished)
        if finished:
            self.flush()
        self._inside = False

    def is_collecting(self) -> bool:
        """Whether a module that is called now counts."""
        if not self._may_count():
            return False
        return torch.is_grad_enabled() or (self._inside and internals.in_reentrant_checkpoint())

    def _may_count(self) -> bool:
        return self.enabled and not in_backward() and not internals.in_transform()

    def _layer_hook(self, layer: Layer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            a = call_input(args, kwargs)
            if a is None or not self.is_collecting() or id(module) not in self._modules:  # a copy has our hooks
                return
            weight = module._parameters.get("weight")
            if weight is not None and weight is not layer.weight and not self._gathered:
                return  # another parameter was put in its place: not one that is trained here
            start = time.perf_counter()
            self._begin_anew_if_skipped()
            self.gradients.follow(output, self.live_weight(layer))
            self.layer_called(Call(layer, a, output, output._version))
            self.seconds += time.perf_counter() - start

        return hook

    def live_weight(self, layer: Layer) -> Tensor:
        """The weight that a forward pass which is under way works with: FSDP2 puts the whole one there."""
        return layer.module.weight if self._gathered else layer.weight

    def layer_called(self, call: Call) -> None:
        """Sum a call of a layer, or hold it until the forward pass is over if its group is not known yet."""
        name = call.layer.name
        if not self.armed:
            return
        if name in self.topology.of_layer:
            if name in self.topology.unseen:
                self._warn_once(
                    f"layer '{name}' is called for the first time after the first factor step. What follows it is not "
                    "known and counts as the identity (φ' = 1), and it shares no factor. To have it looked at: call "
                    "every layer in the first step, or make LNGD anew"
                )
            self.observe(call)
        elif not self.topology.frozen:
            if not self._inside and any(other.layer is call.layer for other in self._pending):
                self.flush()  # parts of the model called by themselves: hold no more than one call of each
            self._pending.append(call)
            self.held(call)

    def held(self, call: Call) -> None:
        """A call is held, see :meth:`layer_called`."""

    def flush(self) -> None:
        """Place the layers that this forward showed for the first time into groups, then take in their calls."""
        pending, self._pending = self._pending, []
        shared: list[tuple[Tensor, Group]] = []
        for call in pending:
            name = call.layer.name
            if name in self.topology.of_layer:
                continue
            source, follows = self.masks.of(call.layer, call.a, call.output), self.follows(call)
            if follows or not self.shares:
                self.topology.add(name, follows, source)
                continue
            group = next((g for a, g in shared if same_tensor(a, call.a) and self._compatible(call.layer, g)), None)
            if group is None:
                shared.append((call.a, self.topology.add(name, (), source)))
            else:
                self.topology.join(name, group)
        for call in pending:
            self.observe(call)

    def follows(self, call: Call) -> tuple[str, ...]:
        """What follows a layer and has a derivative that counts."""
        return ()

    def _compatible(self, layer: Layer, group: Group) -> bool:
        first, limit = self.layers[group.name], self.config.max_factor_dim
        # λ of the paper's damping depends on m
        same_width = layer.m == first.m or self.config.damping != "paper"
        same_rows = layer.geometry.reads_like(first.geometry) and (layer.bias is None) == (first.bias is None)
        # the state of a layer has one shape, whoever it shares with
        return same_width and same_rows and factor_blocks(layer, limit) == factor_blocks(first, limit)

    def observe(self, call: Call) -> None:
        """Add a call to the statistics of its group."""
        found = self.select(call)
        if found is None:
            return
        statistics, a, mask, _ = found
        assert isinstance(statistics, InputStatistics)
        with torch.no_grad():
            for rows, where in call.layer.inputs(a):
                statistics.add(rows, None if mask is None else mask[where])

    def select(self, call: Call) -> tuple[Statistics, Tensor, Tensor | None, slice] | None:
        """What of a call is summed: its group's statistics, the input (samples that count), which of its N tokens
        count [N] or None, and which samples of the batch those are. None: a member of its group has summed it."""
        layer, a = call.layer, call.a
        group = self.topology.of_layer[layer.name]
        if len(group.members) > 1:  # its Φ is summed at the first member's call with this tensor
            last = self._last_input.get(group.name)
            if last is not None and same_tensor(last(), a):
                return None
            self._last_input[group.name] = weakref.ref(a)
        mask, samples = self.masks.mask(group.source, layer, a, call.output), slice(None)
        if layer.is_convolution and self.convolution_samples > 1:
            # counted over the micro-batches of a step, so that how a batch is split changes nothing
            samples = slice(-self._first_sample % self.convolution_samples, None, self.convolution_samples)
            mask = None if mask is None else mask.view(layer.locations(call.output))[samples].flatten()
        if group.name not in self.statistics:
            self.statistics[group.name] = self.new_statistics(group)
        whole, statistics = layer.batched(a.detach()), self.statistics[group.name]
        chosen = whole[samples]
        statistics.seen += whole.shape[0]
        statistics.kept += chosen.shape[0]
        return statistics, chosen, mask, samples

    def empty_statistics(self, name: str) -> Statistics:
        """Those of a group of which this process saw nothing."""
        return self.new_statistics(self.topology.of_layer[name])

    def new_statistics(self, group: Group) -> Statistics:
        """What this step's statistics of a group begin with."""
        first = self.layers[group.name]
        return InputStatistics(first.units, factor_blocks(first, self.config.max_factor_dim))
