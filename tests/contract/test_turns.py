"""Layers take turns: which of them a step updates, how far they go, and how the interval is decided."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lngd import LNGD
from hf_lngd.work import MOST_SHARE, flops_of_update, interval_for
from tests.helpers import seeded, through_a_file

WIDTH = 32


def make() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8))).double()


def step(model: nn.Module, optimizer: LNGD, tokens: int, parts: int = 1) -> None:
    x = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for part in x.chunk(parts):
        (model(part).square().sum() / x.numel()).backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model: nn.Sequential) -> list[Tensor]:
    return [layer.weight.detach().clone() for layer in model]  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("interval", [1, 2, 3, 4])
def test_each_layer_is_updated_once_in_an_interval(interval: int) -> None:
    model = seeded(make)
    optimizer = LNGD(model, lr=1e-2, weight_decay=0.0, update_interval=interval)
    seen = [weights(model)]
    for _ in range(2 * interval):
        step(model, optimizer, 64)
        seen.append(weights(model))
    moved = [
        {i for i, (a, b) in enumerate(zip(*pair, strict=True)) if not torch.equal(a, b)} for pair in pairwise(seen)
    ]
    assert moved[:interval] == moved[interval:]
    assert sorted(i for own in moved[:interval] for i in own) == list(range(8))
    assert max(map(len, moved)) - min(map(len, moved)) <= 1  # equal layers: steps cost the same
    first = float((seen[1][min(moved[0])] - seen[0][min(moved[0])]).square().mean().sqrt())
    assert first == pytest.approx(interval * 1e-2, rel=1e-3)


def test_every_gradient_enters_the_momentum() -> None:
    model = seeded(make)
    optimizer = LNGD(model, lr=0.0, update_interval=4)
    for _ in range(3):
        step(model, optimizer, 64)
    other = seeded(make)
    plain = LNGD(other, lr=0.0, update_interval=1)
    for _ in range(3):
        step(other, plain, 64)
    for layer, same in zip(model, other, strict=True):
        assert torch.equal(optimizer.state[layer.weight]["momentum"], plain.state[same.weight]["momentum"])


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(("tokens", "expected"), [(16, 4), (1 << 13, 1)])
def test_auto_follows_the_tokens_of_a_step(tokens: int, expected: int, parts: int) -> None:
    model = seeded(make)
    optimizer = LNGD(model, lr=1e-3)
    step(model, optimizer, tokens, parts)
    assert optimizer.core.interval == expected


def test_it_is_the_mean_of_factor_steps_that_counts() -> None:
    """Batches of like lengths differ by three times; so steps do, not the turns."""
    model = seeded(make)
    optimizer = LNGD(model, lr=1e-3, factor_interval=2)
    for tokens, expected in ((16, 4), (1 << 13, 4), (1 << 13, 1), (16, 1), (16, 1)):
        step(model, optimizer, tokens)
        assert optimizer.core.interval == expected


def test_layers_that_are_not_trained_count() -> None:
    """As under LoRA, where updates of a few small matrices cost nothing beside the model."""
    model = seeded(make)
    for layer in list(model)[1:]:
        layer.requires_grad_(False)
    optimizer = LNGD(model, lr=1e-3)
    step(model, optimizer, 64)
    whole = seeded(make)
    other = LNGD(whole, lr=1e-3)
    step(whole, other, 64)
    assert optimizer.core.interval < other.core.interval


def test_the_least_interval_that_keeps_the_share() -> None:
    shares = (0.0, MOST_SHARE, 1.01 * MOST_SHARE, 2.5 * MOST_SHARE, 3.5 * MOST_SHARE, 100.0)
    assert [interval_for(share) for share in shares] == [1, 1, 2, 3, 4, 4]


def test_the_share_is_that_of_the_matmuls() -> None:
    """Around the number of tokens at which an update of all layers costs a third of forward and backward."""
    layer = LNGD(seeded(make), lr=1e-3).core.routing.layers[0]
    tokens = flops_of_update(layer, LNGD(seeded(make)).config) / (6 * WIDTH * WIDTH * MOST_SHARE)
    for factor, expected in ((1.05, 1), (0.95, 2)):
        model = seeded(make)
        optimizer = LNGD(model, lr=1e-3)
        step(model, optimizer, int(factor * tokens))
        assert optimizer.core.interval == expected


@pytest.mark.parametrize("by", ["lngd", "torch"])
def test_a_resumed_run_takes_the_same_turns(by: str) -> None:
    """Also where the state comes without what stands under ``lngd``, as from torch.distributed.checkpoint."""
    runs: list[list[Tensor]] = []
    for stop in (None, 3):
        model = seeded(make)
        optimizer = LNGD(model, lr=1e-2)
        for i in range(7):
            if i == stop:
                state: dict[str, Any] = through_a_file(optimizer.state_dict())
                if by == "torch":
                    del state["lngd"]
                optimizer = LNGD(model, lr=1e-2)
                optimizer.load_state_dict(state)
                assert optimizer.core.interval == 4
            step(model, optimizer, 16 if i < 3 else 1 << 13)  # decided anew it would be 1
        runs.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_interval_may_change_on_resume() -> None:
    model = seeded(make)
    optimizer = LNGD(model, lr=1e-2)
    step(model, optimizer, 16)
    other = LNGD(model, lr=1e-2, update_interval=2)
    other.load_state_dict(optimizer.state_dict())
    assert other.core.interval == 2
    before = weights(model)
    for _ in range(2):
        step(model, other, 16)
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_a_bad_interval_in_a_state_is_named() -> None:
    model = seeded(make)
    optimizer = LNGD(model, lr=1e-2)
    step(model, optimizer, 16)
    state = optimizer.state_dict()
    for own in state["state"].values():
        own["turns"] = torch.tensor([4.0, -1.0, 1.0])
    with pytest.raises(
        ValueError, match=r"state_dict: turns: got \[4\.0, -1\.0, 1\.0\], accepted: numbers, at least 0"
    ):
        LNGD(model, lr=1e-2).load_state_dict(state)


@pytest.mark.parametrize("fields", [{"direction": "natural"}, {"rate": "adaptive"}, {"momentum_on": "update"}], ids=str)
def test_others_update_each_layer_in_each_step(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="update_interval: got 2, accepted: auto or 1, but with direction=polar"):
        LNGD(make(), update_interval=2, **fields)  # type: ignore[arg-type]
    model = seeded(make)
    optimizer = LNGD(model, lr=1e-3, **fields)  # type: ignore[arg-type]
    before = weights(model)
    step(model, optimizer, 16)
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
