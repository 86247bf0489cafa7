"""What a step of LNGD costs beside one of AdamW: the arithmetic of both, counted from shapes.

AdamW's step is forward and backward; LNGD's has the matmuls of its layers' directions on top, which do not grow with
the batch. On accelerators the calls of small models take longer than their arithmetic: the forecast is too low there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LNGDConfig
from ..core import Core
from ..directions import Polar
from ..layers import factor_blocks, geometry_of
from ..optimizer import LNGD
from ..torch_internals import in_backward
from ..work import MOST_INTERVAL, MOST_SHARE, flops_of_token, flops_of_update, interval_for


@dataclass
class Work:
    """Floating point operations: of forward and backward `model`, and of collecting Φ's statistics as often as a run
    does, `statistics`; both grow with the batch."""

    config: LNGDConfig
    columns: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)
    model: float = 0.0
    statistics: float = 0.0

    def add(self, module: Any, args: Any, output: Tensor) -> None:
        """A forward hook."""
        geometry = geometry_of(module)
        if geometry is None or not torch.is_grad_enabled() or in_backward():  # recomputation: of no new batch
            return
        tokens = output.numel() / geometry.out_features  # of all units
        self.model += tokens / geometry.units * flops_of_token(geometry, module.weight.requires_grad)
        columns, block = self.columns.get(module, (0, 0))
        self.statistics += 2.0 * tokens * columns * block / self.config.factor_interval


@contextmanager
def counting(model: nn.Module, optimizer: LNGD) -> Iterator[Work]:
    """Count the work of the forward passes of a model in training."""
    work, limit = Work(optimizer.config), optimizer.config.max_factor_dim
    for layer in optimizer.core.routing.layers:
        work.columns |= {module: (layer.columns, factor_blocks(layer, limit)[1]) for _, module in layer.modules}
    hooks = [m.register_forward_hook(work.add) for m in model.modules() if geometry_of(m) is not None]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def step_to_adamw(optimizer: LNGD, work: Work, batches: float = 1.0) -> float | None:
    """A step of so many of the counted batches, in steps of AdamW; None: of another direction, or nothing was seen."""
    core = optimizer.core
    if not isinstance(core.method.direction, Polar) or not work.model:
        return None
    interval = core.interval
    if core.decides_interval and (batches != 1 or not core.turns[0]):  # other batches, or nothing decided yet
        interval = interval_for(_updates(core, 1) / (work.model * batches))
    return 1 + (_updates(core, interval) / _sharers(core) / batches + work.statistics) / work.model


def batches_for(optimizer: LNGD, work: Work, ratio: float) -> float:
    """Of how many of the counted batches and more a step takes at most `ratio` of AdamW's; infinity: of none."""
    core, left = optimizer.core, ratio - 1 - work.statistics / work.model
    if left <= 0:
        return math.inf
    fixed = core.config.update_interval
    auto = MOST_INTERVAL if left >= MOST_SHARE else 1  # above this share layers take turns, below none is left out
    return _updates(core, auto if isinstance(fixed, str) else fixed) / _sharers(core) / (work.model * left)


def _updates(core: Core, interval: int) -> float:
    """Operations of a step's updates."""
    return sum(flops_of_update(layer, core.config, interval) for layer in core.routing.layers) / interval


def _sharers(core: Core) -> int:
    """Processes that share them out."""
    return core.layout.ranks.size if core.layout.has_owners else 1
