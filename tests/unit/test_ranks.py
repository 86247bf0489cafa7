"""Tasks over processes: balanced, complete, the same for everyone; one process needs no collective."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lngd.batches import balanced
from hf_lngd.parallel.ranks import Ranks, by_dtype

COSTS = st.lists(st.integers(0, 50).map(float), max_size=7)
MANY = st.lists(st.floats(0, 1e9), max_size=200)


def loads_of(costs: list[float], owners: list[int], ranks: int) -> list[float]:
    loads = [0.0] * ranks
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return loads


@settings(deadline=None, max_examples=30)
@given(COSTS, st.integers(1, 3))
def test_within_four_thirds_of_the_best(costs: list[float], ranks: int) -> None:
    found = max(loads_of(costs, balanced([[cost] for cost in costs], ranks), ranks))
    best = min(max(loads_of(costs, owners, ranks)) for owners in itertools.product(range(ranks), repeat=len(costs)))
    assert found <= 4 / 3 * best


@settings(deadline=None)
@given(MANY, st.integers(1, 512))
def test_every_task_has_one_rank_and_always_the_same(costs: list[float], ranks: int) -> None:
    owners = balanced([[cost] for cost in costs], ranks)
    assert len(owners) == len(costs) and all(0 <= owner < ranks for owner in owners)
    assert owners == balanced(tuple((cost,) for cost in costs), ranks)
    # never more than a fair share and the largest task
    assert max(loads_of(costs, owners, ranks)) <= (sum(costs) / ranks + max(costs, default=0.0)) * (1 + 1e-9)


def test_every_step_of_several_is_shared_out() -> None:
    """Two tasks of the first step and two of the second: each rank gets one of both."""
    owners = balanced([[4.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.0, 1.0]], 2)
    assert sorted(owners[:2]) == [0, 1] == sorted(owners[2:])


def test_what_can_travel_together() -> None:
    tensors = [torch.zeros(2), torch.zeros(1).double(), torch.zeros(3), torch.zeros(1, device="meta")]
    assert by_dtype(tensors) == [[0, 2], [1], [3]]


def test_one_process_alone() -> None:
    ranks, x = Ranks(), torch.arange(3.0)
    assert (ranks.size, ranks.rank) == (1, 0)
    assert torch.equal(ranks.all_reduce([x])[0], x) and torch.equal(ranks.all_to_all(x, [3], [3]), x)
    (kept,) = ranks.reduce_scatter([x], [0])
    assert torch.equal(kept, x)
    assert ranks.all_gather_value({"a": 1}) == [{"a": 1}] and ranks.broadcast_value(x, 0) is x
    ranks.check_same("anything", {"a": 1})
