"""The weight decay of LNGD's layers where none is given: it ends before weights are gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_lngd import LNGD
from tests.helpers import seeded


def train(steps: int, lr: float, fields: dict[str, Any], scale: float = 1.0, move: float = 0.0) -> nn.Linear:
    """A layer in a run of this length, whose loss pulls at it with `move`, or not at all."""
    model = nn.Linear(6, 5, bias=False)
    with torch.no_grad():
        model.weight.mul_(scale)
    optimizer = LNGD(model, lr=lr, update_interval=1, **fields)
    for _ in range(steps):
        (model(torch.randn(8, 6)).sum() * move).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(("steps", "lr"), [(300, 3e-2), (150, 5e-2)])
def test_long_runs_keep_half_of_the_weights(steps: int, lr: float) -> None:
    """Where AdamW's rule with the same decay would leave a millionth of them."""
    first = seeded(lambda: nn.Linear(6, 5, bias=False)).weight.norm()
    torch.manual_seed(0)
    last = train(steps, lr, {"factor_interval": 2}).weight.norm()
    assert 0.4999 < last / first < 0.53


def test_short_runs_decay_as_if_there_were_no_end() -> None:
    torch.manual_seed(0)
    before = nn.Linear(6, 5, bias=False).weight.detach().clone()
    torch.manual_seed(0)
    torch.testing.assert_close(train(10, 1e-3, {}).weight, before * (1 - 1.5e-3) ** 10)


def test_a_decay_that_is_given_is_adamws() -> None:
    torch.manual_seed(0)
    before = nn.Linear(6, 5, bias=False).weight.detach().clone()
    for decay in (0.3, 0.0):
        torch.manual_seed(0)
        torch.testing.assert_close(train(100, 1e-2, {"weight_decay": decay}).weight, before * (1 - 1e-2 * decay) ** 100)


def test_weights_that_start_at_zero_or_grow_decay_in_full() -> None:
    """They settle where steps and decay balance, as with a decay that is given."""
    found = []
    for fields in ({}, {"weight_decay": 1.5}):
        torch.manual_seed(0)
        found.append(train(60, 1e-2, fields, scale=0.0, move=1.0).weight)
    assert found[0].norm() > 0
    torch.testing.assert_close(found[0], found[1])


def test_it_goes_on_after_a_resume() -> None:
    """Also between two looks at the norms, which are of the run's beginning and not of the resume."""
    model = seeded(lambda: nn.Linear(6, 5, bias=False))
    optimizer = LNGD(model, lr=5e-2)

    def steps(model: nn.Module, optimizer: LNGD, count: int) -> None:
        for _ in range(count):
            (model(torch.ones(8, 6)).sum() * 0.0).backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(model, optimizer, 27)
    other = nn.Linear(6, 5, bias=False)
    other.load_state_dict(model.state_dict())
    resumed = LNGD(other, lr=5e-2)
    resumed.load_state_dict(optimizer.state_dict())
    steps(model, optimizer, 30)
    steps(other, resumed, 30)
    assert torch.equal(model.weight, other.weight)
