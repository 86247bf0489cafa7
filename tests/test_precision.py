"""Precision × accumulation × checkpointing × model: how far factors are from those of float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hf_helpers import hf_images, hf_vit
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

from hf_lngd import LNGDTrainer, LNGDTrainingArguments
from hf_lngd.integrations.trainer import lngd_of

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


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_that_reentrant_checkpointing_hides_are_told_of(kind: str) -> None:
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        factors(kind, BF16_AUTOCAST, 1, "reentrant", GRADIENTS)


def test_the_trainers_bf16(tmp_path: Path) -> None:
    found = []
    for bf16 in (False, True):
        args = LNGDTrainingArguments(
            str(tmp_path), optim_args="family=kfac,conv_rows=1", use_cpu=True, bf16=bf16, report_to="none", max_steps=2,
            save_strategy="no", learning_rate=0.0, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = LNGDTrainer(hf_vit(), args, train_dataset=hf_images(16))
        trainer.train()
        lngd = lngd_of(trainer.optimizer)
        assert lngd is not None
        found.append({f"{n}.{k}": v for n in lngd._capture.layers for k, v in lngd.factors(n).items()})
    assert 1e-6 < gap(found[1], found[0]) < GRADIENT_BOUNDS[BF16_AUTOCAST]
