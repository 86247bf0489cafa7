"""One process or many, under every layout: the same weights. Real processes on gloo, plain PyTorch loops."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.distributed.fsdp import FSDPModule

from hf_lngd.parallel.ranks import ALL_GATHER, REDUCE_SCATTER
from tests.distributed import loops, refused
from tests.distributed.loops import distance
from tests.distributed.pool import Pools
from tests.helpers import assert_identical

PAPER = {"preset": "paper", "fisher": "expected", "factor_interval": 3, "inverse_interval": 3}
ADAPTIVE = {"rate": "adaptive", "momentum_on": "update", "direction": "natural", "damping": "paper"}
NATURAL = {"direction": "natural", "bias": "factor", "inverse_interval": 3}
TOLERANCE = {"float64": 1e-10, "float32": 1e-3}
# (processes, how they split a batch)
SPLIT: dict[str, Any] = {"accumulation": 2, "uneven": True}
WHOLE = ("whole", 2, SPLIT)
OWNED = ("owned", 2, {})
FOUR = ("owned", 4, SPLIT)
BLOCKS = ("rows", 2, {"how": "blocks", "first": "optimizer"})
SHARDS = ("rows", 2, {"how": "whole", "first": "shards", **SPLIT})


def check_same(many: list[dict[str, Any]], one: dict[str, Any], dtype: str = "float64") -> None:
    """All ranks have one process's weights, factors and counts, and each other's weights to the bit."""
    assert distance(many[0], one) <= TOLERANCE[dtype]
    for found in many[1:]:
        assert all(torch.equal(w, many[0]["weights"][name]) for name, w in found["weights"].items())
    for name, factors in one["factors"].items():
        for kind, value in factors.items() if dtype == "float64" else ():
            assert (many[-1]["factors"][name][kind] - value).norm() <= 1e-9 * value.norm(), (name, kind)
    for number in ("direction_scale_mean", "damping_mean", "condition_max", "failed_inverses", "skipped_factors"):
        if number in one["numbers"]:
            assert many[-1]["numbers"][number] == pytest.approx(one["numbers"][number], rel=1e-3), number


CASES: list[tuple[str, dict[str, Any], str, list[Any]]] = [
    ("marian", {}, "float64", [WHOLE, ("whole", 4, {}), OWNED, FOUR, BLOCKS, ("rows", 4, SHARDS[2])]),
    ("marian", {}, "float32", [("whole", 4, SPLIT), OWNED, SHARDS]),
    ("marian", PAPER, "float64", [WHOLE, BLOCKS]),
    ("marian", {"family": "kfac"}, "float64", [WHOLE, FOUR, SHARDS]),
    ("marian", {"family": "tkfac", "bias": "factor"}, "float64", [WHOLE, OWNED, BLOCKS]),
    ("marian", {"family": "ng+"}, "float64", [WHOLE, OWNED, SHARDS]),
    ("marian", NATURAL, "float64", [WHOLE, FOUR, BLOCKS]),
    ("marian", ADAPTIVE, "float64", [WHOLE, SHARDS]),
    ("marian", {"embedding": "exact", "fisher": "empirical"}, "float64", [WHOLE, OWNED, BLOCKS]),
    ("images", {}, "float64", [WHOLE, FOUR, BLOCKS, SHARDS]),
    ("images", PAPER, "float64", [("whole", 4, SPLIT), BLOCKS]),
    ("images", {"bias": "factor", "max_factor_dim": 10}, "float64", [WHOLE, OWNED, SHARDS]),
]


@pytest.mark.parametrize(("kind", "fields", "dtype", "layouts"), CASES, ids=str)
def test_layouts_change_nothing(
    kind: str, fields: dict[str, Any], dtype: str, layouts: list[tuple[str, int, dict[str, Any]]], pools: Pools
) -> None:
    # exact token counts are those of all that is looked up, padding too: all parts are padded alike
    settings = {"factor_interval": 2, "inverse_interval": 2, **fields}
    case: dict[str, Any] = {"kind": kind, "fields": settings, "dtype": dtype, "trim": False}
    one = loops.train(**case)
    for name, ranks, how in layouts:
        check_same(pools[ranks].run(loops.train, layout=name, **how, **case), one, dtype)


@pytest.mark.parametrize("fields", [{}, {"embedding": "exact"}, {"bias": "factor", "rate": "adaptive"}], ids=str)
def test_rows_that_ranks_do_not_divide_and_replicas_of_shards(fields: dict[str, Any], pools: Pools) -> None:
    one = loops.train_uneven(fields)
    for ranks, mesh in ((2, ()), (4, ()), (4, (2, 2))):
        check_same(pools[ranks].run(loops.train_uneven, fields=fields, mesh=mesh), one)


LAYOUTS = ("whole", "owned", "rows")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_bfloat16_stay_alike(layout: str, pools: Pools) -> None:
    case = {"kind": "marian", "fields": {"bias": "factor"}, "dtype": "bfloat16", "layout": layout, "steps": 6}
    found = pools[2].run(loops.train, **case)
    assert all(torch.equal(w, found[1]["weights"][name]) for name, w in found[0]["weights"].items())
    assert all(w.dtype == torch.bfloat16 and w.isfinite().all() for w in found[0]["weights"].values())


# What goes wrong on one rank


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_non_finite_factor_of_one_rank_is_skipped_by_all(layout: str, pools: Pools) -> None:
    case = {"kind": "images", "fields": {"factor_interval": 1}, "steps": 4, "layout": layout}
    spoiled = pools[2].run(loops.train, spoil=2, **case)
    assert [found["numbers"]["skipped_factors"] for found in spoiled] == [4.0, 4.0]  # each matrix, once
    assert all(torch.equal(w, spoiled[1]["weights"][name]) for name, w in spoiled[0]["weights"].items())
    assert all(w.isfinite().all() for w in spoiled[0]["weights"].values())


@pytest.mark.parametrize("layout", ["owned", "rows"])
def test_gradients_that_one_rank_spoils_are_left_out_by_all(layout: str, pools: Pools) -> None:
    names = ["model.shared.weight", "model.encoder.layers.0.fc1.weight", "model.encoder.layers.0.fc1.bias"]
    alone, count = loops.train_spoiled(layout, names)
    assert count > 0
    for weights, found in pools[2].run(loops.train_spoiled, layout=layout, names=names):
        assert found == count
        for name, weight in weights.items():
            assert weight.isfinite().all()
            torch.testing.assert_close(weight, alone[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("shape", r"0\.weight: rank 0 has '\[6, 4\] .*rank 1 has '\[5, 4\] "),
        ("config", r"damping: rank 0 has 1\.0, rank 1 has 0\.5"),
        ("lr", r"lngd\.lr: rank 0 has 0\.001, rank 1 has 0\.002"),
        ("dtype", r"0\.weight: rank 0 has '.* torch\.float32, .*rank 1 has '.* torch\.float64, "),
        ("order", r"0\.weight: rank 0 has '.*number 0', rank 1 has '.*number 2'"),
        ("load", r"steps made: rank 0 has 2, rank 1 has 0"),
        ("topology", r"what follows the layers.*0: rank 0 has .*rank 1 has .*relu|ReLU"),
    ],
)
def test_ranks_that_disagree_say_so(what: str, expected: str, pools: Pools) -> None:
    for returned, message in pools[2].outcomes(loops.make_differently, what=what):
        assert not returned
        assert message.startswith("RuntimeError: LNGD: the ranks disagree about"), message
        assert re.search(expected, message), message


# Odd models

EMPIRICAL = {"fisher": "empirical", "direction": "natural"}
FIELDS: list[dict[str, Any]] = [{}, EMPIRICAL, {"family": "kfac"}, {"rate": "adaptive"}]


# torch 2.9 has nothing that lets a rank leave a sharded layer out.
may_skip = [] if hasattr(FSDPModule, "set_reduce_scatter_unused_params") else [pytest.mark.skip(reason="torch < 2.13")]
SKIPPING = [
    *(("rms", "whole"), ("rms", "owned"), ("adaptive", "whole")),
    *(pytest.param(rate, "rows", marks=may_skip) for rate in ("rms", "adaptive")),
]


@pytest.mark.parametrize(("rate", "layout"), SKIPPING)
def test_a_layer_that_a_rank_did_not_call(rate: str, layout: str, pools: Pools) -> None:
    calls = [["all", "skip" if step in (2, 3) else "all"] for step in range(6)]
    case = {"kind": "skipping", "calls": calls, "rate": rate}
    check_same(pools[2].run(loops.train_odd, layout=layout, **case), loops.train_odd(**case))


@pytest.mark.parametrize(
    ("fields", "both_at"),
    [(FIELDS[1], ()), (FIELDS[2], (2, 4)), (FIELDS[3], (0, 3)), ({"family": "ng+"}, ()), ({"family": "ekfac"}, (2, 4))],
    ids=str,
)
def test_an_output_that_is_in_the_loss_at_some_steps(
    fields: dict[str, Any], both_at: tuple[int, ...], pools: Pools
) -> None:
    """Or at none: it is returned, so DDP waits for its layer, whose gradient is undefined."""
    case: dict[str, Any] = {"kind": "heads", "calls": [["all" if s in both_at else "one"] * 2 for s in range(5)]}
    case |= {"inverse_interval": 1, **fields}
    one, two = loops.train_odd(**case), pools[2].run(loops.train_odd, **case)
    check_same(two, one)
    assert torch.equal(two[0]["weights"]["other.weight"], two[0]["start"]["other.weight"]) == (not both_at)


@pytest.mark.parametrize(
    ("kind", "fields", "skips"),
    [
        *(("dropping", {}, skips) for skips in ("1-1", "0-0", "01-")),
        *(("skipping", {}, skips) for skips in ("1-1", "01-")),
        *(("skipping", FIELDS[2], skips) for skips in ("0-0", "10-")),
        ("skipping", {"fisher": "sampled"}, "01-"),
    ],
    ids=str,
)
def test_a_layer_that_a_rank_did_not_call_at_first(kind: str, fields: dict[str, Any], skips: str, pools: Pools) -> None:
    case: dict[str, Any] = {"kind": kind, **fields}
    case["calls"] = [["skip" if skip == half else "all" for half in "01"] for skip in skips]
    one, two = loops.train_odd(**case), pools[2].run(loops.train_odd, **case)
    assert two[0]["routes"] == two[1]["routes"]
    if "fisher" not in fields:  # whose draws are each rank's own
        check_same(two, one)
    assert all(torch.equal(w, two[1]["weights"][name]) for name, w in two[0]["weights"].items())


@pytest.mark.parametrize("skips", [["skip", "all"], ["all", "skip"]], ids=str)
def test_ranks_that_disagree_say_so_where_one_did_not_call_a_layer(skips: list[str], pools: Pools) -> None:
    case = {"kind": "skipping", "calls": [skips], "odd": True, "direction": "natural"}
    for returned, message in pools[2].outcomes(loops.train_odd, **case):
        assert not returned
        assert message.startswith("RuntimeError: LNGD: the ranks disagree about what follows the layers"), message


@pytest.mark.parametrize("taken", [["01", "10", "01"], ["10", "00", "11"]], ids="-".join)
@pytest.mark.parametrize(
    ("fields", "layout"), [({}, "whole"), ({}, "owned"), (FIELDS[2], "whole"), (FIELDS[3], "owned")]
)
def test_each_rank_calls_another_expert_at_first(
    fields: dict[str, Any], layout: str, taken: list[str], pools: Pools
) -> None:
    case: dict[str, Any] = {"kind": "experts", "calls": [list(step) for step in taken], **fields}
    check_same(pools[2].run(loops.train_odd, layout=layout, **case), loops.train_odd(**case))


def test_an_adaptive_rate_without_rows_is_zero(pools: Pools) -> None:
    """Of a layer whose weight alone is used."""
    for start, weights in pools[2].run(loops.train_unheard):
        assert torch.equal(weights["layer.weight"], start["layer.weight"])
        assert all(0 < (w - start[name]).norm() < 1 for name, w in weights.items() if name != "layer.weight")


def test_true_fisher_in_a_static_graph_raises_on_every_rank(pools: Pools) -> None:
    for returned, message in pools[2].outcomes(loops.train_true, static=True):
        assert not returned
        assert message.startswith("RuntimeError: fisher: 'true' makes a backward pass before"), message
        assert "static_graph=False" in message
    first, second = pools[2].run(loops.train_true, static=False)
    assert first == second > 0


@pytest.mark.parametrize("fisher", ["sampled", "true"])
def test_draws_agree_in_distribution(fisher: str, pools: Pools) -> None:
    steps = 300
    two, one = pools[2].run(loops.factors_by_draw, fisher=fisher, steps=steps), loops.factors_by_draw(fisher, steps)
    assert torch.equal(two[0]["phi"], two[1]["phi"])
    for name in ("phi", "v"):
        error = ((two[0][name].var(0) + one[name].var(0)) / steps).sqrt()
        assert ((two[0][name].mean(0) - one[name].mean(0)).abs() < 5 * error + 1e-12).all(), name


def test_a_group_of_its_own_trains_alone(pools: Pools) -> None:
    first, second = pools[2].run(loops.alone)
    assert any(not torch.equal(w, second["weights"][name]) for name, w in first["weights"].items())


# Costs


def test_memory_falls_with_the_ranks(pools: Pools) -> None:
    """What is shared out is there once: momentum, factors and inverses, each byte on one rank."""
    case = {"kind": "marian", "fields": {"factor_interval": 2}, "steps": 2, "trim": False}
    alone = loops.train(**case)["memory"]
    replicated = pools[2].run(loops.train, layout="whole", **case)[0]["memory"]
    assert replicated == alone
    for layout in ("owned", "rows"):
        for ranks, most in ((2, 0.62), (4, 0.40)):
            found = [own["memory"] for own in pools[ranks].run(loops.train, layout=layout, **case)]
            for kind in ("momentum", "factors", "inverses"):
                assert sum(own[kind] for own in found) == alone[kind], (layout, ranks, kind)
            shared = sum(alone[kind] for kind in ("momentum", "factors", "inverses"))
            largest = max(sum(own[kind] for kind in ("momentum", "factors", "inverses")) for own in found)
            assert largest <= most * shared, (layout, ranks)
            if layout == "rows":
                assert max(own["total"] for own in found) <= most * alone["total"], ranks


def test_matmuls_of_a_step_fall_with_the_ranks(pools: Pools) -> None:
    """Counted in a step with factors and in one without; under `owned` the ranks together do what one does."""
    (_, alone) = loops.costs("whole", update_interval=1)
    for ranks, most in ((2, 0.62), (4, 0.40)):
        owned = [flops for _, flops in pools[ranks].run(loops.costs, layout="owned", update_interval=1)]
        for step in (0, 1):
            assert sum(flops[step] for flops in owned) == pytest.approx(alone[step], rel=0.01), (ranks, step)
            assert max(flops[step] for flops in owned) <= most * alone[step], (ranks, step)
    assert all(flops == alone for _, flops in pools[2].run(loops.costs, layout="whole", update_interval=1))


def test_traffic(pools: Pools) -> None:
    found = {name: pools[2].run(loops.costs, layout=name, embedding="fallback")[0][0] for name in LAYOUTS}
    calls = {n: [{k: v for k, v in step.items() if "calls" in k} for step in steps] for n, steps in found.items()}
    assert calls["whole"][1] == calls["whole"][2] == {}  # but for DDP's own, nothing is sent
    assert set(calls["whole"][0]) == {"all_reduce calls"}
    assert calls["owned"][1] == {f"{ALL_GATHER} calls": 1} == calls["owned"][2]
    # whether gradients are finite: those of layers, and of both groups of AdamW's parameters
    assert calls["rows"][1] == {"all_to_all_single calls": 2, "all_reduce calls": 3} == calls["rows"][2]
    for name in ("owned", "rows"):
        assert calls[name][0][f"{REDUCE_SCATTER} calls"] == 1
        assert found[name][0][REDUCE_SCATTER] > 0
    assert found["rows"][1]["all_reduce"] < 500


# FSDP2


def test_gradients_are_clipped_by_the_norm_of_all_ranks(pools: Pools) -> None:
    case = {"kind": "images", "fields": {}, "steps": 4, "trim": False}
    two, four = (pools[ranks].run(loops.train, layout="rows", clip=0.05, **case) for ranks in (2, 4))
    # torch 2.9 adds clipping's 1e-6 to the norm of each process's part
    assert distance(four[0], two[0]) <= (1e-10 if Version(torch.__version__) >= Version("2.13") else 1e-7)
    assert distance(two[0], loops.train(**case)) > 1e-6


def test_half_precision_policy(pools: Pools) -> None:
    half, plain = (pools[2].run(loops.train_half, policy=policy) for policy in (True, False))
    assert half[0]["kinds"] == plain[0]["kinds"] and "torch.float32" in half[0]["kinds"]
    assert all(w.dtype == torch.float32 for w in half[0]["weights"].values())
    assert 1e-6 < distance(half[0], plain[0]) < 0.5
    assert half[0]["numbers"]["skipped_factors"] == half[0]["numbers"]["failed_inverses"] == 0


@pytest.mark.parametrize("spoil", [None, 0, 2])
def test_a_gradient_scaler_whatever_comes_first(spoil: int | None, pools: Pools) -> None:
    """LNGD or `fully_shard`: an infinity of one rank leaves the step out on all, the first step too."""
    found = {first: pools[2].run(loops.train_scaled, first=first, spoil=spoil) for first in ("shards", "optimizer")}
    for (mine, scale), (theirs, same) in zip(*found.values(), strict=True):
        assert scale == same == (1024.0 if spoil is None else 512.0)
        assert all(torch.equal(w, theirs["weights"][name]) for name, w in mine["weights"].items())
        assert mine["numbers"]["skipped_factors"] == 0


@pytest.mark.parametrize("name", ["model.encoder.layers.0.final_layer_norm.weight", "model.encoder.layers.0.fc1.bias"])
def test_a_gradient_scaler_sees_infinities_of_what_adamw_takes(name: str, pools: Pools) -> None:
    """On one rank alone: all leave the step out."""
    for found, scale in pools[2].run(loops.train_scaled, first="shards", spoil=2, name=name):
        assert scale == 512.0
        assert all(w.isfinite().all() for w in found["weights"].values())


def test_the_state_of_a_model_under_ddp_loads_without_it(pools: Pools) -> None:
    for wrapped, bare in pools[2].run(loops.load_into_bare):
        assert_identical(wrapped, bare)


def test_a_forward_pass_between_sharding_and_lngd(pools: Pools) -> None:
    looked, plain = (pools[2].run(loops.train_scaled, first="shards", looked=how) for how in (True, False))
    assert all(torch.equal(w, plain[0][0]["weights"][name]) for name, w in looked[0][0]["weights"].items())


def test_sharding_a_model_that_was_trained_whole(pools: Pools) -> None:
    for later, never in pools[2].run(loops.shard_later, fields={"factor_interval": 2}):
        assert distance(later, never) <= 1e-10


def test_the_second_backward_pass_leaves_gradients_alone(pools: Pools) -> None:
    true, expected = (pools[2].run(loops.gradient_of_true, fisher=kind)[0] for kind in ("true", "expected"))
    assert torch.equal(true, expected)


REFUSED = [
    ("tensor parallelism", r"parameter '0\.\w+'.*fully_shard was not called \(tensor parallelism\?\)"),
    ("tensor parallelism of a part", r"parameter '2\.\w+'.*fully_shard was not called \(tensor parallelism\?\)"),
    ("tensor parallelism later", r"parameter '2\.\w+'.*fully_shard was not called \(tensor parallelism\?\)"),
    ("FSDP1", r"got FSDP1 .*accepted: FSDP2 .*fsdp_version: 2"),
    ("FSDP1 later", r"got FSDP1 .*accepted: FSDP2"),
    ("dimension", r"parameter '0\.weight': got \['Shard\(1\)'\].*accepted: Shard\(0\)"),
    ("part", r"parameter '2\.weight' is whole and '0\.weight' is sharded, accepted: all of them"),
    ("last part", r"parameter '0\.weight' is whole and '2\.weight' is sharded, accepted: all of them"),
    ("last part later", r"parameter '0\.weight' is whole and '2\.weight' is sharded, accepted: all of them"),
    ("ekfac", r"family: 'ekfac'.*accepted: lngd, kfac, tkfac, ng\+, or DDP"),
    ("gathered", r"parameter '0\.weight' is not the sharded one.*set_reshard_after_backward"),
    ("unscaled", r"got GradScaler\.unscale_ .*accepted: fully_shard before LNGD is made"),
]


@pytest.mark.parametrize(("what", "expected"), REFUSED)
def test_what_is_refused_by_name(what: str, expected: str, pools: Pools) -> None:
    for returned, message in pools[2].outcomes(refused.refused, what=what):
        assert not returned
        assert message.startswith("RuntimeError: LNGD") and re.search(expected, message), message
