"""`Core`: everything of the optimizer that has state, below `LNGD`.

What belongs to one parameter stands in ``states[parameter]``, as torch's tools expect, as views of the batches' tensors
where these compute for many layers at once. What layers share (Φ) stands in the state of each of them, one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adamw import AdamW, EmbeddingTable, States
from .batches import LayerBatch, balanced, layer_batches
from .capture import Capture, Coming
from .config import LNGDConfig
from .directions import Polar
from .factors import Bank, FactorSpec, factor_banks
from .layers import Layer, factor_blocks
from .linalg import state_dtype
from .method import Method
from .routing import Routing, check_precision
from .statistics import Statistics, reduce
from .topology import Topology
from .torch_internals import Collector
from .work import flops_beside, flops_of_token, flops_of_update, interval_for


def method_of(config: LNGDConfig) -> Method:
    """The default method, or one of the paper's and its rivals, which is imported only when it is asked for."""
    default = config.fisher == "expected" and config.direction == "polar" and config.rate in ("rms", "none")
    if config.family == "lngd" and default:
        direction = Polar(config)
        # φ' = 1: E[a aᵀ] is kept, Φ is m times that
        return Method(Capture, direction, lambda s: factor_banks(s, direction.factor, config), lambda _, m: float(m))
    from .paper import method_of as paper_method

    return paper_method(config)


@dataclass
class Entry:
    """A tensor of the state that belongs to a layer.

    Attributes:
        layer: by its name, the layer.
        value: the live tensor on this process, a view of a batch's; None: another process has it.
        group: whose owner has it; None: every process has it, or rows of it.
        shared: it is the same tensor for all members of the group.
        shape, like: of the whole tensor, and a tensor with its dtype and device."""

    layer: str
    parameter: nn.Parameter
    key: str
    value: Tensor | None
    group: str | None
    shared: bool
    shape: torch.Size
    like: Tensor


@dataclass
class Built:
    """Banks and batches for a topology; none before the first step.

    Attributes:
        group_of: layer → the name of its group.
        bank_of: group → its bank, of those that this process keeps.
        turn_of: layer → in which of `Core.interval` steps it is updated.
        momentum: of the parameters in layers, in their shape, of those that this process keeps; sharded as they are.
        entries: every tensor of the layers' state, also those that other processes have; in the same order on all."""

    topology: Topology = field(default_factory=Topology)
    banks: list[Bank] = field(default_factory=list)
    batches: list[LayerBatch] = field(default_factory=list)
    group_of: dict[str, str] = field(default_factory=dict)
    bank_of: dict[str, Bank] = field(default_factory=dict)
    turn_of: dict[str, int] = field(default_factory=dict)
    momentum: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)


