"""What a step of AdamW, Muon and LNGD costs, on paper: operations, bytes, seconds, communication.

A step is a list of :class:`Op`, written down here from the optimizers' code, call by call. How long each takes, a
machine says: one that micro-benchmarks describe (`benchmarks.cost_calibration`) or a data sheet
(`benchmarks.cost_cluster`). Shapes come from the model itself, on the meta device: LNGD's routing, the groups that
share a Φ, its banks.

Symbols: a matrix is m × d, Φ of a group is k blocks of b × b, N are the positions (tokens, patches) of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rivals import split
from hf_lngd import LNGD, LNGDConfig
from hf_lngd.curvature.factor_bank import FactorBank
from hf_lngd.curvature.inverses import packed_shape
from hf_lngd.curvature.layers import Layer
from hf_lngd.routing import ROTATED_EMBEDDING

FLOAT = 4
# Calls of the dispatcher in one step, (a bank, a layer), in a factor step a group, an inversion, and Muon's a matrix.
# Counted once with a TorchDispatchMode on a ViT, a ResNet and an MLP (tests count again).
CALLS = {"polar": (107, 8), "natural": (75, 6), "adaptive": (80, 26)}
CAPTURE_CALLS, INVERT_CALLS, MUON_CALLS = 45, 115, 32
ITERATIONS = 5  # of Newton-Schulz, Muon's and LNGD's
# Bytes read and written an element. `stream`: in place, operands from memory; the others find theirs in a cache.
BYTES = {"stream": 12, "adamw": 28, "inplace": 12, "alloc": 12, "cast": 6, "half": 4, "reduce": 4, "call": 0}
PRODUCTS = {"float32": 4, "bfloat16": 2}
DECOMPOSITIONS = ("eigh", "inverse")


@dataclass(frozen=True)
class Op:
    """One operation, `times` a step.

    Attributes:
        kind: a key of `BYTES` (shape: elements), of `PRODUCTS` (batch, rows, inner, columns), or one of
            `DECOMPOSITIONS` (batch, n).
    """

    kind: str
    shape: tuple[int, ...]
    times: float = 1.0

    @property
    def flops(self) -> float:
        """Of all times; 9 n³ a symmetric eigendecomposition, n³ a Cholesky inverse, one an element."""
        if self.kind in PRODUCTS:
            return 2.0 * math.prod(self.shape) * self.times
        if self.kind in DECOMPOSITIONS:
            return self.shape[0] * self.shape[1] ** 3 * (9.0 if self.kind == "eigh" else 1.0) * self.times
        return float(math.prod(self.shape)) * self.times if self.kind != "call" else 0.0

    @property
    def bytes(self) -> float:
        """Memory traffic of all times, each operand once."""
        if self.kind in PRODUCTS:
            batch, rows, inner, columns = self.shape
            return PRODUCTS[self.kind] * batch * (rows * inner + inner * columns + rows * columns) * self.times
        if self.kind in DECOMPOSITIONS:
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
    """`count` matrices m × d of `layers` layers that are stepped together; Φ in k blocks of b."""

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
    """A model as its optimizers see it: LNGD's banks and factors, rotated tables (V, d), what AdamW keeps by tensor."""

    banks: tuple[Bank, ...]
    factors: tuple[Factor, ...]
    tables: tuple[tuple[int, int], ...]
    rest: tuple[int, ...]
    matrices: tuple[tuple[int, int], ...]  # of Muon
    parameters: tuple[int, ...]
    config: LNGDConfig = field(repr=False)
    others: tuple[int, ...] = ()  # AdamW's beside Muon
    model_flops: int = 0  # of forward and backward, as torch counts them: products, convolutions, attention


