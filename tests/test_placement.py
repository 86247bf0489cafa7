"""Inverses over ranks: balanced, complete, the same for everyone; and where spreading them pays."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lngd.placement import SPEEDS, loads_of, placement, spread_pays

COSTS = st.lists(st.integers(0, 50).map(float), max_size=7)
MANY = st.lists(st.floats(0, 1e9), max_size=200)


@settings(deadline=None, max_examples=60)
@given(COSTS, st.integers(1, 3))
def test_within_four_thirds_of_the_best(costs: list[float], ranks: int) -> None:
    found = max(loads_of(costs, placement(costs, ranks), ranks))
    best = min(max(loads_of(costs, owners, ranks)) for owners in itertools.product(range(ranks), repeat=len(costs)))
    assert found <= 4 / 3 * best


@given(MANY, st.integers(1, 512))
def test_every_task_has_one_rank_and_always_the_same(costs: list[float], ranks: int) -> None:
    owners = placement(costs, ranks)
    assert len(owners) == len(costs) and all(0 <= owner < ranks for owner in owners)
    assert owners == placement(tuple(costs), ranks)
    # never more than a fair share and the largest task
    assert max(loads_of(costs, owners, ranks)) <= (sum(costs) / ranks + max(costs, default=0.0)) * (1 + 1e-9)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="ranks: got 0"):
        placement([1.0], 0)
    with pytest.raises(ValueError, match="costs: got -1"):
        placement([1.0, -1.0], 2)


@pytest.mark.parametrize(("tasks", "width", "pays"), [(1, 1024, False), (8, 8, False), (8, 512, True)])
def test_few_or_small_inverses_stay_where_they_are(tasks: int, width: int, pays: bool) -> None:
    speed = SPEEDS["cpu"]
    costs, sizes = [width**3 / speed.eigh] * tasks, [2 * width**2] * tasks
    assert spread_pays(costs, sizes, placement(costs, 2), 2, speed) == pays
