"""The arithmetic of a layer's update, counted from shapes, and how often it is therefore made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .config import LNGDConfig
from .directions import psi_interval
from .layers import Geometry, Layer, factor_blocks, geometry_of, output_blocks
from .linalg import QUINTICS

# update_interval=auto: the arithmetic of updates is at most this share of forward's and backward's, but at most so many
# steps lie between two of them.
MOST_SHARE, MOST_INTERVAL = 1 / 3, 4
# How much longer the operations of a grouped convolution take than a matmul's: fitted to the ConvNeXt of
# `benchmarks.cost.small_batches`.
GROUPED = 20
# A multiplication more than the quintic's own: R ← ZRZ between two, and the product of the Zs.
_ROOT = len(QUINTICS) + 3 * (len(QUINTICS) - 1)
_INVERSE = 2 / 3  # of a matmul of the same width: Cholesky, and the inverse of its factor


def flops_of_update(layer: Layer, config: LNGDConfig, interval: int = 1) -> float:
    """Floating point operations of an update of a layer by `Polar`, every `interval` steps, with its factors'."""
    m, d, limit, whiten = layer.m, layer.columns, config.max_factor_dim, config.whiten
    (k_phi, b_phi), (k_psi, b_psi) = factor_blocks(layer, limit), output_blocks(layer, limit)
    has_phi, has_psi = whiten != "none", whiten == "both"
    tall = m > d and layer.heads == 1
    side, others = (d, m) if tall else (m // layer.heads, d)  # of the Gram matrix, and the sum within it
    ends = 2.0 * has_psi if tall else 2.0 * has_phi  # the factor of the other side: before and after
    inner = 4.0 * has_phi if tall else 4.0 * has_psi  # that of this side: left and right of R and of its root
    psi, phi = has_psi / psi_interval(interval), has_phi * interval / config.inverse_interval
    heads = layer.heads * layer.units
    matmuls = [  # (times, n, k, m) of [n, k] · [k, m]
        (layer.units * ends, others, b_psi if tall else b_phi, d if tall else m),
        (heads * inner, side, b_phi if tall else b_psi, side),
        (heads * 2.0, side, others, side),
        (heads * float(_ROOT), side, side, side),
        (layer.units * psi, m, d, b_psi),
        (layer.units * psi * tall, m, b_phi, d),
        (layer.units * psi * k_psi * _INVERSE, b_psi, b_psi, b_psi),
        (layer.units * phi * k_phi * _INVERSE, b_phi, b_phi, b_phi),
    ]
    return sum(2 * times * n * k * m for times, n, k, m in matmuls)


def flops_of_token(geometry: Geometry, trained: bool = True) -> float:
    """Floating point operations of a token or location in forward and backward; those of a grouped convolution count
    `GROUPED` times."""
    matmuls, slower = 3 if trained else 2, GROUPED if geometry.units > 1 else 1
    return 2.0 * matmuls * slower * geometry.units * geometry.out_features * geometry.in_features


def flops_beside(model: nn.Module, layers: Sequence[Layer]) -> float:
    """Of the model's other linear layers and convolutions, frozen ones too, for each operation of these layers, if all
    see as many tokens."""
    own, others = {module for layer in layers for _, module in layer.modules}, 0.0
    for module in model.modules():
        geometry = geometry_of(module)
        if geometry is not None and module not in own:
            weight: Any = module.weight
            others += flops_of_token(geometry, weight.requires_grad)
    return others / sum(flops_of_token(layer.geometry) for layer in layers)


def interval_for(share: float) -> int:
    """The steps between two updates of a layer, where one of all layers in each step would cost `share` of forward and
    backward."""
    return next((k for k in range(1, MOST_INTERVAL) if share <= MOST_SHARE * k), MOST_INTERVAL)
