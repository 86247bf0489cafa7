"""Activation checkpointing changes neither factors nor weights."""

from __future__ import annotations

import pytest
import torch
from core_helpers import core_batch, core_distance, core_marian, core_step, core_weights

from hf_lngd import LNGD


def run(fields: dict[str, object], **checkpointing: object) -> tuple[dict, LNGD]:
    model = core_marian()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        if checkpointing["use_reentrant"]:
            model.enable_input_require_grads()
    optimizer = LNGD(model, lr=1e-2, factor_interval=2, inverse_interval=2, **fields)
    for seed in range(4):
        core_step(model, optimizer, core_batch(seed))
    return core_weights(model), optimizer


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("fields", [{}, {"direction": "natural"}, {"chain": "full"}], ids=str)
def test_recomputed_forwards_do_not_count(fields: dict[str, object], reentrant: bool) -> None:
    plain, optimizer = run(fields)
    again, other = run(fields, use_reentrant=reentrant)
    assert core_distance(again, plain) < 1e-6
    for name in optimizer._capture.layers:
        torch.testing.assert_close(optimizer.factors(name)["phi"], other.factors(name)["phi"], rtol=1e-6, atol=1e-9)


def test_gradients_of_checkpointed_layers() -> None:
    fields = {"fisher": "empirical", "direction": "natural", "rate": "adaptive"}
    plain, _ = run(fields)
    again, _ = run(fields, use_reentrant=False)
    assert core_distance(again, plain) < 1e-6
