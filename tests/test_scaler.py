"""A gradient scaler changes neither factors nor rates, and of a step that it leaves out nothing is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_helpers import core_batch, core_marian
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F

from hf_lngd import LNGD

EVERY_STEP: dict[str, Any] = {"factor_interval": 1, "inverse_interval": 1, "matrix_dtype": "full"}
# What takes statistics of gradients, and what counts in forward passes.
CONFIGS: list[dict[str, Any]] = [
    {},
    {"fisher": "empirical", "direction": "natural"},
    {"fisher": "true", "direction": "natural"},
    {"direction": "natural", "rate": "adaptive", "rate_rows": 2},
    {"preset": "lngd_lr"},
    {"embedding": "exact"},
    *({"family": family} for family in ("kfac", "ekfac", "tkfac", "ng+")),
    {"family": "kfac", "rate": "adaptive"},
]


def scaler_of(scale: float, **fields: Any) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, growth_interval=10**6, **fields)


class Loop:
    """A plain loop as torch's notes on mixed precision write it, in float32 so that powers of two are exact."""

    def __init__(self, fields: dict[str, Any], scale: float | None, clip: float | None = None) -> None:
        self.model = core_marian().float()
        self.optimizer = LNGD(self.model, lr=1e-2, **EVERY_STEP, **fields)
        self.scaler = scaler_of(scale or 1.0, enabled=scale is not None)
        self.clip = clip

    def micro_batch(self, batch: dict[str, Tensor], terms: Tensor, spoil: bool = False) -> None:
        logits = self.model(**batch).logits
        if self.optimizer.needs_fisher_pass:
            self.optimizer.fisher_backward(logits, batch["labels"] != -100)
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
        self.scaler.scale(loss / terms * (float("inf") if spoil else 1.0)).backward()

    def step(self, seed: int, parts: int = 1, spoil: bool = False) -> None:
        batch = core_batch(seed)
        terms = (batch["labels"] != -100).sum()
        for part in zip(*(value.chunk(parts) for value in batch.values()), strict=True):
            self.micro_batch(dict(zip(batch, part, strict=True)), terms, spoil)
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def assert_same(one: Loop, two: Loop) -> None:
    for name in one.optimizer._capture.layers:
        for kind, value in one.optimizer.factors(name).items():
            assert torch.equal(value, two.optimizer.factors(name)[kind]), (name, kind)
    for (name, p), q in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize(
    ("fields", "clip"), [*((fields, 0.1) for fields in CONFIGS), ({"fisher": "empirical"}, None)], ids=str
)
def test_the_scale_of_the_loss_is_nothing_to_factors_rates_and_weights(
    fields: dict[str, Any], clip: float | None
) -> None:
    plain, scaled = Loop(fields, None, clip), Loop(fields, 2.0**10, clip)
    for seed in range(3):
        for loop in (plain, scaled):
            loop.step(seed, parts=2)
    assert_same(plain, scaled)


@pytest.mark.parametrize(
    ("fields", "zero_late"), [*((fields, False) for fields in CONFIGS), ({"fisher": "empirical"}, True)], ids=str
)
def test_of_a_step_that_is_left_out_nothing_is_kept(fields: dict[str, Any], zero_late: bool) -> None:
    drawn = fields.get("fisher") == "true" or fields.get("preset") == "lngd_lr"
    plain, skipping = Loop(fields, 2.0**4), Loop(fields, 2.0**4)
    for seed in range(3):
        plain.step(seed)
        skipping.step(seed)
        if drawn:
            state = skipping.optimizer._capture.source.generator(torch.device("cpu")).get_state()
        before = skipping.optimizer._steps
        for late in range(2):  # twice: the second begins with what the first left
            skipping.step(7 + late, parts=2, spoil=True)
            if zero_late:  # gradients of the step left out are there yet when the next forward is made
                for p in skipping.model.parameters():
                    p.grad = torch.full_like(p, torch.nan)
        if drawn:  # draws were made; what they gave is dropped
            skipping.optimizer._capture.source.generator(torch.device("cpu")).set_state(state)
        assert skipping.optimizer._steps == before
        assert float(skipping.scaler.get_scale()) == 2.0 ** (4 - 2 * (seed + 1))
        if zero_late:
            skipping.model.zero_grad()
    plain.step(5)
    skipping.step(5)
    assert_same(plain, skipping)
    assert skipping.optimizer.diagnostics()["skipped_factors"] == 0


def test_a_step_that_is_left_out_before_the_first_one() -> None:
    plain, skipping = Loop({}, None), Loop({}, 2.0**4)
    skipping.step(9, spoil=True)
    for loop in (plain, skipping):
        loop.step(0)
    assert_same(plain, skipping)


def test_parts_of_a_model_that_are_called_by_themselves_begin_anew() -> None:
    found = []
    for spoil in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(6, 4)
        optimizer, scaler = LNGD(model, lr=1e-2, **EVERY_STEP), scaler_of(8.0)
        for scale in (1.0, *([float("inf")] if spoil else []), 1.0):
            scaler.scale(model[1](model[0](x * min(scale, 3.0))).square().mean() * scale).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(optimizer.factors("1")["phi"])
    assert torch.equal(*found)


def test_a_question_that_no_scaler_asks_changes_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(6, 4)
    optimizer = LNGD(model, lr=0.0, **EVERY_STEP)
    model(x).sum().backward()
    assert optimizer._step_supports_amp_scaling is False
    model(3 * x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.factors("0")["phi"], 4 * (5 * x.mT @ x / 6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["lngd", "kfac"])
def test_under_accelerate(family: str) -> None:
    """accelerate has no fp16 on the CPU: its wrapper is given the scaler by hand."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    fields = {**EVERY_STEP, "family": family, "rate": "adaptive", "direction": "natural"}
    found = []
    for scale in (None, 2.0**8):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 4)
        scaler = None if scale is None else scaler_of(scale)
        inner = LNGD(model, lr=1e-2, **fields)
        optimizer = AcceleratedOptimizer(inner, scaler=scaler)
        for spoil in (False, True, False):
            if spoil and scaler is None:
                continue
            loss = model(x * (100.0 if spoil else 1.0)).square().mean()
            loss = loss if scaler is None else scaler.scale(loss * (float("inf") if spoil else 1.0))
            loss.backward()
            optimizer.step()
            assert optimizer.step_was_skipped == spoil
            optimizer.zero_grad()
        found.append([p.detach() for p in model.parameters()] + list(inner.factors("2").values()))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
