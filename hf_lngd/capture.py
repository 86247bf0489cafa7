"""Forward hooks: a layer's input becomes a statistic of its group.

Hooks are attached for factor steps only, from the end of one ``step()`` to the next, so a factor step takes in all its
micro-batches and nothing is left in the model between. What a call adds waits, without the activations, until a
backward pass brings the layer's weight a gradient: a forward pass without one counts for nothing. Recomputation by
activation checkpointing counts where that gradient goes through it. `paper.capture` adds what the paper needs."""

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
from .torch_internals import Collector, Hook, call_input, is_sharded, run_eagerly, same_tensor

logger = logging.getLogger("hf_lngd")

# What a reentrant checkpoint's segment is given to keep: layer → its calls, until they are recomputed.
_SEGMENT = "_lngd_calls"
# Of the samples of a batch one in so many estimates the factors of a convolution.
CONVOLUTION_SAMPLES = 8
# After so many steps a layer that had no gradient yet is named.
IDLE_STEPS = 20


@dataclass(frozen=True)
class Coming:
    """The step that hooks are attached for: steps made before it; this process's number among those that train the
    model, and how many they are; group → the bank of its factor, once something was derived from it."""

    step: int = 0
    rank: int = 0
    size: int = 1
    bank_of: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Pass:
    """One forward pass of the model: samples of its batch, terms of its mean loss, and samples of the step before it.

    `step`: the one that it was counted in last, see `Capture.taken`."""

    samples: int = 0
    terms: Tensor | int = 0
    first: int = 0
    step: int = -1


@dataclass(eq=False)
class Sums:
    """What one call, or several that read the same tensor, add to their group; `step` as of `Pass`."""

    group: Group
    statistics: Statistics
    step: int = -1


@dataclass(eq=False)
class Expected:
    """What stays of a call until its gradient comes; `note`: what a subclass of `Capture` has to remember."""

    layer: Layer
    forward: Pass
    sums: Sums | None = None
    note: Any = None


@dataclass(eq=False)
class Call:
    """One call of a layer: its input and output; its group, once that is known; `note`: what a subclass has to
    remember."""

    layer: Layer
    a: Tensor
    output: Tensor
    expected: Expected
    group: Group | None = None
    note: Any = None