def take_inventory(model: nn.Module, batch: Mapping[str, Any], config: LNGDConfig) -> Inventory:
    """Shapes of a model's step, from two forward and backward passes (on the meta device: nothing is computed).

    `batch`: what the model is called with; its size sets N.
    """
    with FlopCounterMode(display=False) as counter:  # of the model alone: before LNGD has its hooks there
        model(**batch).loss.backward()
    model.zero_grad()
    optimizer = LNGD(model, config)
    seen: dict[str, int] = {}

    def watch(layer: Layer) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            seen[layer.name] = seen.get(layer.name, 0) + layer.positions(output).numel()

        return hook

    layers: list[Layer] = optimizer._routing.layers
    hooks = [module.register_forward_hook(watch(layer)) for layer in layers for _, module in layer.modules]
    model(**batch).loss.backward()
    owned = {r.parameter: r for r in optimizer.routing()}
    rest = []
    for name, parameter in model.named_parameters():
        if owned[name].owner == "fallback" and owned[name].reason != ROTATED_EMBEDDING:
            rest.append(parameter.numel())
            parameter.grad = None  # AdamW's own arithmetic does not run on the meta device
    optimizer.step()
    for hook in hooks:
        hook.remove()
    made = optimizer._preconditioner
    assert made is not None
    banks, factors = [], []
    for bank in made.layer_banks:
        positions = tuple(seen.get(layer.name, 0) for layer in bank.layers)
        assert isinstance(bank.factors, FactorBank)
        banks.append(
            Bank(len(bank.layers), len(bank.layers) * bank.units, bank.m, bank.columns, bank.factors.k, bank.factors.b,
                 bank.psi is not None, positions)
        )  # fmt: skip
    for group in optimizer._capture.topology.groups:
        layer = made.layers[group.name]
        source = made._bank_of_group[group.name]
        assert isinstance(source, FactorBank)
        count = seen.get(group.name, 0)
        count = -(-count // config.conv_rows) if layer.is_convolution else count
        features = layer.out_features if group.links or config.fisher != "expected" else 0
        factors.append(Factor(layer.units, source.k, source.b, layer.columns, count, features, layer.is_convolution))
    matrices, tables, others = split(model)
    rotated = [r.shape for r in owned.values() if r.reason == ROTATED_EMBEDDING]
    optimizer.close()
    return Inventory(
        tuple(banks),
        tuple(factors),
        tuple((shape[0], shape[1]) for shape in rotated),
        tuple(rest),
        tuple((p.shape[0], p.numel() // p.shape[0]) for p in matrices),
        tuple(p.numel() for p in model.parameters() if p.requires_grad),
        config,
        tuple(p.numel() for p in [*tables, *others]),
        counter.get_total_flops(),
    )


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
    low = "float32" if config.matrix_dtype == "full" else "bfloat16"
    right = (bank.count * bank.k, bank.m, bank.b, bank.b)
    a_bank, a_layer = CALLS[config.direction if config.rate != "adaptive" else "adaptive"]
    ops = [Op("stream", n), Op("call", (1,), a_bank + a_layer * bank.layers)]  # gradients side by side
    if config.momentum_on == "gradient":
        ops += [Op("stream", n), Op("inplace", n, float(config.nesterov))]
    if config.direction == "natural":
        # Φ⁻¹ is unpacked, the product taken in full precision, rows scaled by Ψ⁻¹
        ops += [Op("alloc", blocks, 2), Op("float32", right), Op("inplace", n)]
    else:
        ops += [Op("half", blocks), Op("cast", n, 2), Op(low, right, 2), Op("half", n, 6 + 2 * (bank.k > 1))]
        ops += newton_schulz(bank.count, bank.m, bank.d)
    if config.row_decay and config.direction != "natural":
        ops += [Op("alloc", n), Op("reduce", n), Op("inplace", n)]
    if config.rate == "adaptive":  # q_n = Σ_t g_tᵀ D a_t over every row kept, and ⟨D, G⟩
        for positions in bank.positions:
            kept = -(-positions // config.rate_rows)
            units = bank.count // bank.layers
            ops += [Op("float32", (units, kept, bank.d, bank.m)), Op("alloc", (units * kept * bank.m,), 2)]
            ops += [Op("stream", (units * kept * (bank.m + bank.d),)), Op("reduce", (units * kept * bank.m,))]
        ops += [Op("alloc", n), Op("reduce", n)]
    else:
        ops += [Op("reduce", n)]
    ops += [Op("inplace", n)]
    if config.momentum_on == "update":
        ops += [Op("alloc", n), Op("inplace", n), Op("stream", n)]
    return ops + [Op("stream", n, 2)]  # decay, subtraction


def table_ops(rows: int, d: int, config: LNGDConfig) -> list[Op]:
    """A rotated embedding's step: AdamW between two products with its basis (`RotatedTable.step`)."""
    n = (rows * d,)
    low = "float32" if config.matrix_dtype == "full" else "bfloat16"
    ops = [Op("cast", n, 4), Op(low, (1, rows, d, d), 2), Op("stream", n, 5), Op("inplace", n, 3), Op("alloc", n, 3)]
    turn = 1 / config.factor_interval
    return ops + [
        Op("float32", (1, d, rows, d), turn),
        Op("eigh", (1, d), turn),
        Op("float32", (1, rows, d, d), 2 * turn),
        Op("alloc", n, 2 * turn),
    ]


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
    ops += [op for rows, d in inventory.tables for op in table_ops(rows, d, c)]
    return ops + adamw_ops(inventory.rest)


# State


def adamw_state(inventory: Inventory) -> int:
    """Bytes of two moments a parameter."""
    return 2 * FLOAT * sum(inventory.parameters)


def muon_state(inventory: Inventory) -> int:
    """Bytes of a momentum a matrix, two moments for all else."""
    return FLOAT * (sum(m * d for m, d in inventory.matrices) + 2 * sum(inventory.others))


def lngd_state(inventory: Inventory) -> int:
    """Bytes of LNGD's state: momenta, packed Φ and its inverse or root, tables, AdamW's moments, vectors, numbers."""
    c, total = inventory.config, 0
    for bank in inventory.banks:
        vectors = bank.estimated + (bool(c.row_decay) and c.direction != "natural")
        total += FLOAT * (bank.elements + bank.count * bank.m * vectors + bank.layers + bank.count * bank.estimated)
    for factor in inventory.factors:
        packed = FLOAT * math.prod(packed_shape(factor.b))
        ready = c.direction == "polar" and c.matrix_dtype != "full"
        total += factor.units * (factor.k * (packed + (2 * factor.b**2 if ready else packed)) + 3 * FLOAT)
    for rows, d in inventory.tables:
        total += FLOAT * (2 * rows * d + math.prod(packed_shape(d)) + d * d + 1)
    return total + FLOAT * sum(2 * size + 1 for size in inventory.rest)
