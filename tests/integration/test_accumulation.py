"""How a batch is split, and how far it is padded, changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_lngd import LNGD
from tests.core_helpers import core_batch, core_distance, core_marian, core_step, core_weights

CONFIGS = [
    {},
    {"matrix_dtype": "full", "bias": "factor", "max_factor_dim": 10},
    {"direction": "natural", "rate": "adaptive", "rate_rows": 2},
    {"direction": "natural", "fisher": "empirical"},
    {"direction": "gram"},
    {"chain": "full"},
    {"direction": "natural", "rate": "trust"},
    {"preset": "paper", "fisher": "expected", "factor_interval": 2, "inverse_interval": 2},
    *({"family": family} for family in ("kfac", "tkfac", "ng+")),  # EKFAC: test_family_bank.py
    {"embedding": "exact"},
]


def run(fields: dict[str, object], parts: int | list[int], pad: int = 0) -> tuple[dict, LNGD]:
    model = core_marian()
    optimizer = LNGD(model, lr=1e-2, **fields)
    for seed in range(5):
        batch = core_batch(seed)
        if pad:
            batch = {
                name: F.pad(value, (0, pad), value=-100 if name == "labels" else 0) for name, value in batch.items()
            }
        core_step(model, optimizer, batch, parts)
    return core_weights(model), optimizer


@pytest.mark.parametrize("fields", [*CONFIGS, {"fisher": "true"}, {"fisher": "sampled"}], ids=str)
def test_micro_batches_are_one_batch(fields: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    if fields.get("fisher") in ("true", "sampled"):  # draws differ by how a batch is split: make them certain
        monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
        monkeypatch.setattr(
            torch, "randn", lambda *shape, generator, **k: torch.linspace(0, 2, shape[-1], **k).expand(shape).clone()
        )
    whole, optimizer = run(fields, 1)
    for parts in (4, [1, 5, 2]):
        split, other = run(fields, parts)
        assert core_distance(split, whole) < 1e-6
        for name in optimizer._capture.layers:
            again = other.factors(name)
            for kind, value in optimizer.factors(name).items():
                assert (value - again[kind]).norm() < 1e-6 * value.norm(), (name, kind)


# Exact embeddings count what is looked up: the last word of a sentence is, once padding follows it.
@pytest.mark.parametrize("fields", CONFIGS[:-1], ids=str)
def test_padding_is_nothing(fields: dict[str, object]) -> None:
    plain, optimizer = run(fields, 1)
    padded, other = run(fields, 1, pad=3)
    assert core_distance(padded, plain) < 1e-6
    for name in optimizer._capture.layers:
        for kind, value in optimizer.factors(name).items():
            assert (other.factors(name)[kind] - value).norm() < 1e-6 * value.norm(), (name, kind)


def test_loss_scale_is_nothing_to_factors_of_the_forward_pass() -> None:
    factors = []
    for scale in (1.0, 1024.0):
        model = core_marian()
        optimizer = LNGD(model, lr=0.0)
        (model(**core_batch()).loss * scale).backward()
        optimizer.step()
        factors.append(optimizer.factors("model.encoder.layers.0.fc1")["phi"])
    assert torch.equal(*factors)