class Capture(Collector):
    """Collects the statistics of a model's layers between two steps; the model's forward starts a batch.

    Attributes:
        topology: who shares a factor with whom.
        statistics: of this step, by group.
        samples_seen, terms: samples of this step, and terms of its mean loss.
        seconds: spent in hooks."""

    convolution_samples = CONVOLUTION_SAMPLES
    shares = True  # layers that read the same tensor have one factor
    needs_fisher_pass = False

    def __init__(self, model: nn.Module, layers: list[Layer], config: LNGDConfig) -> None:
        self._step = 0  # counts what was begun, also what was forgotten
        super().__init__(lambda: (layer.weight for layer in self.layers.values()))
        self._model = weakref.ref(model)
        self.layers = {layer.name: layer for layer in layers}
        self._modules = {id(module) for layer in layers for _, module in layer.modules}
        self.config = config
        self.topology = Topology()
        self.armed = False
        self.seconds, self.masks, self.coming = 0.0, MaskSources(), Coming()
        self._pending: list[Call] = []
        self._order: dict[str, int] = {}  # layer → when it was first called
        self._next_batch: Mapping[str, Any] | None = None
        self._warned: set[str] = set()
        self._idle, self._watched = list(self.layers), 0  # layers without a gradient in so many steps
        self._reset_forward()

    @property
    def model(self) -> nn.Module | None:
        """The model, as long as it lives."""
        return self._model()

    def forget(self) -> None:
        super().forget()
        self._step += 1
        self.statistics: dict[str, Statistics] = {}
        self.samples_seen: int = 0
        self.terms: Tensor | int = 0

    def wants_hooks(self, factors: bool) -> bool:
        """Whether the coming step needs any."""
        return factors

    def arm(self, factors: bool, coming: Coming) -> None:
        """Attach the hooks that the coming step (a factor step or none) needs; nothing at all once closed."""
        self.coming = coming
        self.disarm()
        self.forget()
        self.armed, self._pending = factors, []
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
        """Close the step: freeze the topology (`all_gather`: own one → that of every rank), hand over the
        statistics."""
        unknown = [name for name in self.topology.unseen if self.layers[name].weight.grad is not None]
        if unknown or not self.topology.frozen:
            self.topology.groups.sort(key=lambda group: self._order.get(group.name, -1))
            found = Topology.common(all_gather(self.topology.state()))
            if found.groups:
                found.freeze(list(self.layers))
            if found != self.topology:
                self.topology = found
        known = {group.name: group for group in self.topology.groups}
        kept = self.statistics.items()
        # another rank has told another group's layers apart, or found something else behind them
        self.statistics = {
            n: own for n, own in kept if n in known and own.shapes() == self.empty_statistics(n).shapes()
        }
        return self.statistics

    def warn_of_untrained(self, trained: Iterable[nn.Parameter]) -> None:
        """Warn once of the parameters of the model that have a gradient and are in no parameter group."""
        model, known = self._model(), set(trained)
        named = () if model is None else model.named_parameters()
        self._warn_once(
            [name for name, parameter in named if parameter.grad is not None and parameter not in known],
            "parameters have a gradient and are not trained: %s. They were frozen, or no part of the model, when LNGD "
            "was made. To have them trained: optimizer.add_param_group({'params': [...]}) (AdamW), or make LNGD anew",
        )

    def warn_of_idle(self) -> None:
        """In the step in which they have had no gradient `IDLE_STEPS` times, warn of layers that never had one."""
        self._idle = [name for name in self._idle if self.layers[name].weight.grad is None]
        self._watched += 1
        if self._watched == IDLE_STEPS:
            self._warn_once(
                self._idle,
                f"layers had no gradient in {IDLE_STEPS} steps and are as they were: %s. The model does not call them, "
                "or its loss does not depend on them",
            )

    def _warn_once(self, names: list[str], text: str) -> None:
        """Name those that were not named before in one warning, in the place of %s."""
        names = [name for name in names if name not in self._warned]
        self._warned.update(names)
        shown = ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
        if names:
            logger.warning(f"LNGD: {text}", shown)

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

    def check_gradients(self) -> None:
        """Raise RuntimeError if a step lacks what it needs of every one."""

    def check(self) -> None:
        """Warn once of layers that have a gradient, not of zeros (as a layer that was left out may have), and had no
        statistics so far, see :meth:`finish`."""
        seen = set(self.topology.of_layer) - self.topology.unseen
        unseen = [(n, y.weight.grad) for n, y in self.layers.items() if n not in seen and n not in self._warned]
        missing = [name for name, grad in unseen if grad is not None and bool(grad.any())]
        stance = internals.stance_in_the_way()
        self._warn_once(
            missing,
            "no forward pass was seen of %s, whose inputs therefore count as white (Φ = I). Modules have to be called, "
            "with strided tensors (F.linear(x, layer.weight) is not seen), after LNGD was made and without "
            "optimizer.eval()"
            + ("" if stance is None else f"; compiled ones without torch.compiler.set_stance, got {stance!r}"),
        )

    def _reset_forward(self) -> None:
        self._inside, self._gathered = 0, False
        self._pass = Pass()
        self.masks.begin(BatchMasks({}))
        self._last_input: dict[int, tuple[weakref.ref[Tensor], Sums]] = {}

    def forward_begins(self) -> None:
        """A forward pass that may count begins."""

    def forward_ends(self, finished: bool) -> None:
        """It is over; not finished: of its calls in which something was waited for nothing is counted."""
        if not finished:
            self._pending = []

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self._model():  # a copy or replica of the model has our hooks
            return
        if not torch.is_grad_enabled() or not self._may_count():
            return
        calls = internals.calls_under_way(model)
        if self._inside and calls > self._inside:  # a model that calls itself
            return
        if self._inside:  # an interrupt ended the last forward, and no hook saw it
            self.forward_ends(finished=False)
        self.flush()  # of parts of the model that were called by themselves
        batch, self._next_batch = self._next_batch, None
        self._reset_forward()
        self._inside = calls
        self._gathered = internals.is_fully_sharded(model)
        masks = BatchMasks({**bind_batch(model, args, kwargs), **(batch or {})}, getattr(model, "config", None))
        self.masks.begin(masks)
        self._pass = Pass(masks.samples, masks.terms, self.samples_seen)
        self.forward_begins()

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if model is not self._model() or not self._inside or not torch.is_grad_enabled():
            return
        if internals.calls_under_way(model) > self._inside:
            return
        self.forward_ends(output is not None or sys.exc_info()[0] is None)
        self.flush()
        self._inside = 0

    def is_collecting(self) -> bool:
        """Whether a module that is called now may count."""
        if not self._may_count():
            return False
        return torch.is_grad_enabled() or (self._inside > 0 and internals.reentrant_segment() is not None)

    def _may_count(self) -> bool:
        strange = internals.in_transform() or torch.jit.is_tracing() or internals.in_discarded_recomputation()
        return self.enabled and not strange

    def _layer_hook(self, layer: Layer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            a = call_input(args, kwargs)
            if a is None or not self.is_collecting() or id(module) not in self._modules:  # a copy has our hooks
                return
            weight = module._parameters.get("weight")
            if weight is not None and weight is not layer.weight and not self._gathered:
                return  # another parameter was put in its place: not one that is trained here
            if a.layout != torch.strided or a.is_nested:  # sparse or jagged
                return
            start = time.perf_counter()
            self._called(layer, a, output)
            self.seconds += time.perf_counter() - start

        return hook

    def _called(self, layer: Layer, a: Tensor, output: Tensor) -> None:
        with_graph = torch.is_grad_enabled()
        segment = None if with_graph and not internals.in_backward() else internals.reentrant_segment()
        calls = [] if segment is None else vars(segment).setdefault(_SEGMENT, {}).setdefault(layer.name, [])
        if with_graph and calls:  # recomputed: of the call that was seen in the forward pass
            calls.append(calls.pop(0))
            self._expect(calls[-1], output)
            return
        expected = Expected(layer, self._pass)
        if not with_graph:
            calls.append(expected)
        elif output.requires_grad:
            self._expect(expected, output)
        else:
            return
        self.layer_called(Call(layer, a, output, expected))

    def _expect(self, expected: Expected, output: Tensor) -> None:
        def take(gradient: Tensor) -> None:
            start = time.perf_counter()
            if expected.sums is None:
                self.flush()
            self.taken(expected, gradient.view(shape))
            self.seconds += time.perf_counter() - start

        layer, shape = expected.layer, output.shape
        # what the forward pass works with: FSDP2 puts whole weights there
        self.follow(output, layer.module.weight if self._gathered else layer.weight, take)

    def taken(self, expected: Expected, gradient: Tensor) -> None:
        """A call's gradient has come: it counts, once a step, and so does its forward pass."""
        forward, sums = expected.forward, expected.sums
        if forward.step != self._step:
            forward.step = self._step
            self.samples_seen += forward.samples
            self.terms = self.terms + forward.terms
        if sums is not None and sums.step != self._step:
            sums.step = self._step
            total = self.total(sums.group)
            if total.shapes() == sums.statistics.shapes():  # else other passes found something else behind the layer
                total.merge(sums.statistics)

    def total(self, group: Group) -> Any:
        """The step's statistics of a group, which is entered into the topology if it is new."""
        if not self.topology.unseen.isdisjoint(group.members):
            self.topology = self.topology.without(group.members)
        name = self.topology.enter(group).name
        if name not in self.statistics:
            self.statistics[name] = self.empty_statistics(name)
        return self.statistics[name]

    def layer_called(self, call: Call) -> None:
        """Sum a call of a layer, or hold it until the forward pass is over if its group is not known yet."""
        if not self.armed:
            return
        name = call.layer.name
        if name in self.topology.of_layer and name not in self.topology.unseen:
            call.group = self.topology.of_layer[name]
            self.observe(call)
            return
        if not self._inside and any(other.layer is call.layer for other in self._pending):
            self.flush()  # parts of the model called by themselves: hold no more than one call of each
        self._pending.append(call)
        self.held(call)

    def held(self, call: Call) -> None:
        """A call is held, see :meth:`layer_called`."""

    def flush(self) -> None:
        """Tell the groups of the layers that this forward showed for the first time, then take in their calls."""
        pending, self._pending = self._pending, []
        shared: list[tuple[Tensor, Group]] = []
        of_layer: dict[str, Group] = {}
        for call in pending:
            name = call.layer.name
            if name in of_layer:
                continue
            source, follows = self.masks.of(call.layer, call.a, call.output), self.follows(call)
            alone = bool(follows) or not self.shares
            others = [] if alone else [g for a, g in shared if same_tensor(a, call.a)]
            group = next((g for g in others if self._compatible(call.layer, g)), None)
            if group is None:
                group = Group([], follows, source)
                shared += [] if alone else [(call.a, group)]
            self._order.setdefault(name, len(self._order))
            group.members.append(name)
            of_layer[name] = group
        for call in pending:
            call.group = of_layer[call.layer.name]
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
        """Sum what a call adds to the statistics of its group."""
        found = self.select(call)
        if found is None:
            return
        statistics, a, mask, _ = found
        assert isinstance(statistics, InputStatistics)
        with torch.no_grad():
            for rows, where in call.layer.inputs(a):
                statistics.add(rows, None if mask is None else mask[where])

    def select(self, call: Call) -> tuple[Statistics, Tensor, Tensor | None, slice] | None:
        """What of a call is summed, and where: new statistics, the input (samples that count), which of its N tokens
        count [N] or None, and which samples of the batch those are. None: a member of its group has summed it."""
        layer, a, group = call.layer, call.a, call.group
        assert group is not None
        last, sums = self._last_input.get(id(group), (None, None))
        if last is not None and same_tensor(last(), a):  # Φ is summed at the first member's call with this tensor
            call.expected.sums = sums
            return None
        mask, samples = self.masks.mask(group.source, layer, a, call.output), slice(None)
        if layer.is_convolution and self.convolution_samples > 1:
            # counted over the micro-batches of a step, so that how a batch is split changes nothing
            samples = slice(-self._pass.first % self.convolution_samples, None, self.convolution_samples)
            mask = None if mask is None else mask.view(layer.locations(call.output))[samples].flatten()
        statistics = self.new_statistics(group)
        sums = call.expected.sums = Sums(group, statistics)
        if len(group.members) > 1:
            self._last_input[id(group)] = (weakref.ref(a), sums)
        whole = layer.batched(a.detach())
        chosen = whole[samples]
        statistics.seen, statistics.kept = whole.shape[0], chosen.shape[0]
        return statistics, chosen, mask, samples

    def empty_statistics(self, name: str) -> Statistics:
        """Those of a group of which this process saw nothing."""
        return self.new_statistics(self.topology.of_layer[name])

    def new_statistics(self, group: Group) -> Statistics:
        """What this step's statistics of a group begin with."""
        first = self.layers[group.name]
        return InputStatistics(first.units, factor_blocks(first, self.config.max_factor_dim))
