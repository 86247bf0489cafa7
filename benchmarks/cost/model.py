"""What a step of AdamW, Muon and LNGD costs, on paper: operations, bytes, seconds, communication.

A step is a list of :class:`Op`, written down here from the optimizers' code, call by call. How long each takes, a
machine says: one that micro-benchmarks describe (`benchmarks.cost.calibration`) or a data sheet
(`benchmarks.cost.cluster`). Shapes come from the model itself, on the meta device: LNGD's routing, the groups that
share a Φ, its banks. Bytes of LNGD's state are those that it counts itself.

Symbols: a matrix is m × d, Φ of a group is k blocks of b × b, N are the positions (tokens, patches) of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.studies.rivals import split
from hf_lngd import LNGD, LNGDConfig
from hf_lngd.layers import Layer, factor_blocks
from hf_lngd.paper.rate import rows_read
from hf_lngd.routing import Route, route

FLOAT = 4
# Calls of the dispatcher in one step, (a bank, a layer), in a factor step a group, an inversion, and Muon's a matrix.
# Counted once with a TorchDispatchMode on a ViT, a ResNet and an MLP (tests count again).
CALLS = {"polar": (128, 10), "natural": (102, 8), "adaptive": (118, 38)}
CAPTURE_CALLS, INVERT_CALLS, MUON_CALLS = 45, 115, 32
# One row of the batch in so many estimates the factors of convolutions.
CONV_ROWS = {"fast": 8, "paper": 1, "lngd_sample": 1, "lngd_lr": 1}
# What `Route.follows` says where φ' = 1.
NOTHING = {"", "identity"}
ITERATIONS = 5  # of Newton-Schulz, Muon's and LNGD's
# Bytes read and written an element. `stream`: in place, operands from memory; the others find theirs in a cache.
BYTES = {"stream": 12, "adamw": 28, "inplace": 12, "alloc": 12, "cast": 6, "half": 4, "reduce": 4, "call": 0}
PRODUCTS = {"float32": 4, "bfloat16": 2}
INVERSE = "inverse"


@dataclass(frozen=True)
class Op:
    """One operation, `times` a step.

    Attributes:
        kind: a key of `BYTES` (shape: elements), of `PRODUCTS` (batch, rows, inner, columns), or `INVERSE` (batch, n).
    """

    kind: str
    shape: tuple[int, ...]
    times: float = 1.0

    @property
    def flops(self) -> float:
        """Of all times; n³ an inverse by Cholesky, one an element."""
        if self.kind in PRODUCTS:
            return 2.0 * math.prod(self.shape) * self.times
        if self.kind == INVERSE:
            return float(self.shape[0] * self.shape[1] ** 3) * self.times
        return float(math.prod(self.shape)) * self.times if self.kind != "call" else 0.0

    @property
    def bytes(self) -> float:
        """Memory traffic of all times, each operand once."""
        if self.kind in PRODUCTS:
            batch, rows, inner, columns = self.shape
            return PRODUCTS[self.kind] * batch * (rows * inner + inner * columns + rows * columns) * self.times
        if self.kind == INVERSE:
            return 2.0 * FLOAT * self.shape[0] * self.shape[1] ** 2 * self.times
        return float(BYTES[self.kind] * math.prod(self.shape)) * self.times


class Machine(Protocol):
    """What runs an operation once."""

    def seconds(self, op: Op) -> float:
        """Of one of its times."""


def total_seconds(ops: Iterable[Op], machine: Machine) -> float:
    """Of a step, one operation after another."""
    return sum(machine.seconds(op) * op.times for op in ops)


# Shapes


@dataclass(frozen=True)
class Bank:
    """`count` matrices m × d of `layers` layers that are stepped together; Φ in k blocks of b; `positions`: of each
    layer, those that the adaptive rate reads."""

    layers: int
    count: int
    m: int
    d: int
    k: int
    b: int
    estimated: bool
    positions: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """Of all its matrices."""
        return self.count * self.m * self.d


@dataclass(frozen=True)
class Factor:
    """One group's Φ: `units` times k blocks of b, from N positions with d columns; `links`: m that φ' has, or 0;
    `patches`: of a convolution, whose rows have to be made."""

    units: int
    k: int
    b: int
    d: int
    positions: int
    links: int
    patches: bool = False

    @property
    def triangle(self) -> int:
        """Numbers on and above its blocks' diagonals."""
        return self.units * self.k * self.b * (self.b + 1) // 2


