"""One process or many: the same weights. Real processes on gloo, plain PyTorch loops with DDP."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import dist_cases
from tests.dist_pool import Pools, open_pools


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    yield from open_pools(tmp_path_factory.mktemp("pool"), "tests.dist_cases")


# Φ of all rows: which one in eight is looked at depends on how a batch is dealt.
EXACT: dict[str, Any] = {"conv_rows": 1, "rate_rows": 1, "matrix_dtype": "full"}
PAPER = {"preset": "paper", "fisher": "expected", "factor_interval": 5, "inverse_interval": 5}
GRID = [(ranks, accumulation) for ranks in (1, 2, 4) for accumulation in (1, 2, 4)][1:]
TOLERANCE = {"float64": 1e-10, "float32": 1e-3}


def check(pools: Pools, layouts: list[tuple[int, int]], **case: Any) -> None:
    """Every layout of the batches ends at the weights of one process with whole batches, on all ranks to the bit."""
    case["fields"] = {**EXACT, **case["fields"]}
    one = dist_cases.train(**case)
    for ranks, accumulation in layouts:
        layout = {"ranks": ranks, "accumulation": accumulation, "uneven": accumulation == 2}
        many = {**case, **layout}
        found = [dist_cases.train(**many)] if ranks == 1 else pools[ranks].run(dist_cases.train, **many)
        assert dist_cases.distance(found[0], one) <= TOLERANCE[case["dtype"]], layout
        for other in found[1:]:
            assert all(torch.equal(w, found[0]["weights"][name]) for name, w in other["weights"].items()), layout
        if case["dtype"] == "float64":
            for name, factors in one["factors"].items():
                for kind, value in factors.items():
                    assert (found[0]["factors"][name][kind] - value).norm() <= 1e-9 * value.norm(), (layout, name, kind)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("fields", "dtype", "layouts"),
    [
        ({}, "float64", GRID),
        ({}, "float32", [(1, 4), (4, 2)]),
        (PAPER, "float64", [(2, 4), (4, 2)]),
        ({"family": "kfac"}, "float64", [(2, 2)]),
        ({"family": "tkfac"}, "float64", [(2, 2)]),
        ({"family": "ng+"}, "float64", [(2, 2)]),
        pytest.param({}, "float32", GRID, marks=SLOW),
        pytest.param(PAPER, "float64", GRID, marks=SLOW),
        pytest.param(PAPER, "float32", GRID, marks=SLOW),
    ],
    ids=str,
)
def test_ranks_and_micro_batches_change_nothing(fields: Any, dtype: str, layouts: Any, pools: Pools) -> None:
    check(pools, layouts, kind="marian", fields=fields, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fields", [{}, PAPER], ids=["fast", "paper"])
def test_images_too(fields: dict[str, Any], dtype: str, pools: Pools) -> None:
    check(pools, [(2, 2), (4, 1)], kind="images", fields=fields, dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("marian", {"fisher": "empirical", "factor_interval": 2}),
        ("images", {"fisher": "empirical", "factor_interval": 2}),
        ("marian", {"direction": "gram", "rate": "trust"}),
        ("marian", {"direction": "natural", "head": "categorical", "chain": "full", "bias": "factor"}),
        ("marian", {"rate": "adaptive", "momentum_on": "update", "direction": "natural", "damping": "paper"}),
    ],
    ids=str,
)
def test_other_settings_too(kind: str, fields: dict[str, Any], pools: Pools) -> None:
    check(pools, [(2, 2), (4, 1)], kind=kind, fields=fields, dtype="float64")


SPREAD = (
    {},
    {"direction": "gram"},
    {"direction": "natural", "stagger": False},
    {"family": "kfac"},
    {"family": "ekfac"},
)


@pytest.mark.parametrize("fields", SPREAD, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_spread_inverses_are_those_that_all_would_compute(fields: Any, dtype: str, pools: Pools) -> None:
    # in float32 the roots are kept in bfloat16, and packed where there is no half precision
    case = {"kind": "marian", "dtype": dtype, "ranks": 4, "steps": 12}
    fields = {"inverse_interval": 4, "factor_interval": 4, **fields}
    alone = pools[4].run(dist_cases.train, fields={**fields, "placement": "replicated"}, **case)
    spread = pools[4].run(dist_cases.train, fields={**fields, "placement": "spread"}, **case)
    assert dist_cases.distance(spread[0], alone[0]) <= TOLERANCE[dtype]
    assert spread[0]["numbers"]["damping_mean"] == pytest.approx(alone[0]["numbers"]["damping_mean"])
    assert spread[0]["numbers"]["condition_max"] == pytest.approx(alone[0]["numbers"]["condition_max"], rel=1e-3)
    for other in spread[1:]:
        assert all(torch.equal(w, spread[0]["weights"][name]) for name, w in other["weights"].items())


@pytest.mark.parametrize("placement", ["spread", "replicated"])
def test_failed_inverses_are_counted_once(placement: str, pools: Pools) -> None:
    numbers = pools[2].run(dist_cases.with_failing_inverses, placement=placement)
    assert numbers == [4.0, 4.0]


def test_token_counts_are_those_of_all_ranks(pools: Pools) -> None:
    # an exact embedding counts what is looked up, padding behind a last word too: all parts are padded alike
    case = {"kind": "marian", "fields": {"embedding": "exact"}, "dtype": "float64", "steps": 8, "trim": False}
    check(pools, [(2, 2)], **case)


def test_one_row_in_eight_is_the_same_row_where_micro_batches_hold_eights(pools: Pools) -> None:
    fields = {"matrix_dtype": "full", "conv_rows": 8, "rate": "adaptive", "rate_rows": 8}
    case = {"kind": "images", "fields": fields, "steps": 5, "rows": 32}
    one = dist_cases.train(**case)
    assert dist_cases.distance(pools[2].run(dist_cases.train, ranks=2, accumulation=2, **case)[0], one) <= 1e-10


@pytest.mark.parametrize("rate", ["rms", "adaptive"])
def test_a_layer_that_a_rank_did_not_call(rate: str, pools: Pools) -> None:
    case = {"unseen_at": (2, 3), "rate": rate, "rate_rows": 1}
    one, two = dist_cases.train_branches(1, **case), pools[2].run(dist_cases.train_branches, ranks=2, **case)
    assert dist_cases.distance(two[0], one) <= 1e-10
    assert two[0]["numbers"]["skipped_factors"] == 0


def test_a_non_finite_factor_of_one_rank_is_skipped_by_all(pools: Pools) -> None:
    case = {"kind": "images", "fields": {"factor_interval": 1}, "steps": 4}
    spoiled = pools[2].run(dist_cases.train, ranks=2, spoil=2, **case)
    assert [found["numbers"]["skipped_factors"] for found in spoiled] == [4.0, 4.0]  # each matrix, once
    assert all(torch.equal(w, spoiled[1]["weights"][name]) for name, w in spoiled[0]["weights"].items())
    assert all(w.isfinite().all() for w in spoiled[0]["weights"].values())


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("shape", r"0\.weight: rank 0 has '\[6, 4\] .*rank 1 has '\[5, 4\] "),
        ("config", r"damping_rho: rank 0 has 1\.0, rank 1 has 0\.5"),
        ("lr", r"lngd\.lr: rank 0 has 0\.001, rank 1 has 0\.002"),
        ("dtype", r"0\.weight: rank 0 has '.* torch\.float32, .*rank 1 has '.* torch\.float64, "),
        ("order", r"0\.weight: rank 0 has '.*number 0', rank 1 has '.*number 2'"),
        ("load", r"steps made: rank 0 has 0, rank 1 has 1"),
        ("load later", r"steps made: rank 0 has 2, rank 1 has 3"),
        ("topology", r"what follows the layers.*0: rank 0 has .*rank 1 has .*relu|ReLU"),
    ],
)
def test_ranks_that_disagree_say_so(what: str, expected: str, pools: Pools) -> None:
    for returned, message in pools[2].outcomes(dist_cases.make_differently, what=what):
        assert not returned
        assert message.startswith("RuntimeError: LNGD: the ranks disagree about"), message
        assert re.search(expected, message), message


@pytest.mark.parametrize("fisher", ["sampled", "true"])
def test_draws_agree_in_distribution(fisher: str, pools: Pools) -> None:
    steps = 300
    two = pools[2].run(dist_cases.factors_by_draw, fisher=fisher, steps=steps)
    one = dist_cases.factors_by_draw(fisher, steps, ranks=1)
    assert torch.equal(two[0]["phi"], two[1]["phi"])
    assert not set(two[0]["streams"].tolist()) & set(two[1]["streams"].tolist())
    for name in ("phi", "v"):
        error = ((two[0][name].var(0) + one[name].var(0)) / steps).sqrt()
        assert ((two[0][name].mean(0) - one[name].mean(0)).abs() < 5 * error + 1e-12).all(), name


def test_a_group_of_its_own_trains_alone(pools: Pools) -> None:
    first, second = pools[2].run(dist_cases.alone)
    assert any(not torch.equal(w, second["weights"][name]) for name, w in first["weights"].items())


# The greatest ‖θ − θ₁‖ / ‖θ₁ − θ₀‖ where factors are kept and summed in bfloat16.
HALVED_TOLERANCE = 0.05


@pytest.mark.parametrize("family", ["lngd", "kfac", "ekfac", "ng+"])
def test_factors_in_bfloat16_leave_the_ranks_alike_and_near_one_process(family: str, pools: Pools) -> None:
    fields = {**EXACT, "family": family, "factor_dtype": "bfloat16", "factor_interval": 2, "inverse_interval": 2}
    case = {"kind": "marian", "fields": fields, "dtype": "float32", "steps": 8}
    one = dist_cases.train(**case)
    for ranks in (2, 4) if family == "lngd" else (2,):
        found = pools[ranks].run(dist_cases.train, ranks=ranks, **case)
        assert dist_cases.distance(found[0], one) <= HALVED_TOLERANCE
        for other in found[1:]:
            assert all(torch.equal(w, found[0]["weights"][name]) for name, w in other["weights"].items())
        for name, factors in one["factors"].items():
            for kind in factors.keys() - {"basis_a", "basis_b", "moments"}:
                gap = found[0]["factors"][name][kind] - factors[kind]
                assert gap.norm() <= 0.02 * factors[kind].norm(), (ranks, name, kind)
        assert found[0]["numbers"]["failed_inverses"] == found[0]["numbers"]["skipped_factors"] == 0
        assert found[0]["memory"]["factors"] == one["memory"]["factors"]


@pytest.mark.parametrize("mode", ["kahan", "stochastic"])
def test_weights_of_bfloat16_stay_alike(pools: Pools, mode: str) -> None:
    fields = {"bf16_update": mode, "bias": "factor"}
    found = pools[2].run(dist_cases.train, kind="marian", fields=fields, dtype="bfloat16", ranks=2, steps=6)
    assert all(torch.equal(w, found[1]["weights"][name]) for name, w in found[0]["weights"].items())
    assert all(w.dtype == torch.bfloat16 and w.isfinite().all() for w in found[0]["weights"].values())
