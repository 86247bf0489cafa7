"""Running factors kept in bfloat16: half the bytes, averages that still move, checkpoints of either precision."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from core_helpers import core_batch, core_marian, core_step
from torch import Tensor, nn

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.curvature import factor_bank
from hf_lngd.integrations.estimate import estimate
from tests.test_state_dict import flat, reload

BF16 = torch.bfloat16
HALVED: dict[str, Any] = {"factor_dtype": "bfloat16"}
# Of each family the keys of what is halved.
BOTH = {"left", "right"}
FAMILIES = {"lngd": {"phi"}, "kfac": BOTH, "ekfac": BOTH, "tkfac": BOTH, "ng+": BOTH}


def trained(dtype: torch.dtype = torch.float32, steps: int = 4, **fields: Any) -> tuple[nn.Module, LNGD]:
    model = core_marian().to(dtype)
    optimizer = LNGD(model, lr=2e-3, factor_interval=1, **fields)
    for seed in range(steps):
        core_step(model, optimizer, core_batch(seed))
    return model, optimizer


def kinds(optimizer: LNGD) -> dict[str, set[torch.dtype]]:
    """dtypes of the state by key."""
    found: dict[str, set[torch.dtype]] = {}
    state = optimizer.state_dict()["lngd"]
    for kind in ("groups", "layers"):
        for own in state[kind].values():
            for key, tensor in own.items():
                found.setdefault(key, set()).add(tensor.dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_running_matrices_are_halved(family: str, dtype: torch.dtype) -> None:
    _, full = trained(dtype, family=family)
    _, half = trained(dtype, family=family, **HALVED)
    before, after = kinds(full), kinds(half)
    assert before.keys() == after.keys()
    halved = {key for key in after if after[key] != before[key]}
    assert halved == FAMILIES[family] and all(after[key] == {BF16} for key in halved)
    state = half.state_dict()["lngd"]["groups"].values()
    bytes_ = sum(t.numel() for own in state for key, t in own.items() if key in halved)
    size = torch.promote_types(dtype, torch.float32).itemsize
    assert full.memory_usage()["factors"] - half.memory_usage()["factors"] == bytes_ * (size - 2)
    assert half.diagnostics()["failed_inverses"] == half.diagnostics()["skipped_factors"] == 0


@pytest.mark.parametrize("fields", [{}, {"direction": "gram"}, {"direction": "natural"}, {"family": "kfac"}], ids=str)
def test_factors_and_steps_are_near_those_in_full(fields: dict[str, Any]) -> None:
    fields = {**fields, "matrix_dtype": "full"}
    start = dict(core_marian().float().named_parameters())
    (first, full), (second, half) = trained(steps=3, **fields), trained(steps=3, **fields, **HALVED)
    for name in full._capture.layers:
        for kind, expected in full.factors(name).items():
            found = half.factors(name)[kind]
            assert found.dtype == torch.float32
            assert (found - expected).norm() <= 0.02 * expected.norm(), (name, kind)
            assert found.dim() == 1 or torch.equal(found, found.mT)
    weights = dict(second.named_parameters())
    gap = sum(float((weights[n].detach() - p.detach()).square().sum()) for n, p in first.named_parameters())
    way = sum(float((p.detach() - start[n].detach()).square().sum()) for n, p in first.named_parameters())
    assert 0 < (gap / way) ** 0.5 < 0.1


def settled(scale: float, **fields: Any) -> Tensor:
    """Φ after 30 steps of inputs of one size and 150 of another, nothing else changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    optimizer = LNGD(model, lr=0.0, factor_interval=1, **fields)
    x = torch.randn(64, 8)
    for step in range(180):
        model(x * (1.0 if step < 30 else scale)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.factors("0")["phi"]


def test_averages_move_where_the_nearest_number_stands_still() -> None:
    full, before = settled(1.02), settled(1.0)
    half = settled(1.02, **HALVED)
    with patch.object(factor_bank, "round_at_random", lambda value, _: value):
        nearest = settled(1.02, **HALVED)
    way = (full - before).norm()
    assert (half - full).norm() < 0.4 * way  # the spread of one number is about 1 %, the way 4 %
    assert abs(float(((half - before) * (full - before)).sum()) / float(way.square()) - 1) < 0.1
    assert (nearest - full).norm() > 0.8 * way


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["lngd", "kfac"])
def test_a_checkpoint_of_either_precision_is_taken_over(family: str, dtype: torch.dtype) -> None:
    (_, full), (model, half) = trained(dtype, family=family), trained(dtype, family=family, **HALVED)
    before = {name: half.factors(name) for name in half._capture.layers}
    from_half, from_full = (reload(optimizer.state_dict()) for optimizer in (half, full))
    full.load_state_dict(from_half)
    assert all(torch.equal(full.factors(n)[k], v) for n, own in before.items() for k, v in own.items())
    assert BF16 not in set().union(*(v for k, v in kinds(full).items() if k in FAMILIES[family]))
    dtypes = kinds(half)
    half.load_state_dict(from_full)
    assert kinds(half) == dtypes
    core_step(model, half, core_batch(9))


def test_a_checkpoint_from_before_there_was_the_option() -> None:
    _, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    del state["lngd"]["config"]["factor_dtype"]
    optimizer.load_state_dict(state)
    again = flat(optimizer.state_dict()["lngd"])
    assert all(torch.equal(again[name], value) for name, value in flat(state["lngd"]).items())


@pytest.mark.parametrize(
    "fields",
    [{"preset": "paper"}, {"damping": "paper"}, {"damping_rho": 0.29}, {"family": "kfac", "damping_rho": 0.01}],
    ids=str,
)
def test_too_little_damping_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="factor_dtype: got 'bfloat16', accepted: full, or damping=relative with"):
        LNGDConfig(**fields, **HALVED)
    assert LNGDConfig(**{**fields, "damping": "relative", "damping_rho": 0.3}, **HALVED).factor_dtype == "bfloat16"


def test_the_users_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    model = core_marian().float()
    optimizer = LNGD(model, **HALVED)
    torch.manual_seed(3)
    core_step(model, optimizer, core_batch())
    assert torch.equal(torch.rand(4), expected)


def test_bytes_are_known_before_training() -> None:
    def make(device: str) -> tuple[nn.Module, Tensor]:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).to(device), torch.ones(3, 6, device=device)

    model, x = make("cpu")
    optimizer = LNGD(model, **HALVED)
    model(x).square().mean().backward()
    optimizer.step()
    other, like = make("meta")
    found = estimate(other, lambda: other(like).square().mean(), LNGDConfig(**HALVED))
    assert found.memory["factors"] == optimizer.memory_usage()["factors"]
