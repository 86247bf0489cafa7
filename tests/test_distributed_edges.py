"""Odd models over two ranks: undefined gradients, layers that are not heard or not called, static graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import dist_faults
from tests.dist_cases import distance
from tests.dist_pool import DistPool, open_pools


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DistPool]:
    for pools in open_pools(tmp_path_factory.mktemp("pool"), "tests.dist_faults", (2,)):
        yield pools[2]


def check_same(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Both ranks have one process's weights and factors, each other's to the bit, and nothing was passed over."""
    assert distance(two[0], one) <= 1e-10
    assert all(torch.equal(w, two[1]["weights"][name]) for name, w in two[0]["weights"].items())
    for name, factors in one["factors"].items():
        for kind, value in factors.items():
            assert (two[0]["factors"][name][kind] - value).norm() <= 1e-9 * value.norm(), (name, kind)
    for found in (*two, one):
        assert found["numbers"]["skipped_factors"] == found["numbers"]["failed_inverses"] == 0


EMPIRICAL = {"fisher": "empirical", "direction": "natural"}


@pytest.mark.parametrize("fields", [EMPIRICAL, {"family": "kfac"}, {"rate": "adaptive"}], ids=str)
def test_an_output_that_is_not_in_the_loss(fields: dict[str, Any], pool: DistPool) -> None:
    # returned, so DDP waits for its layer, whose gradient is undefined
    case = {"both_at": (), **fields}
    one, two = dist_faults.train_heads(1, **case), pool.run(dist_faults.train_heads, ranks=2, **case)
    check_same(two, one)
    assert torch.equal(two[0]["weights"]["other.weight"], two[0]["start"]["other.weight"])


SOMETIMES = (EMPIRICAL, *({"family": f} for f in ("kfac", "tkfac", "ng+", "ekfac")), {"rate": "adaptive"})


@pytest.mark.parametrize("both_at", [(2, 4), (0, 3)], ids=str)
@pytest.mark.parametrize("fields", SOMETIMES, ids=str)
def test_an_output_that_is_in_the_loss_at_some_steps(
    fields: dict[str, Any], both_at: tuple[int, ...], pool: DistPool
) -> None:
    case = {"both_at": both_at, "early_factors": False, "inverse_interval": 1, **fields}
    one, two = dist_faults.train_heads(1, **case), pool.run(dist_faults.train_heads, ranks=2, **case)
    check_same(two, one)
    assert not torch.equal(two[0]["weights"]["other.weight"], two[0]["start"]["other.weight"])


def test_adaptive_rate_behind_a_reentrant_checkpoint_raises_on_every_rank(pool: DistPool) -> None:
    for returned, message in pool.outcomes(dist_faults.train_unheard, how="reentrant"):
        assert not returned
        assert message.startswith("RuntimeError: rate: 'adaptive' saw no gradients of layer in this step"), message


def test_adaptive_rate_of_a_layer_that_is_not_heard_is_zero(pool: DistPool) -> None:
    for rate, start, weights in pool.run(dist_faults.train_unheard, how="bare"):
        assert rate == 0.0
        assert torch.equal(weights["layer.weight"], start["layer.weight"])
        assert all(0 < (w - start[name]).norm() < 1 for name, w in weights.items() if name != "layer.weight")


def test_true_fisher_in_a_static_graph_raises_on_every_rank(pool: DistPool) -> None:
    for returned, message in pool.outcomes(dist_faults.train_true, static=True):
        assert not returned
        assert message.startswith("RuntimeError: fisher: 'true' makes a backward pass before"), message
        assert "static_graph=False" in message
    first, second = pool.run(dist_faults.train_true, static=False)
    assert first == second > 0


@pytest.mark.parametrize("skips", ["1-1", "0-0", "10-", "01-"])
@pytest.mark.parametrize("fields", [{}, {"family": "kfac"}, {"fisher": "sampled"}], ids=str)
def test_a_layer_that_a_rank_did_not_call_at_first(fields: dict[str, Any], skips: str, pool: DistPool) -> None:
    two = pool.run(dist_faults.train_skipping, ranks=2, skips=skips, **fields)
    assert two[0]["topology"] == two[1]["topology"]
    one = dist_faults.train_skipping(1, skips=skips, **fields)
    assert sorted(two[0]["topology"]) == sorted(one["topology"])
    if "fisher" not in fields:  # whose draws are each rank's own
        check_same(two, one)
    assert all(torch.equal(w, two[1]["weights"][name]) for name, w in two[0]["weights"].items())


@pytest.mark.parametrize("skips", ["0", "1"])
def test_ranks_that_disagree_say_so_where_one_of_them_did_not_call_a_layer(skips: str, pool: DistPool) -> None:
    for returned, message in pool.outcomes(dist_faults.train_skipping, ranks=2, skips=skips, odd=True):
        assert not returned
        assert message.startswith("RuntimeError: LNGD: the ranks disagree about what follows the layers"), message


@pytest.mark.parametrize("taken", [["01", "10", "01"], ["10", "00", "11"], ["00", "01", "11"]], ids="-".join)
@pytest.mark.parametrize("fields", [{}, {"family": "kfac"}, {"rate": "adaptive"}], ids=str)
def test_each_rank_calls_another_expert_at_first(fields: dict[str, Any], taken: list[str], pool: DistPool) -> None:
    two = pool.run(dist_faults.train_experts, ranks=2, taken=taken, **fields)
    one = dist_faults.train_experts(1, taken, **fields)
    assert sorted(two[0]["topology"]) == sorted(two[1]["topology"]) == sorted(one["topology"])
    check_same(two, one)