@dataclass(frozen=True)
class Inventory:
    """A model as its optimizers see it: LNGD's banks and factors, embeddings with a rule of their own (V, d), what
    AdamW keeps by tensor."""

    banks: tuple[Bank, ...]
    factors: tuple[Factor, ...]
    tables: tuple[tuple[int, int], ...]
    rest: tuple[int, ...]
    matrices: tuple[tuple[int, int], ...]  # of Muon
    parameters: tuple[int, ...]
    config: LNGDConfig = field(repr=False)
    others: tuple[int, ...] = ()  # AdamW's beside Muon
    model_flops: int = 0  # of forward and backward, as torch counts them: products, convolutions, attention
    lngd_state: int = 0  # bytes, by LNGD's own account
    owned_state: int = 0  # the part of it that belongs to layers


@dataclass
class Seen:
    """What a forward pass told of a layer: the tensor that it read first, how many positions it gave, and those of rows
    that the adaptive rate reads."""

    read: Tensor
    positions: int = 0
    of_rate: int = 0


def take_inventory(model: nn.Module, batch: Mapping[str, Any], config: LNGDConfig) -> Inventory:
    """Shapes of a model's step, from two forward and backward passes (on the meta device: nothing is computed).

    `batch`: what the model is called with; its size sets N.
    """
    with FlopCounterMode(display=False) as counter:  # of the model alone: before LNGD has its hooks there
        model(**batch).loss.backward()
    model.zero_grad()
    layers = {layer.name: layer for layer in route(model, config).layers}
    optimizer = LNGD(model, config)
    seen: dict[str, Seen] = {}

    def watch(layer: Layer) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            own = seen.setdefault(layer.name, Seen(args[0]))
            positions, rows = output.numel() // (layer.units * layer.m), len(output)
            own.positions += positions
            own.of_rate += positions // rows * len(rows_read(0, rows)[0])

        return hook

    hooks = [module.register_forward_hook(watch(layer)) for layer in layers.values() for _, module in layer.modules]
    model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    # AdamW's own arithmetic does not run on the meta device; embeddings with a rule of their own do
    routes = {r.parameter: r for r in optimizer.routing()}
    rest = [
        p for name, p in model.named_parameters() if routes[name].owner == "fallback" and not _has_rule(routes[name])
    ]
    for parameter in rest:
        parameter.grad = None
    optimizer.step()
    usage = optimizer.memory_usage()
    follows = {r.layer: r.follows for r in optimizer.routing() if r.owner == "lngd"}
    optimizer.close()
    groups = _groups([layers[name] for name in seen], seen, follows, config)
    banks: dict[tuple[Any, ...], list[tuple[Layer, int]]] = {}
    factors = []
    for members in groups:
        first, (k, b) = members[0], factor_blocks(members[0], config.max_factor_dim)
        estimated = follows[first.name] not in NOTHING or config.fisher != "expected"
        count = seen[first.name].positions
        kept = -(-count // CONV_ROWS[config.preset]) if first.is_convolution else count
        features = first.m if estimated else 0
        factors.append(Factor(first.units, k, b, first.columns, kept, features, first.is_convolution))
        for layer in members:
            key = (layer.units, layer.m, layer.columns, layer.bias is None, k, b, estimated)
            banks.setdefault(key, []).append((layer, seen[layer.name].of_rate))
    matrices, tables, others = split(model)
    return Inventory(
        tuple(
            Bank(len(found), len(found) * units, m, d, k, b, estimated, tuple(count for _, count in found))
            for (units, m, d, _, k, b, estimated), found in banks.items()
        ),
        tuple(factors),
        tuple((r.shape[0], r.shape[1]) for r in routes.values() if _has_rule(r)),
        tuple(p.numel() for p in rest),
        tuple((p.shape[0], p.numel() // p.shape[0]) for p in matrices),
        tuple(p.numel() for p in model.parameters() if p.requires_grad),
        config,
        tuple(p.numel() for p in [*tables, *others]),
        counter.get_total_flops(),
        usage["total"] + FLOAT * sum(2 * p.numel() + 1 for p in rest),
        sum(usage[kind] for kind in ("momentum", "factors", "inverses")),
    )


def _has_rule(route: Route) -> bool:
    """Whether it is an embedding that does not take AdamW's plain step."""
    return route.reason.startswith("embedding, ")


def _groups(
    layers: list[Layer], seen: Mapping[str, Seen], follows: Mapping[str, str], config: LNGDConfig
) -> list[list[Layer]]:
    """Layers that share one Φ: they read the same tensor alike, cut it into the same blocks, and nothing that counts
    follows."""

    def kind(layer: Layer) -> Any:
        return layer.columns, layer.bias is None, factor_blocks(layer, config.max_factor_dim)

    groups: list[list[Layer]] = []
    for layer in layers:
        for group in groups:
            first = group[0]
            alike = first.geometry.reads_like(layer.geometry) and kind(first) == kind(layer)
            alone = {follows[first.name], follows[layer.name]} - NOTHING
            if alike and not alone and seen[first.name].read is seen[layer.name].read:
                group.append(layer)
                break
        else:
            groups.append([layer])
    return groups


# Steps


def adamw_ops(sizes: Iterable[int]) -> list[Op]:
    """Fused AdamW: weight, gradient and two moments read, three written."""
    return [Op("adamw", (size,)) for size in sizes]


def newton_schulz(count: int, rows: int, columns: int) -> list[Op]:
    """Five quintics on `count` matrices in bfloat16: X Xᵀ, its polynomial, and that times X."""
    s, long = min(rows, columns), max(rows, columns)
    wide = Op("bfloat16", (count, s, s, long), ITERATIONS)
    return [Op("bfloat16", (count, s, long, s), ITERATIONS), Op("bfloat16", (count, s, s, s), ITERATIONS), wide]


def muon_ops(matrices: Iterable[tuple[int, int]], others: Iterable[int]) -> list[Op]:
    """torch.optim.Muon, a matrix at a time, and AdamW beside it."""
    ops = []
    for m, d in matrices:
        n = (m * d,)
        ops += [Op("stream", n), Op("alloc", n), Op("cast", n), Op("half", n, 2), *newton_schulz(1, m, d)]
        ops += [Op("stream", n), Op("inplace", n), Op("cast", n), Op("call", (1,), MUON_CALLS)]
    return ops + adamw_ops(others)


def bank_ops(bank: Bank, config: LNGDConfig) -> list[Op]:
    """What every step of LNGD does to one bank (`LayerBank.update` and the weights' update)."""
    if config.direction not in CALLS:
        raise ValueError(f"direction: got {config.direction!r}, accepted: natural, polar")
    n, blocks = (bank.elements,), (bank.count * bank.k * bank.b**2,)
    right = (bank.count * bank.k, bank.m, bank.b, bank.b)
    a_bank, a_layer = CALLS[config.direction if config.rate != "adaptive" else "adaptive"]
    ops = [Op("stream", n), Op("call", (1,), a_bank + a_layer * bank.layers)]  # gradients side by side
    if config.momentum_on == "gradient":
        ops += [Op("stream", n), Op("inplace", n)]
    if config.direction == "natural":
        # Φ⁻¹ is unpacked, the product taken in full precision, rows scaled by Ψ⁻¹
        ops += [Op("alloc", blocks, 2), Op("float32", right), Op("inplace", n)]
    else:
        ops += [Op("half", blocks), Op("cast", n, 2), Op("bfloat16", right, 2), Op("half", n, 6 + 2 * (bank.k > 1))]
        ops += newton_schulz(bank.count, bank.m, bank.d)
    if config.direction != "natural":  # the scale of rows
        ops += [Op("alloc", n), Op("reduce", n), Op("inplace", n)]
    if config.rate == "adaptive":  # q_n = Σ_t g_tᵀ D a_t over the rows read, and ⟨D, G⟩
        for positions in bank.positions:
            units = bank.count // bank.layers
            ops += [Op("float32", (units, positions, bank.d, bank.m)), Op("alloc", (units * positions * bank.m,), 2)]
            ops += [Op("stream", (units * positions * (bank.m + bank.d),)), Op("reduce", (units * positions * bank.m,))]
        ops += [Op("alloc", n), Op("reduce", n)]
    else:
        ops += [Op("reduce", n)]
    ops += [Op("inplace", n)]
    if config.momentum_on == "update":
        ops += [Op("alloc", n), Op("inplace", n), Op("stream", n)]
    return ops + [Op("stream", n, 2)]  # decay, subtraction


def table_ops(rows: int, d: int) -> list[Op]:
    """A step of an embedding by token frequency: momentum, division by frequency, rows bounded in size, decay."""
    n = (rows * d,)
    return [Op("stream", n), Op("alloc", n, 4), Op("reduce", n, 2), Op("inplace", n, 2), Op("stream", n, 2)]


def capture_ops(factor: Factor, masked: bool) -> list[Op]:
    """A factor step's work on one group: S, v, and their way into the running averages."""
    n, m = factor.positions, factor.links
    ops = [Op("float32", (factor.units * factor.k, factor.b, n, factor.b)), Op("call", (1,), CAPTURE_CALLS)]
    if factor.patches:
        ops += [Op("alloc", (factor.units * n * factor.d,), 2)]
    if m or masked:
        ops += [Op("alloc", (factor.units * n * factor.d,))]
    if m:
        ops += [Op("alloc", (factor.units * n * m,), 3 + masked), Op("reduce", (factor.units * n * m,), 2)]
        ops += [Op("alloc", (factor.units * n * factor.d,)), Op("reduce", (factor.units * n * factor.d,))]
    return ops + [Op("alloc", (factor.units * factor.k * factor.b**2,), 6)]


def invert_ops(factor: Factor) -> list[Op]:
    """One refresh of one group: unpacked, damped, and its inverse or the inverse of its Cholesky factor."""
    size, batch = (factor.units * factor.k * factor.b**2,), factor.units * factor.k
    return [Op("alloc", size, 7), Op("call", (1,), INVERT_CALLS), Op("inverse", (batch, factor.b))]


def scaled(ops: Iterable[Op], times: float) -> list[Op]:
    """The same operations so many times as often."""
    return [Op(op.kind, op.shape, op.times * times) for op in ops]


def lngd_ops(inventory: Inventory, masked: bool = False, inverses: bool = True) -> list[Op]:
    """A mean step of LNGD over a whole interval; without `inverses` those are left out (other devices take them)."""
    c = inventory.config
    ops = [op for bank in inventory.banks for op in bank_ops(bank, c)]
    for factor in inventory.factors:
        ops += scaled(capture_ops(factor, masked), 1 / c.factor_interval)
        if inverses:
            ops += scaled(invert_ops(factor), 1 / c.inverse_interval)
    ops += [op for rows, d in inventory.tables for op in table_ops(rows, d)]
    return ops + adamw_ops(inventory.rest)


# State


def adamw_state(inventory: Inventory) -> int:
    """Bytes of two moments a parameter."""
    return 2 * FLOAT * sum(inventory.parameters)


def muon_state(inventory: Inventory) -> int:
    """Bytes of a momentum a matrix, two moments for all else."""
    return FLOAT * (sum(m * d for m, d in inventory.matrices) + 2 * sum(inventory.others))
