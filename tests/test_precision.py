"""Precision × accumulation × checkpointing × model: how far factors are from those of float32."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from precision_cases import (
    ACCUMULATIONS,
    BF16_AUTOCAST,
    BF16_WEIGHTS,
    CHECKPOINTING,
    FORWARD,
    FP16_AUTOCAST,
    FULL,
    GRADIENTS,
    MODELS,
    PRECISIONS,
    factors,
    gap,
)

# Of Φ and Ψ; of KFAC's factors, and of the rates of Eq. 12-13: gradients carry what the layers above have rounded.
BOUNDS = {FULL: 1e-5, BF16_AUTOCAST: 1e-2, FP16_AUTOCAST: 4e-3, BF16_WEIGHTS: 1.5e-2}
GRADIENT_BOUNDS = {FULL: 1e-5, BF16_AUTOCAST: 3e-2, FP16_AUTOCAST: 2e-2, BF16_WEIGHTS: 5e-2}


@cache
def plain(kind: str, gradients: bool) -> tuple[dict[str, Any], dict[str, Any], int]:
    return factors(kind, FULL, 1, "off", GRADIENTS if gradients else FORWARD)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_factors_of_the_forward_pass(kind: str, precision: str, accumulation: int, checkpointing: str) -> None:
    found, _, left_out = factors(kind, precision, accumulation, checkpointing, FORWARD)
    assert gap(found, plain(kind, False)[0]) < BOUNDS[precision]
    assert (left_out > 0) == (precision == FP16_AUTOCAST)


@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant"])
@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_factors_and_rates_of_gradients(kind: str, precision: str, accumulation: int, checkpointing: str) -> None:
    found, rates, left_out = factors(kind, precision, accumulation, checkpointing, GRADIENTS)
    assert gap(found, plain(kind, True)[0]) < GRADIENT_BOUNDS[precision]
    assert gap(rates, plain(kind, True)[1]) < GRADIENT_BOUNDS[precision]
    assert (left_out > 0) == (precision == FP16_AUTOCAST)
