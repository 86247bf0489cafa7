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

from ..adamw import AdamW
from ..config import LNGDConfig
from ..layers import factor_blocks
from ..optimizer import LNGD
from ..routing import Route

# n³ operations a Cholesky inverse, 9 n³ an eigendecomposition.
_EIGH = 9.0


@dataclass(frozen=True)
class Estimate:
    """Of one model, batch and config."""

    routes: list[Route]
    table: str  # the routes, printable
    memory: dict[str, int]  # bytes by kind, as `LNGD.memory_usage` gives them after a step
    adamw: int  # bytes of torch's AdamW's state, in the weights' own dtype
    factors: dict[tuple[int, int], tuple[int, int]]  # Φ (the inputs' side of other families): see `_factors`
    model_flops: float  # products of a forward and backward pass
    capture_flops: float  # of a factor step
    inverse_flops: float  # of one inversion of all factors
    step_flops: float  # of any step


def estimate(model: nn.Module, loss: Callable[[], Tensor], config: LNGDConfig) -> Estimate:
    """Make LNGD and some steps. Weights of a model that is not on the meta device are changed: give a copy.

    Args:
        model: in training mode.
        loss: one forward pass of it on a batch; what that raises is raised.
        config: the settings; of ``fisher=true`` the second backward pass is left out.
    """
    fields: dict[str, Any] = config.to_dict()
    if config.fisher == "true":  # whose second pass is no work of this optimizer's
        fields["fisher"] = "sampled" if config.family == "lngd" else "empirical"
    optimizer = LNGD(model, LNGDConfig(**fields))
    named = optimizer.core.routing.parameters
    rest = [named[r.parameter] for r in optimizer.routing() if r.owner == "fallback"]
    try:
        first = _gradients(loss, rest)
        optimizer.step()
        optimizer.eval()
        plain = _gradients(loss, rest)
        optimizer.train()
        _gradients(loss, rest)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        memory = optimizer.memory_usage()
        memory["fallback"] = sum(value.nbytes for p in rest for value in AdamW.new_state(p).values())
        memory["rounding"] += sum(p.nbytes for p in rest if p.dtype == torch.bfloat16)
        memory["total"] = sum(size for kind, size in memory.items() if kind != "total")
        return Estimate(
            routes=optimizer.routing(),
            table=optimizer.routing_table(),
            memory=memory,
            adamw=sum(2 * p.nbytes + 4 for p in model.parameters() if p.requires_grad),
            factors=_factors(optimizer),
            model_flops=plain,
            capture_flops=max(first - plain, 0.0),
            inverse_flops=sum(bank.count * _inverse_flops(bank) for bank in optimizer.core.banks),
            step_flops=float(counter.get_total_flops()),
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


def _factors(optimizer: LNGD) -> dict[tuple[int, int], tuple[int, int]]:
    """(width, blocks of that width), the widest first → how many such factors, for how many layers."""
    core, sizes = optimizer.core, dict[tuple[int, int], tuple[int, int]]()
    for group in core.built.topology.groups:
        layer = core.capture.layers[group.name]
        k, width = factor_blocks(layer, core.config.max_factor_dim)
        groups, layers = sizes.get((width, layer.units * k), (0, 0))
        sizes[width, layer.units * k] = groups + 1, layers + len(group.members)
    return dict(sorted(sizes.items(), reverse=True))


def _inverse_flops(bank: Any) -> float:
    """Of a row."""
    sides = [bank.sides.blocks(side) for side in bank.kept_sides()] if hasattr(bank, "sides") else [(bank.k, bank.b)]
    return sum((_EIGH if "basis_left" in bank.tensors() else 1.0) * k * b**3 for k, b in sides)