class Core:
    """Layers, factors, momenta, AdamW's moments, and the statistics that are collected for them.

    Args:
        layout: which process keeps what, see `parallel.layout`.

    Attributes:
        states: parameter → name → tensor; the optimizer's own mapping.
        in_layers: the parameters of layers; `tables`: embeddings with a rule of their own, by parameter.
        turns: of the state: the interval that was decided, operations of forward and backward in the factor steps
            since training began, their number; zeros: none yet.
        interval: steps between two updates of a layer.
        started: there are factors and whiteners, so that the next ones can wait for their interval."""

    def __init__(self, model: nn.Module, config: LNGDConfig, routing: Routing, layout: Any, states: States) -> None:
        self.config, self.routing, self.layout, self.states = config, routing, layout, states
        self.method = method_of(config)
        self.capture = self.method.capture(model, routing.layers, config)
        self.adamw = AdamW()
        self.embeddings = [
            EmbeddingTable(name, routing.parameters[name], modules, config) for name, modules in routing.embeddings
        ]
        self.collectors: list[Collector] = [self.capture, *self.embeddings]
        self.count = torch.zeros((), dtype=torch.float32, device="cpu")  # steps made, the layers' ``step``
        self.turns = torch.zeros(3, dtype=torch.float32, device="cpu")
        self.set_turns(self.turns)
        self.skipped_gradients: Tensor | int = 0
        self.built = Built()
        self.started = False
        self.read_parameters()

    @property
    def banks(self) -> list[Bank]:
        return self.built.banks

    @property
    def batches(self) -> list[LayerBatch]:
        return self.built.batches

    def read_parameters(self) -> None:
        """Take the routing's parameters: they have changed."""
        parameters = self.routing.parameters
        for layer in self.routing.layers:
            layer.weight = parameters[layer.weight_name]
            layer.bias = None if layer.bias_name is None else parameters[layer.bias_name]
        for table in self.embeddings:
            table.weight = parameters[table.name]
        self.in_layers = {parameter for layer in self.routing.layers for parameter in layer.parameters}
        self.tables: dict[Any, EmbeddingTable] = {table.weight: table for table in self.embeddings}

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter in no layer before its first step."""
        table = self.tables.get(parameter)
        return AdamW.new_state(parameter) if table is None else table.new_state()

    def build(self, topology: Topology) -> None:
        """Make banks and batches for a topology, all zeros, in place of what there was. A collective where groups have
        owners."""
        layers, limit, layout = self.capture.layers, self.config.max_factor_dim, self.layout
        group_of = {name: group.name for group in topology.groups for name in group.members}
        specs = {}
        for group in topology.groups:
            first = layers[group.name]
            specs[group.name] = FactorSpec(first, group.follows, self.method.scale(group, first.m))
        turn_of = self._turns()
        layout.assign(self._costs(topology, turn_of), group_of)
        kept = [spec for name, spec in specs.items() if layout.owners.get(name) in (None, layout.ranks.rank)]
        banks = list(self.method.banks(kept))
        bank_of = {name: bank for bank in banks for name in bank.rows}

        def key_of(layer: Layer) -> Any:
            spec = specs[group_of[layer.name]]
            return factor_blocks(layer, limit), spec.scale, bool(spec.follows)

        batches = layer_batches(self.routing.layers, key_of, group_of, bank_of, turn_of)
        self.built = built = Built(topology, banks, batches, group_of, bank_of, turn_of)
        for batch in batches:
            for parameter in (p for layer in layout.with_momentum(batch) for p in layer.parameters):
                built.momentum[parameter] = torch.zeros_like(parameter.detach(), dtype=state_dtype(parameter.dtype))
            fresh = [self.method.direction.new_state(layer) for layer in batch.layers]
            batch.state = {key: torch.cat([state[key] for state in fresh]) for key in fresh[0]} if fresh else {}
        built.entries = list(self._entries(built))

    def _entries(self, built: Built) -> Iterator[Entry]:
        layout, described = self.layout, dict[str, list[Any]]()
        kept = {y.name: list(_kept(y, batch, built.group_of[y.name])) for batch in built.batches for y in batch.layers}
        own = {name: [(key, v.shape, v.dtype, shared) for key, v, shared in found] for name, found in kept.items()}
        for found in layout.ranks.all_gather_value(own) if layout.has_owners else [own]:
            described |= found
        for layer in (layer for batch in built.batches for layer in batch.members):
            name, owner = layer.name, built.group_of[layer.name]
            for p in layer.parameters:
                of = None if layout.shards_rows else owner
                yield Entry(name, p, "momentum", built.momentum.get(p), of, False, p.shape, layer.like)
            values = {key: value for key, value, _ in kept.get(name, ())}
            for key, shape, dtype, shared in described[name]:
                yield Entry(name, layer.weight, key, values.get(key), owner, shared, shape, layer.like.to(dtype))

    def _turns(self) -> dict[str, int]:
        """Layer → its turn: all steps cost about the same. Of the model alone, as states may come without topology."""
        layers = self.routing.layers
        costs = [[float(y.units * y.m * y.columns * min(y.m, y.columns))] for y in layers]
        return {y.name: turn for y, turn in zip(layers, balanced(costs, self.interval), strict=True)}

    def _costs(self, topology: Topology, turn_of: Mapping[str, int]) -> dict[str, list[float]]:
        """Of each group and turn the numbers that are kept, and roughly what a step costs: momenta, Φ and its
        inverse."""
        costs = {}
        for group in topology.groups:
            members = [self.capture.layers[name] for name in group.members]
            k, b = factor_blocks(members[0], self.config.max_factor_dim)
            own = costs[group.name] = [0.0] * self.interval
            own[turn_of[members[0].name]] += float(members[0].units * k * b * b)
            for layer in members:
                own[turn_of[layer.name]] += float(layer.units * layer.m * layer.columns)
        return costs

    @property
    def steps(self) -> int:
        """Steps made."""
        return int(self.count)

    def set_turns(self, turns: Tensor) -> None:
        """Take over what is known for the interval, see `turns`."""
        self.turns.copy_(turns)
        fixed = self.config.update_interval
        self.interval = max(1, int(self.turns[0])) if isinstance(fixed, str) else fixed

    @property
    def decides_interval(self) -> bool:
        """Whether the layers' turns depend on what a step costs."""
        return self.config.update_interval == "auto" and self.config.takes_turns

    def _decide_interval(self, flops: Tensor) -> bool:
        """By the operations of forward and backward, of all processes, in the mean of the factor steps so far; is it
        another one now? Waits for the device."""
        before = self.interval
        if self.decides_interval and not flops.is_meta and float(flops) > 0:
            _, total, steps = (self.turns + torch.tensor([0.0, float(flops), 1.0])).tolist()
            updates = sum(flops_of_update(layer, self.config) for layer in self.routing.layers)
            self.set_turns(torch.tensor([interval_for(updates * steps / total), total, steps]))
        return self.interval != before

    def _flops(self, statistics: Mapping[str, Statistics]) -> Tensor | float:
        """Operations of forward and backward of this step on this process: those of its tokens that count."""
        model, layers = self.capture.model, self.capture.layers
        if not self.decides_interval or model is None:
            return 0.0
        own: Tensor | float = 0.0
        for group in self.built.topology.groups:
            if group.name in statistics:
                each = sum(flops_of_token(layers[name].geometry) for name in group.members)
                own = own + each * statistics[group.name].tokens
        return own * (1 + flops_beside(model, self.routing.layers))

    def bind(self) -> None:
        """Put this process's tensors of the layers into `states`, as views."""
        for entry in self.built.entries:
            if entry.value is not None:
                own = {"step": self.count, "turns": self.turns, entry.key: entry.value}
                self.states[entry.parameter].update(own)

    def lost_state(self) -> bool:
        """Whether a user has taken the state of a layer away since :meth:`bind`: ``optimizer.state.clear()``."""
        states = self.states
        return any("momentum" not in states.get(layer.weight, ()) for b in self.batches for layer in b.layers)

    def was_moved(self) -> bool:
        """Whether a layer was moved to another device, or to a dtype whose state is kept in another one; ValueError: to
        float16."""
        moved = False
        for batch in self.batches:
            for layer in batch.members:
                check_precision(layer.weight_name, layer.weight)
                here = layer.weight.device, state_dtype(layer.weight.dtype)
                moved |= here != (batch.rate.device, batch.rate.dtype)
        return moved

    def update_factors(self, own: dict[str, Statistics], loss_scale: Tensor | None) -> bool:
        """Take one step's statistics, of this process by group, into the running averages of all (Eq. 4, 5, 14); do the
        layers take other turns now? `loss_scale`: what the loss was multiplied by; None: one."""
        capture, names = self.capture, [group.name for group in self.capture.topology.groups]
        every = {n: (own[n] if n in own else capture.empty_statistics(n), capture.layers[n].like) for n in names}
        found, (flops, *scalars) = reduce(every, [self._flops(own), *capture.scalars()], self.layout)
        scale = capture.scale(scalars, self.layout.everyone.size, loss_scale)
        seen = {name: one.kept > 0 for name, one in found.items() if isinstance(one.kept, Tensor)}
        fresh = {name: one.factors(scale) for name, one in found.items() if one.sums}
        for bank in self.banks:
            bank.update(fresh, seen)
        return self._decide_interval(flops)

    def invert(self) -> None:
        """Derive all whiteners or inverses anew."""
        for bank in self.banks:
            bank.invert()
        self.started = True

    def arm(self, factors: bool) -> None:
        """Attach the hooks that the coming step needs."""
        everyone = self.layout.everyone
        for table in self.embeddings:
            table.arm(factors)
        bank_of = self.built.bank_of if self.started else {}
        self.capture.arm(factors, Coming(self.steps, everyone.rank, everyone.size, bank_of))

    def factors(self, name: str) -> dict[str, Tensor]:
        """The factors of a layer, see `LNGD.factors`. A collective where layers have owners."""
        group, layer = self.built.group_of[name], self.capture.layers[name]
        found: dict[str, Tensor] = {}
        if group in self.built.bank_of:
            bank = self.built.bank_of[group]
            rows = torch.tensor(bank.rows_of([group]), device=layer.weight.device)
            batch = next(batch for batch in self.batches if layer in batch.place)
            own = {key: value[batch.own(layer)] for key, value in batch.state.items()}
            found = self.method.direction.factors(layer, bank, rows, own)
            found = {key: value if layer.units > 1 else value[0].clone() for key, value in found.items()}
        owner = self.layout.owners.get(group)
        if owner is not None:
            cpu = {key: value.cpu() for key, value in found.items()}
            found = self.layout.ranks.broadcast_value(cpu, owner)
        return {key: value.to(layer.weight.device) for key, value in found.items()}

    def diagnostics(self) -> dict[str, float]:
        """Numbers for a log, of all processes' layers, see `LNGD.diagnostics`; waits for the device once."""
        none = torch.zeros(1)
        rates = torch.cat([batch.rate.flatten().double().cpu() for batch in self.batches] or [none[:0]])
        damping = torch.cat([bank.damping.flatten().double().cpu() for bank in self.banks] or [none[:0]])
        conditions = [float(bank.condition.amax()) for bank in self.banks if bank.count]
        own = [float(rates.sum()), rates.numel(), float(damping.sum()), damping.numel()]
        own += [float(sum(bank.failures for bank in self.banks)), float(sum(bank.skipped for bank in self.banks))]
        counts = not self.layout.shards_rows or self.layout.ranks.rank == 0  # each has some rows of all gradients
        own += [float(self.skipped_gradients) if counts else 0.0, max(conditions, default=float("-inf"))]
        everyone = self.layout.ranks.all_gather_value(own) if self.layout.has_owners else [own]
        *sums, _ = (sum(column) for column in zip(*everyone, strict=True))
        rate, layers, damped, rows, failed, skipped, gradients = sums
        others = float(self.adamw.skipped) + sum(float(table.skipped) for table in self.embeddings)
        if not self.batches:
            return {"skipped_gradients": others}
        return {
            "direction_scale_mean": rate / max(layers, 1),
            "damping_mean": damped / max(rows, 1),
            "condition_max": max(one[-1] for one in everyone),
            "failed_inverses": failed,
            "skipped_factors": skipped,
            "skipped_gradients": gradients + others,
        }


def _kept(layer: Layer, batch: LayerBatch, group: str) -> Iterator[tuple[str, Tensor, bool]]:
    """Name and view of what the owner of a layer keeps of it and of its group, of two dimensions, so that
    they can be sharded by rows as parameters are; and whether it is its group's."""
    assert batch.bank is not None
    own, shared = batch.own(layer), batch.bank.rows[group]
    for rows, tensors, of_group in ((own, batch.state, False), (shared, batch.bank.tensors(), True)):
        for key, value in tensors.items():
            view = value[rows.start : rows.stop]
            yield key, view.view(-1, view.shape[-1] if view.dim() > 1 else 1), of_group
