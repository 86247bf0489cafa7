"""What the table of faults does not show: which block fails, how sure Newton's iteration is, what is noticed where."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_helpers import core_batch, core_marian, core_step
from torch import Tensor, nn

from hf_lngd import LNGD
from hf_lngd.curvature import factor_bank
from hf_lngd.curvature.factors import adaptive_rate
from hf_lngd.curvature.inverses import inverse_sqrt
from hf_lngd.curvature.pooling import usable
from hf_lngd.curvature.rounding import Rounding
from hf_lngd.fallback import Fallback

KINDS = {
    "inverse": {"direction": "natural"},
    "whitener": {"direction": "polar"},
    "inverse_sqrt": {"direction": "gram"},
}


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_any_block_that_fails_keeps_all_blocks_of_its_factor(
    kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    fields = {**KINDS[kind], "factor_interval": 1, "inverse_interval": 1, "stagger": False, "max_factor_dim": 2}
    optimizer = LNGD(model, lr=1e-3, **fields)

    def step() -> None:
        model(torch.randn(8, 4, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    bank = optimizer._preconditioner.factor_banks[0]
    store = bank.derived["root" if kind == "inverse_sqrt" else kind]
    kept, condition = store.clone(), bank.condition.clone()
    real: Callable[..., Any] = getattr(factor_bank, kind)

    def fail(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        value, ok, condition = real(*args)
        ok = ok.clone()
        ok[0, block] = False
        return value, ok, condition

    monkeypatch.setattr(factor_bank, kind, fail)
    step()
    assert torch.equal(store[0], kept[0]) and bank.condition[0] == condition[0]
    assert not torch.equal(store[1], kept[1])
    assert optimizer.diagnostics()["failed_inverses"] == 1


def spd(n: int, condition: float) -> Tensor:
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(2, n, n, dtype=torch.float64))
    return (q * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)) @ q.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [33, 128])
def test_newtons_iteration_is_right_or_says_that_it_is_not(n: int, dtype: torch.dtype) -> None:
    verdicts = []
    for exponent in range(1, 12):
        matrix = spd(n, 10.0**exponent)
        root, ok, _ = inverse_sqrt(matrix.to(dtype), 0.0, "newton")
        values, vectors = torch.linalg.eigh(matrix)
        exact = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
        gap = (root.double() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
        assert (gap[ok] < 0.05).all(), exponent
        verdicts.append(bool(ok.all()))
    assert verdicts[:6] == [True] * 6 and verdicts[8:] == [False] * 3


def test_a_gradient_is_usable_matrix_by_matrix() -> None:
    grad = torch.ones(4, 2, 3)
    grad[1, 0, 0], grad[2, 1, 2], grad[3] = torch.nan, -torch.inf, 1e18
    found, bad = usable(grad.clone())
    assert bad == 2 and not found[1:3].any() and torch.equal(found[[0, 3]], grad[[0, 3]])
    assert usable(torch.full((1, 1, 1), 1e30))[1] == 1
    assert usable(torch.full((1, 1, 1), 1e30, dtype=torch.float64))[1] == 0


def test_a_rate_without_a_curvature_is_zero() -> None:
    curvature = torch.tensor([2.0, torch.nan, torch.inf])
    assert adaptive_rate(torch.tensor([4.0, 4.0, 4.0]), curvature, 0.0).tolist() == [2.0, 0.0, 0.0]


def test_adamw_recovers_where_torchs_own_does_not() -> None:
    """In every precision of weights."""
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        parameter = nn.Parameter(torch.ones(3, dtype=kind))
        fallback = Fallback((0.9, 0.999), 1e-8, Rounding("kahan", 0))
        group = {"params": [parameter], "lr": 0.1, "weight_decay": 0.0}
        for value in (1.0, torch.nan, 1.0):
            parameter.grad = torch.full_like(parameter, value)
            fallback.step(group)
        assert parameter.isfinite().all() and int(fallback.skipped) == 1
        assert fallback.moments[parameter]["step"] == 2


def test_a_mask_that_comes_late_finds_the_right_side() -> None:
    """Source and target equally long: keys of cross attention read the encoder, the decoder's own layers do not."""
    masked = core_batch(source=6, target=6)
    plain = {name: masked[name] for name in ("input_ids", "labels")}
    plain["labels"] = plain["labels"].clamp_min(2)
    found = []
    for late in (False, True):
        model = core_marian()
        optimizer = LNGD(model, lr=0.0, factor_interval=1, ema_decay=0.0)
        if late:
            core_step(model, optimizer, plain)
        core_step(model, optimizer, masked)
        found.append({name: optimizer.factors(name)["phi"] for name in optimizer._capture.layers})
    for name, phi in found[0].items():
        torch.testing.assert_close(found[1][name], phi, msg=lambda m, n=name: f"{n}: {m}")


def test_an_armed_transformer_goes_into_a_file_and_out(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = core_marian(), core_batch()
    optimizer = LNGD(model, lr=1e-3, chain="full", embedding="exact", factor_interval=1)
    core_step(model, optimizer, batch)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert b"hf_lngd" not in buffer.getvalue()
    loaded = torch.load(buffer, weights_only=False)
    twin = copy.deepcopy(model)
    for other in (loaded, twin):
        before = {name: value.clone() for name, value in optimizer.state_dict()["lngd"]["layers"].popitem()[1].items()}
        other(**batch).loss.backward()
        assert not optimizer._capture.sums and before
        again = LNGD(other, lr=1e-3, factor_interval=1)
        core_step(other, again, batch)
    with caplog.at_level(logging.WARNING, "hf_lngd"):
        core_step(model, optimizer, batch)
    assert not caplog.messages
