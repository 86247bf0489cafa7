"""What LNGD's state and steps will cost, before any training: from one forward and backward pass and some steps.

On the meta device nothing is computed or stored, so a model of any size takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .config import LNGDConfig
from .curvature.layer_bank import polar_interval
from .fallback import Fallback
from .optimizer import LNGD
from .placement import Speed
from .routing import ROTATED_EMBEDDING, Route

# n³ operations a Cholesky inverse, 9 n³ an eigendecomposition: "seconds" at these speeds are operations.
_EIGH = 9.0
_OPERATIONS = Speed(eigh=1 / _EIGH, newton=1 / _EIGH, cholesky=1.0, latency=0.0, bandwidth=1.0)
_ADAMW_STATE = 2  # tensors a parameter


@dataclass(frozen=True)
class FactorSize:
    """Factors of one layout: `groups` of them for `layers` layers, each of `blocks` blocks `width` × `width`."""

    groups: int
    layers: int
    blocks: int
    width: int


@dataclass(frozen=True)
class Estimate:
    """Of one model, batch and config.

    Attributes:
        routes: every parameter's owner, and what follows each layer.
        table: the same, printable.
        trained: numbers that are trained.
        memory: bytes by kind, as `LNGD.memory_usage` gives them after a step.
        adamw: bytes of torch's AdamW's state, in the weights' own dtype.
        factors: Φ (the inputs' side of other families).
        model_flops: products of a forward and backward pass.
        capture_flops, inverse_flops: of a factor step, and of one inversion of all factors.
        step_flops: products of any step.
    """

    routes: list[Route]
    table: str
    trained: int
    memory: dict[str, int]
    adamw: int
    factors: list[FactorSize]
    model_flops: float
    capture_flops: float
    inverse_flops: float
    step_flops: float
    config: LNGDConfig

    @property
    def lngd_flops(self) -> float:
        """Of a mean step."""
        c = self.config
        return self.step_flops + self.capture_flops / c.factor_interval + self.inverse_flops / c.inverse_interval


def estimate(model: nn.Module, loss: Callable[[], Tensor], config: LNGDConfig) -> Estimate:
    """Make LNGD and some steps. Weights of a model that is not on the meta device are changed: give a copy.

    Args:
        model: in training mode.
        loss: one forward pass of it on a batch.
        config: the settings; of ``fisher=true`` the second backward pass is left out.

    Raises:
        RuntimeError: what the model's forward raises, such as for reading a number on the meta device.
    """
    # eigh, which the formula counts; a second pass for fisher=true is no work of this optimizer's
    fields: dict[str, Any] = {**config.to_dict(), "inverse_root": "eigh"}
    if config.fisher == "true":
        fields["fisher"] = "sampled" if config.family == "lngd" else "empirical"
    optimizer = LNGD(model, LNGDConfig(**fields))
    rest = [
        parameter
        for (name, parameter), r in zip(model.named_parameters(), optimizer.routing(), strict=True)
        if r.owner == "fallback" and r.reason != ROTATED_EMBEDDING
    ]
    try:
        first = _gradients(loss, rest)
        optimizer.step()
        optimizer.eval()
        plain = _gradients(loss, rest)
        optimizer.train()
        for _ in range(2):  # past early factor steps
            _gradients(loss, rest)
            optimizer.step()
        _gradients(loss, rest)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        trained = [p for p in model.parameters() if p.requires_grad]
        memory = optimizer.memory_usage()
        memory["fallback"] = sum(_bytes(Fallback.new_moments(p)) for p in rest)
        if config.bf16_update == "kahan":
            memory["rounding"] += sum(p.numel() * p.element_size() for p in rest if p.dtype == torch.bfloat16)
        memory["total"] = sum(size for kind, size in memory.items() if kind != "total")
        return Estimate(
            routes=optimizer.routing(),
            table=optimizer.routing_table(),
            trained=sum(p.numel() for p in trained),
            memory=memory,
            adamw=sum(_ADAMW_STATE * p.numel() * p.element_size() + 4 for p in trained),
            factors=_factors(optimizer),
            model_flops=plain,
            capture_flops=max(first - plain, 0.0),
            inverse_flops=_inverses(optimizer),
            step_flops=counter.get_total_flops() + _roots(optimizer),
            config=config,
        )
    finally:
        optimizer.close()


def _gradients(loss: Callable[[], Tensor], rest: list[nn.Parameter]) -> float:
    """A forward and backward pass; its products. AdamW's arithmetic, which the meta device has not got, is left out."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    for parameter in rest:
        parameter.grad = None
    return float(counter.get_total_flops())


def _bytes(moments: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in moments.values())


def _factors(optimizer: LNGD) -> list[FactorSize]:
    made = optimizer._preconditioner
    sizes: dict[tuple[int, int], list[int]] = {}  # (blocks, width) → groups, layers
    for group in [] if made is None else optimizer._capture.topology.groups:
        assert made is not None
        bank: Any = made._bank_of_group[group.name]
        units = made.layers[group.name].units
        k, b = bank.sides.right if hasattr(bank, "sides") else (bank.k, bank.b)
        found = sizes.setdefault((units * k, b), [0, 0])
        found[0], found[1] = found[0] + 1, found[1] + len(group.members)
    return [
        FactorSize(groups, layers, blocks, width)
        for (blocks, width), (groups, layers) in sorted(sizes.items(), key=lambda item: -item[0][1])
    ]


def _inverses(optimizer: LNGD) -> float:
    made = optimizer._preconditioner
    return 0.0 if made is None else sum(bank.count * bank.seconds(_OPERATIONS) for bank in made.factor_banks)


def _roots(optimizer: LNGD) -> float:
    """``gram``: eigendecompositions of a mean step."""
    made, c = optimizer._preconditioner, optimizer.config
    banks = [] if made is None or c.direction != "gram" else made.layer_banks
    late = 1 << 30
    return sum(_EIGH * len(bank.momentum) * bank._n**3 / polar_interval(late, bank._n, c) for bank in banks)
