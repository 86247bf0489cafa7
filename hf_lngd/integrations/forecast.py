"""What a step of LNGD costs beside one of AdamW: the arithmetic of both, counted from shapes.

AdamW's step is forward and backward; LNGD's has the matmuls of its layers' directions on top, which do not grow with
the batch. On accelerators the calls of small models take longer than their arithmetic: the forecast is too low there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..config import LNGDConfig
from ..directions import PSI_INTERVAL, Polar
from ..layers import Layer, factor_blocks, geometry_of, output_blocks
from ..linalg import QUINTICS
from ..optimizer import LNGD
from ..torch_internals import in_backward

# How much longer the operations of a grouped convolution take than a matmul's: fitted to the ConvNeXt of
# `benchmarks.cost.small_batches`.
GROUPED = 20
# A multiplication more than the quintic's own: R ← ZRZ between two, and the product of the Zs.
_ROOT = len(QUINTICS) + 3 * (len(QUINTICS) - 1)
_INVERSE = 2 / 3  # of a matmul of the same width: Cholesky, and the inverse of its factor


def products(layer: Layer, config: LNGDConfig) -> list[tuple[float, int, int, int]]:
    """The matmuls of a layer's `Polar` direction with its factors: (times a step, n, k, m) of [n, k] · [k, m]."""
    m, d, limit, whiten = layer.m, layer.columns, config.max_factor_dim, config.whiten
    (k_phi, b_phi), (k_psi, b_psi) = factor_blocks(layer, limit), output_blocks(layer, limit)
    has_phi, has_psi = whiten != "none", whiten == "both"
    tall = m > d and layer.heads == 1
    side, others = (d, m) if tall else (m // layer.heads, d)  # of the Gram matrix, and the sum within it
    ends = 2.0 * has_psi if tall else 2.0 * has_phi  # the factor of the other side: before and after
    inner = 4.0 * has_phi if tall else 4.0 * has_psi  # that of this side: left and right of R and of its root
    psi = has_psi / PSI_INTERVAL
    heads = layer.heads * layer.units
    return [
        (layer.units * ends, others, b_psi if tall else b_phi, d if tall else m),
        (heads * inner, side, b_phi if tall else b_psi, side),
        (heads * 2.0, side, others, side),
        (heads * float(_ROOT), side, side, side),
        (layer.units * psi, m, d, b_psi),
        (layer.units * psi * tall, m, b_phi, d),
        (layer.units * psi * k_psi * _INVERSE, b_psi, b_psi, b_psi),
        (layer.units * has_phi * k_phi * _INVERSE / config.inverse_interval, b_phi, b_phi, b_phi),
    ]


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
        if geometry is None or not module.training or in_backward():  # recomputation: of no new batch
            return
        passes = 3 if module.weight.requires_grad else 2
        slower = GROUPED if geometry.units > 1 else 1
        self.model += 2.0 * output.numel() * geometry.in_features * passes * slower
        columns, block = self.columns.get(module, (0, 0))
        tokens = output.numel() / geometry.out_features  # of all units
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
    matmuls = (one for layer in core.routing.layers for one in products(layer, core.config))
    step = sum(2 * times * n * k * m for times, n, k, m in matmuls)
    if core.layout.has_owners or core.layout.shards_rows:
        step /= core.layout.ranks.size
    return 1 + (step / batches + work.statistics) / work.model
