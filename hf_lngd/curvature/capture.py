"""Hooks: which tensors are looked at, and when.

Hooks are attached for factor steps only (each step under ``rate="adaptive"``), from the end of one ``step()`` to the
next, so a factor step takes in all its micro-batches and nothing is left in the model between. A forward pass counts
if gradients are enabled where it starts; evaluation and recomputation by activation checkpointing never count.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..config import LNGDConfig
from .chains import Chain, ChainWatch, Pending
from .compiled import run_eagerly
from .context import Hook, calls_under_way, in_backward, in_reentrant_checkpoint, in_transform
from .dropped import Gradients
from .families import new_sums
from .family_sums import Basis, FamilySums
from .fisher import Call, FisherSource, accumulator, origin, runs
from .layers import Layer, call_input
from .links import is_elementwise
from .masks import OPEN, BatchMasks, bind_batch
from .notices import Notices
from .patches import MIB_OF_FLOATS
from .streams import Streams
from .sums import GroupSums, RowSamples
from .topology import HEADS, Group, Topology, head_link, same_tensor


class Capture:
    """Watches a model's layers and pools their statistics between two steps.

    Args:
        model: the model whose forward starts a batch.
        layers: the layers owned by LNGD.
        source: where g² comes from.
        config: the optimizer's.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], source: FisherSource, config: LNGDConfig) -> None:
        self._model = weakref.ref(model)
        self.layers = {layer.name: layer for layer in layers}
        self._owned = {id(module) for layer in layers for _, module in layer.modules}
        self.source, self.config = source, config
        self._rate_rows = config.rate_rows if config.rate == "adaptive" else 0
        self.topology, self.notices = Topology(), Notices()
        self.gradients = Gradients(lambda: (layer.weight for layer in layers))
        self.enabled = True
        self.closed = False
        self.seconds = 0.0
        self._watch, self._streams = ChainWatch(config.chain == "full"), Streams()
        self._watching = False
        self._handles: list[RemovableHandle] = []
        self._factors_wanted = False
        self._basis_of: Callable[[str], Basis | None] | None = None
        self._forwards = 0
        self._next_batch: Mapping[str, Any] | None = None
        self.terms: Tensor | int = 0
        self._reset_forward()
        self.reset()

    @property
    def model(self) -> nn.Module | None:
        """The model, as long as it lives."""
        return self._model()

    # Life of a step

    def reset(self) -> None:
        """Forget what was gathered for the current step."""
        self.sums: dict[str, GroupSums | FamilySums] = {}
        self.rows: dict[str, RowSamples] = {}
        self.rows_hidden: set[str] = set()  # layers whose outputs had no graph, as within a reentrant checkpoint
        self.terms = 0
        self.doubtful = False
        self.gradients.reset()
        self.rows_seen = 0
        self._pending: list[Pending] = []
        self._unfinished: set[Chain] = set()
        self.source.reset()

    def close(self) -> None:
        """Remove every hook, for good."""
        self.closed = True
        self.disarm()
        self.reset()

    def arm(self, factors: bool, basis_of: Callable[[str], Basis | None] | None = None) -> None:
        """Attach what the coming step needs: factor hooks, row samples, or nothing. Nothing at all once closed.

        Args:
            factors: it is a factor step.
            basis_of: group → the coordinates in which its sums are wanted, see `FamilyBank.basis_of`.
        """
        self.disarm()
        self.reset()
        self._basis_of = basis_of
        self._factors_wanted = factors
        model = self._model()
        if self.closed or model is None or not self.layers or not (factors or self._rate_rows):
            return
        add = self._handles.append
        add(model.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True))
        add(model.register_forward_hook(Hook(self._after_forward), with_kwargs=True, always_call=True))
        run_eagerly(self, self.enabled)
        for layer in self.layers.values():
            for _, module in layer.modules:
                # FSDP2's own hook, which takes the weight away, comes after it
                first = bool(layer.sharded)
                add(module.register_forward_hook(Hook(self._layer_hook(layer)), with_kwargs=True, prepend=first))
        if not factors:
            return
        seeks = not self.topology.frozen or any(group.stream == OPEN for group in self.topology.groups)
        for name, module in model.named_modules():
            if is_elementwise(module) and not self.source.uses_gradients:
                add(module.register_forward_pre_hook(Hook(self._before_activation), with_kwargs=True))
                add(module.register_forward_hook(Hook(self._after_activation)))
            elif seeks:
                self._handles.extend(self._streams.attach(name, module))

    def disarm(self) -> None:
        """Remove every hook."""
        self._reset_forward()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        run_eagerly(self, False)

    def watch(self, enabled: bool) -> None:
        """Look at forward passes, or look away: then compiled models may run compiled."""
        self.enabled = enabled
        run_eagerly(self, enabled and bool(self._handles))

    def look_round(self, trained: Iterable[nn.Parameter]) -> None:
        """Tell of parameters of the model that have a gradient and are none of these."""
        model = self._model()
        if model is not None:
            self.notices.strangers(model, trained)

    def set_batch(self, inputs: Mapping[str, Any]) -> None:
        """Name the tensors of the next forward, where the model does not see them all (labels taken out)."""
        self._next_batch = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}

    def finish(self, share: Callable[[Any], list[Any]] = lambda own: [own]) -> dict[str, GroupSums | FamilySums]:
        """Close the step: settle what is open, freeze the topology, hand over the sums.

        Args:
            share: own topology → that of every rank.
        """
        self.settle()
        if not self.topology.frozen:
            self.topology.learn(share(self.topology.state()))
            if self.topology.groups:
                self.topology.freeze(list(self.layers))
        return self.sums

    # Hooks

    def _stop_watching(self) -> None:
        """Leave the function mode; also after an interrupt, which no hook sees."""
        if self._watching:
            self._watching = False
            self._watch.remove()

    def _reset_forward(self) -> None:
        self._stop_watching()
        self._inside = False
        self._depth = 0
        self._first_row, self._terms_before = 0, self.terms
        self._streams.begin(BatchMasks({}))
        self._last_input: dict[str, weakref.ref[Tensor]] = {}
        self._watch.clear()

    def _forget_forward(self) -> None:
        """Of a forward that was not finished nothing is counted but what its layers summed already."""
        self._pending, self._unfinished = [], set()
        self.rows_seen, self.terms = self._first_row, self._terms_before
        self._watch.clear()

    def _forget_skipped(self) -> None:
        """A forward begins: what is in doubt still, or has no gradients left, was of a step left out."""
        if self.doubtful or self.gradients.gone:
            self.reset()

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self._model():  # a copy or replica of the model has our hooks
            return
        if self._inside and calls_under_way(model) > 1:  # a model that calls itself
            self._depth += 1
            return
        if self._inside:  # an interrupt ended the last forward, and no hook saw it
            self._forget_forward()
        batch, self._next_batch = self._next_batch, None
        if not self.enabled or not torch.is_grad_enabled() or in_backward() or in_transform():
            return
        self._forget_skipped()
        self._reset_forward()
        self._inside = True
        self._forwards += 1
        bound = bind_batch(model, args, kwargs)
        masks = BatchMasks({**bound, **(batch or {})}, getattr(model, "config", None))
        self._streams.begin(masks)
        self._first_row, self._terms_before = self.rows_seen, self.terms
        self.rows_seen += masks.rows
        self.terms = self.terms + masks.terms
        if self._factors_wanted and not self.source.uses_gradients:
            self._watching = True
            self._watch.__enter__()

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if model is not self._model() or not self._inside or in_backward():
            return
        if self._depth:
            self._depth -= 1
            return
        self._stop_watching()
        raised = output is None and sys.exc_info()[0] is not None
        if raised:  # its chains are cut off, the loss has no such terms
            self._forget_forward()
        else:
            self.settle(output)
        self._inside = False

    def _active(self) -> bool:
        if not self.enabled or in_backward() or in_transform():
            return False
        return torch.is_grad_enabled() or (self._inside and in_reentrant_checkpoint())

    def _layer_hook(self, layer: Layer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            a = call_input(args, kwargs)
            if a is None or not self._active() or id(module) not in self._owned:  # a copy of the model has our hooks
                return
            start = time.perf_counter()
            self._forget_skipped()
            self.gradients.follow(output, layer.live_weight)
            if self._rate_rows:
                self._keep_rows(layer, a, output)
            if self._factors_wanted:
                if layer.name in self.topology.of_layer:
                    self._meet(layer, a, output)
                elif not self.topology.frozen:
                    if not self._inside and any(p.layer is layer for p in self._pending):
                        self.settle()  # parts of the model called by themselves: hold no more than one call of each
                    chain = Chain(None)
                    self._pending.append(Pending(layer, a, output, chain, output._version))
                    if self.source.uses_gradients:  # of the output as it is now, whatever works on it in place
                        self.settle()
                    else:
                        self._watch.follow(output, chain)
            self.seconds += time.perf_counter() - start

        return hook

    def _before_activation(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._active():
            self._watch.enter_module(module, call_input(args, kwargs))

    def _after_activation(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._active():
            self._watch.leave_module(output)

    # What they gather

    def settle(self, model_output: Any = None) -> None:
        """Place the layers that this forward showed for the first time into groups, then take in their calls.

        Args:
            model_output: what the model returned, whose logits tell the head.
        """
        pending, self._pending = self._pending, []
        for chain in list(self._unfinished):
            chain.finish()
        self._watch.clear()
        shared: list[tuple[Tensor, Group]] = []
        for p in pending:
            if p.layer.name in self.topology.of_layer:
                continue
            stream = self._streams.of(p.layer, p.a, p.output)
            links = p.chain.names()
            if not links and self.config.head == "categorical" and not self.source.uses_gradients:
                classes = p.layer.out_features if p.output._version == p.version and p.layer.units == 1 else 0
                links = head_link(p.output, classes, model_output, getattr(self._model(), "config", None))
            if links or self.source.differs_by_layer:
                self.topology.add(p.layer.name, links, stream)
                continue
            group = next((g for tensor, g in shared if same_tensor(tensor, p.a) and self._compatible(p.layer, g)), None)
            if group is None:
                shared.append((p.a, self.topology.add(p.layer.name, (), stream)))
            else:
                self.topology.join(p.layer.name, group)
        for p in pending:
            group = self.topology.of_layer[p.layer.name]
            same = p.chain.names() == group.links  # else called twice, and only once with these links behind it
            self._observe(p.layer, p.a, p.output, p.chain.slope() if same else None)

    def _compatible(self, layer: Layer, group: Group) -> bool:
        first = self.layers[group.name]
        # λ of the paper's damping depends on m
        same_width = layer.out_features == first.out_features or self.config.damping != "paper"
        same_rows = layer.geometry.reads_like(first.geometry)
        return same_width and same_rows and (layer.bias_name is None) == (first.bias_name is None)

    def _meet(self, layer: Layer, a: Tensor, output: Tensor) -> None:
        """A call of a layer whose group is known: summed now, or as soon as what follows it has passed."""
        if layer.name in self.topology.unseen:
            self.notices.late_layer(layer.name)
        links = self.topology.of_layer[layer.name].links
        if not links or links in HEADS or self.source.uses_gradients:
            return self._observe(layer, a, output, None)

        def done(chain: Chain) -> None:
            self._unfinished.discard(chain)
            self._observe(layer, a, output, chain.slope())

        if not self._inside:  # parts of the model called by themselves: hold no more than one call of each
            for chain in [chain for chain in self._unfinished if chain.owner == layer.name]:
                chain.finish()
                self._watch.drop(chain)
        chain = Chain(links, done, layer.name)
        self._unfinished.add(chain)
        self._watch.follow(output, chain)

    def _observe(self, layer: Layer, a: Tensor, output: Tensor, slope: Tensor | None) -> None:
        group = self.topology.of_layer[layer.name]
        if len(group.members) > 1:  # its Φ is summed at the first member's call with this tensor
            last = self._last_input.get(group.name)
            if last is not None and same_tensor(last(), a):
                return
            self._last_input[group.name] = weakref.ref(a)
        shape = layer.positions(output)
        mask = self._streams.mask(group, layer, a, output)
        rows = slice(None)
        if layer.is_convolution and self.config.conv_rows > 1:
            # counted over the micro-batches of a step, so that how a batch is split changes nothing
            rows = slice(-self._first_row % self.config.conv_rows, None, self.config.conv_rows)
            mask = None if mask is None else mask.view(shape)[rows].flatten()
        most = self.config.conv_memory * MIB_OF_FLOATS
        whole, sums = layer.batched(a.detach()), self._sums(group)
        call = Call(sums, layer, whole[rows], mask, rows, most)
        sums.seen += whole.shape[0]
        sums.kept += call.a.shape[0]
        if group.links in HEADS:
            self.source.observe_head(call, output, group.links == HEADS[1])
        else:
            plain = slope is None and group.links and not self.source.uses_gradients
            self.source.observe(call, output, torch.ones_like(output) if plain else slope)

    def _sums(self, group: Group) -> GroupSums | FamilySums:
        if group.name not in self.sums:
            self.sums[group.name] = self.empty_sums(group)
        return self.sums[group.name]

    def empty_sums(self, group: Group) -> GroupSums | FamilySums:
        """What this step's sums of a group begin with."""
        members = [self.layers[name] for name in group.members]
        basis = None if self._basis_of is None else self._basis_of(group.name)
        return new_sums(members, self.config, basis, group.estimates_psi(self.config.fisher))

    def _keep_rows(self, layer: Layer, a: Tensor, output: Tensor) -> None:
        if not output.requires_grad:
            self.rows_hidden.add(layer.name)
            return
        start = -self._first_row % self._rate_rows if self._inside else 0
        forward = self._forwards
        whole = layer.batched(a.detach())
        kept = whole[start :: self._rate_rows].clone()
        samples, shape = self.rows.setdefault(layer.name, RowSamples()), output.shape
        samples.seen += whole.shape[0]
        samples.kept += kept.shape[0]

        weight = accumulator(layer.live_weight)

        def receive(g: Tensor | None) -> None:
            if g is None or self.source.in_pass or not runs(weight):
                return
            samples.add(forward, kept, layer.batched(g.detach().view(shape))[start :: self._rate_rows].clone())

        origin(output).register_hook(receive)
