"""FSDP2 or one process: the same weights. Real processes on gloo, plain PyTorch loops with `fully_shard`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lngd import LNGD, load_checkpoint
from tests import dist_cases, dist_refused, dist_shards
from tests.core_helpers import core_marian
from tests.dist_pool import Pools, open_pools


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    yield from open_pools(tmp_path_factory.mktemp("pool"), "tests.dist_shards")


EXACT: dict[str, Any] = {"conv_rows": 1, "rate_rows": 1, "matrix_dtype": "full", "factor_interval": 2}
PAPER = {"preset": "paper", "fisher": "expected", "factor_interval": 3, "inverse_interval": 3}
TOLERANCE = {"float64": 1e-10, "float32": 1e-3}
STEPS = 5


def check_same(many: list[dict[str, Any]], one: dict[str, Any], dtype: str = "float64") -> None:
    """All ranks have one process's weights, factors and counts."""
    assert dist_cases.distance(many[0], one) <= TOLERANCE[dtype]
    for found in many[1:]:
        assert all(torch.equal(w, many[0]["weights"][name]) for name, w in found["weights"].items())
    for name, factors in one["factors"].items():
        for kind, value in factors.items() if dtype == "float64" else ():
            assert (many[-1]["factors"][name][kind] - value).norm() <= 1e-9 * value.norm(), (name, kind)
    for number in ("layer_rate_mean", "damping_mean", "failed_inverses", "skipped_factors"):
        assert many[-1]["numbers"][number] == pytest.approx(one["numbers"][number], rel=1e-3), number


BLOCKS = {"how": "blocks", "first": "optimizer"}
WHOLE = {"how": "whole", "first": "shards", "accumulation": 2, "uneven": True}
ADAPTIVE = {"rate": "adaptive", "momentum_on": "update", "direction": "natural", "damping": "paper"}
CHAINS = {"direction": "natural", "head": "categorical", "chain": "full", "bias": "factor"}
CASES: list[tuple[str, dict[str, Any], str, dict[int, dict[str, Any]]]] = [
    ("marian", {}, "float64", {2: BLOCKS, 4: WHOLE}),
    ("marian", {}, "float32", {2: WHOLE}),
    ("marian", PAPER, "float64", {2: BLOCKS}),
    ("marian", {"family": "kfac"}, "float64", {2: WHOLE}),
    ("marian", {"family": "tkfac", "bias": "factor"}, "float64", {2: BLOCKS}),
    ("marian", {"family": "ng+"}, "float64", {2: WHOLE}),
    ("marian", {"direction": "gram", "rate": "trust"}, "float64", {2: BLOCKS}),
    ("marian", CHAINS, "float64", {2: BLOCKS}),
    ("marian", ADAPTIVE, "float64", {2: WHOLE}),
    ("marian", {"embedding": "exact", "fisher": "empirical"}, "float64", {2: BLOCKS}),
    ("images", {}, "float64", {2: BLOCKS, 4: WHOLE}),
    ("images", PAPER, "float64", {2: BLOCKS, 4: WHOLE}),
]


@pytest.mark.parametrize(("kind", "fields", "dtype", "layouts"), CASES, ids=str)
def test_shards_change_nothing(
    kind: str, fields: dict[str, Any], dtype: str, layouts: dict[int, dict[str, Any]], pools: Pools
) -> None:
    # exact token counts are those of all that is looked up, padding too
    case: dict[str, Any] = {"kind": kind, "fields": {**EXACT, **fields}, "dtype": dtype, "steps": STEPS, "trim": False}
    one = dist_cases.train(**case)
    for ranks, layout in layouts.items():
        check_same(pools[ranks].run(dist_shards.train, **layout, **case), one, dtype)


@pytest.mark.parametrize("fields", [{}, {"embedding": "exact"}, {"bias": "factor", "direction": "gram"}], ids=str)
def test_rows_that_ranks_do_not_divide(fields: dict[str, Any], pools: Pools) -> None:
    one = dist_shards.train_uneven(fields, many=False)
    for ranks in (2, 4):
        check_same(pools[ranks].run(dist_shards.train_uneven, fields=fields), one)


@pytest.mark.parametrize("fields", [{}, {"rate": "adaptive"}, {"embedding": "exact"}], ids=str)
def test_two_replicas_of_two_shards(fields: dict[str, Any], pools: Pools) -> None:
    fields = {**fields, "rate_rows": 1}
    one = dist_shards.train_uneven(fields, many=False)
    check_same(pools[4].run(dist_shards.train_uneven, fields=fields, mesh=(2, 2)), one)


def test_gradients_are_clipped_by_the_norm_of_all_ranks(pools: Pools) -> None:
    case = {"kind": "images", "fields": EXACT, "steps": 4, "trim": False}
    two, four = (pools[ranks].run(dist_shards.train, clip=0.05, **case) for ranks in (2, 4))
    assert dist_cases.distance(four[0], two[0]) <= 1e-10
    assert dist_cases.distance(two[0], dist_cases.train(**case)) > 1e-6


def test_state_falls_with_the_ranks(pools: Pools) -> None:
    case = {"kind": "marian", "fields": EXACT, "steps": 2, "trim": False}
    usage = {ranks: [f["memory"] for f in pools[ranks].run(dist_shards.train, **case)] for ranks in (2, 4)}
    whole = dist_cases.train(**case)["memory"]
    for kind in ("momentum", "factors", "inverses"):  # dealt out: each byte is there once
        for ranks, found in usage.items():
            assert sum(own[kind] for own in found) == whole[kind], (kind, ranks)
    for ranks, most in ((2, 0.62), (4, 0.40)):  # the largest group, and each rank's own eigenbasis, are not dealt out
        assert max(own["total"] for own in usage[ranks]) <= most * whole["total"], ranks


def test_traffic(pools: Pools) -> None:
    fields = {"factor_interval": 3, "inverse_interval": 3, "stagger": False}
    sent, rows = pools[2].run(dist_shards.counted, fields=fields, steps=3)[0]
    total = sum(rows for _, rows in pools[2].run(dist_shards.counted, fields=fields, steps=1))
    factor, plain = sent[0], sent[1]
    # the rows of all layers leave once; the updates of those that this rank owns come back as rows
    assert sent[2] == plain
    counts = [{name: value for name, value in step.items() if name.endswith("calls")} for step in (plain, factor)]
    assert counts[0] == {"all_to_all_single calls": 2, "all_reduce calls": 2}
    assert counts[1] == {"all_to_all_single calls": 2, "all_reduce calls": 4, "reduce_scatter_single calls": 1}
    assert plain["all_reduce"] < 300  # whether gradients of AdamW's parameters are finite
    assert rows < plain["all_to_all_single"] <= rows + 0.7 * total
    assert factor["reduce_scatter_single"] > 0 and factor["all_reduce"] < 3000


def test_a_non_finite_factor_of_one_rank_is_skipped_by_all(pools: Pools) -> None:
    case = {"kind": "images", "fields": {"factor_interval": 1}, "steps": 4}
    spoiled = pools[2].run(dist_shards.train, spoil=2, **case)
    assert [found["numbers"]["skipped_factors"] for found in spoiled] == [4.0, 4.0]
    assert all(w.isfinite().all() for w in spoiled[0]["weights"].values())


def test_gradients_that_one_rank_spoils_are_left_out_by_all(pools: Pools) -> None:
    names = ["model.shared.weight", "model.encoder.layers.0.fc1.weight", "model.encoder.layers.0.fc1.bias"]
    many, (alone, count) = pools[2].run(dist_shards.train_spoiled, names=names), dist_shards.train_spoiled(names)
    assert count > 0
    for weights, found in many:
        assert found == count
        for name, weight in weights.items():
            assert weight.isfinite().all()
            torch.testing.assert_close(weight, alone[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["kahan", "stochastic"])
def test_bfloat16_weights_and_what_rounding_took_off(mode: str, pools: Pools, tmp_path: Path) -> None:
    ranks = pools[2].run(dist_shards.train_bf16, folder=str(tmp_path / mode), mode=mode)
    for straight, resumed, _ in ranks:
        assert all(torch.equal(weight, resumed[name]) for name, weight in straight.items())
        assert all(torch.equal(weight, ranks[0][0][name]) for name, weight in straight.items())
    assert sum(share for _, _, (share, _) in ranks) == ranks[0][2][1]
    assert (ranks[0][2][1] > 0) is (mode == "kahan")


@pytest.mark.parametrize("rate", ["rms", "adaptive"])
def test_a_layer_that_a_rank_did_not_call(rate: str, pools: Pools) -> None:
    case = {"unseen_at": (2, 3), "rate": rate, "rate_rows": 1}
    check_same(pools[2].run(dist_shards.train_branches, **case), dist_cases.train_branches(1, **case))


def test_half_precision_policy(pools: Pools) -> None:
    half, full = (pools[2].run(dist_shards.train_half, policy=policy) for policy in (True, False))
    assert half[0]["kinds"] == full[0]["kinds"] == {"torch.float32", "torch.bfloat16"}
    assert all(w.dtype == torch.float32 for w in half[0]["weights"].values())
    assert 1e-6 < dist_cases.distance(half[0], full[0]) < 0.5
    assert half[0]["numbers"]["skipped_factors"] == half[0]["numbers"]["failed_inverses"] == 0


@pytest.mark.parametrize("spoil", [None, 0, 2])
def test_a_gradient_scaler_whatever_comes_first(spoil: int | None, pools: Pools) -> None:
    """LNGD or `fully_shard`: an infinity of one rank leaves the step out on all, the first step too."""
    found = {
        first: pools[2].run(dist_shards.train_scaled, first=first, spoil=spoil) for first in ("shards", "optimizer")
    }
    for (mine, scale), (theirs, same) in zip(*found.values(), strict=True):
        assert scale == same == (1024.0 if spoil is None else 512.0)
        assert all(torch.equal(w, theirs["weights"][name]) for name, w in mine["weights"].items())
        assert dist_cases.distance(mine, theirs) == 0 and mine["numbers"]["skipped_factors"] == 0


def test_a_forward_pass_between_sharding_and_lngd(pools: Pools) -> None:
    looked, not_looked = (pools[2].run(dist_shards.train_scaled, first="shards", looked=how) for how in (True, False))
    assert all(torch.equal(w, not_looked[0][0]["weights"][name]) for name, w in looked[0][0]["weights"].items())


def test_sharding_a_model_that_was_trained_whole(pools: Pools) -> None:
    for later, never in pools[2].run(dist_shards.shard_later, fields=EXACT):
        assert dist_cases.distance(later, never) <= 1e-10


def test_the_second_backward_pass_leaves_gradients_alone(pools: Pools) -> None:
    true, expected = (pools[2].run(dist_shards.gradient_of_true, fisher=kind)[0] for kind in ("true", "expected"))
    assert torch.equal(true, expected)


def test_wrapped_blocks_hide_nothing_of_the_topology(pools: Pools) -> None:
    assert pools[2].run(dist_shards.topology, how="blocks")[0] == dist_shards.topology(None)


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
    ("get", r"torch\.distributed\.checkpoint\.state_dict.*loses LNGD's state, accepted: hf_lngd\.save_checkpoint"),
    ("set", r"torch\.distributed\.checkpoint\.state_dict.*loses LNGD's state, accepted: hf_lngd\.save_checkpoint"),
]


@pytest.mark.parametrize(("what", "expected"), REFUSED)
def test_what_is_refused_by_name(what: str, expected: str, pools: Pools) -> None:
    for returned, message in pools[2].outcomes(dist_refused.refused, what=what):
        assert not returned
        assert message.startswith("RuntimeError: LNGD") and re.search(expected, message), message


# Resume

RESUMED: dict[str, Any] = {**EXACT, "factor_interval": 4, "inverse_interval": 4}


def run(pools: Pools, ranks: int, **case: Any) -> list[dict[str, Any]]:
    """With 1 rank in one process, with −2 on two with DDP, else on as many with FSDP2."""
    if ranks == 1:
        return [dist_cases.train(**case)]
    if ranks < 0:
        return pools[-ranks].run(dist_cases.train, ranks=-ranks, **case)
    return pools[ranks].run(dist_shards.train, **case)


@pytest.mark.parametrize("kind", ["images", "marian"])
def test_a_whole_state_goes_on_anywhere(kind: str, pools: Pools) -> None:
    fields = {**RESUMED, **({"direction": "gram", "bias": "factor"} if kind == "images" else {})}
    case = {"kind": kind, "fields": fields, "steps": 8, "trim": False}
    ways = {2: (2, 4, 1, -2), 1: (2, 4), -2: (2,)} if kind == "images" else {2: (2, 1)}
    for before, afters in ways.items():
        whole, half = run(pools, before, **case), run(pools, before, stop=3, **case)[0]
        for after in afters:
            found = run(pools, after, resume=half, **case)
            assert dist_cases.distance(found[0], whole[0]) <= 1e-10, (before, after)
            assert found[0]["numbers"]["layer_rate_mean"] == pytest.approx(whole[0]["numbers"]["layer_rate_mean"])
            if before == after:
                for mine, theirs in zip(found, whole, strict=True):
                    assert all(torch.equal(w, theirs["weights"][name]) for name, w in mine["weights"].items())


def test_what_other_ranks_have_is_no_state(pools: Pools) -> None:
    case = {"kind": "images", "fields": EXACT, "stop": 1, "trim": False}
    first, second = (found["optimizer"] for found in pools[2].run(dist_shards.train, **case))
    optimizer = LNGD(dist_cases.make("images", torch.float64), **EXACT)
    with pytest.raises(ValueError, match="a rank other than 0 has under FSDP2, accepted: rank 0's, which is whole"):
        optimizer.load_state_dict(second)
    optimizer.load_state_dict(first)
    assert optimizer.memory_usage()["total"] > 0


def test_counts_are_kept_once(pools: Pools) -> None:
    case = {"kind": "images", "fields": {"factor_interval": 1}, "steps": 4}
    half = pools[2].run(dist_shards.train, spoil=1, stop=3, **case)[0]
    assert [f["numbers"]["skipped_factors"] for f in pools[4].run(dist_shards.train, resume=half, **case)] == [4.0] * 4


@pytest.mark.parametrize("kind", ["images", "marian"])
def test_a_distributed_checkpoint_goes_on_anywhere(kind: str, pools: Pools, tmp_path: Path) -> None:
    fields = {**RESUMED, **({"direction": "gram", "bias": "factor"} if kind == "images" else {"embedding": "exact"})}
    case = {"kind": kind, "fields": fields, "steps": 3}
    folders = {name: str(tmp_path / name) for name in ("sharded", "ddp", "one")}
    sharded = pools[2].run(dist_shards.save, folder=folders["sharded"], **case)
    again = pools[2].run(dist_shards.load, folder=folders["sharded"], **case)
    for mine, theirs in zip(again, sharded, strict=True):
        assert all(torch.equal(w, theirs["weights"][name]) for name, w in mine["weights"].items())
    one = dist_shards.load(folders["sharded"], **case)
    assert dist_cases.distance(one, sharded[0]) <= 1e-10
    if kind == "marian":
        return
    four = pools[4].run(dist_shards.load, folder=folders["sharded"], **case)
    assert dist_cases.distance(four[0], sharded[0]) <= 1e-10
    whole = pools[2].run(dist_shards.load, folder=folders["sharded"], spread=False, **case)
    assert dist_cases.distance(whole[0], sharded[0]) <= 1e-10
    ddp = pools[2].run(dist_shards.save, folder=folders["ddp"], spread=False, **case)
    assert dist_cases.distance(pools[2].run(dist_shards.load, folder=folders["ddp"], **case)[0], ddp[0]) <= 1e-10
    alone = dist_shards.save(folders["one"], **case)
    assert dist_cases.distance(pools[4].run(dist_shards.load, folder=folders["one"], **case)[0], alone) <= 1e-10


@pytest.mark.parametrize("family", ["lngd", "kfac"])
def test_factors_in_bfloat16(family: str, pools: Pools, tmp_path: Path) -> None:
    """Dealt out, saved and taken over as full ones are, by checkpoints of either kind, into the other precision too."""
    fields = {**RESUMED, "family": family, "factor_dtype": "bfloat16", "factor_interval": 2}
    case = {"kind": "marian", "fields": fields, "dtype": "float32"}
    sharded = pools[2].run(dist_shards.save, folder=str(tmp_path), steps=3, **case)
    again = pools[2].run(dist_shards.load, folder=str(tmp_path), steps=3, **case)
    for mine, theirs in zip(again, sharded, strict=True):
        assert all(torch.equal(w, theirs["weights"][name]) for name, w in mine["weights"].items())
    full = {**case, "fields": {**fields, "factor_dtype": "full"}}
    one, halved = (dist_shards.load(str(tmp_path), steps=3, **own) for own in (full, case))
    for found in (one, halved):
        assert 0 < dist_cases.distance(found, sharded[0]) <= 0.05
    numbers = one["memory"]["factors"] - halved["memory"]["factors"]
    assert sum(own["memory"]["factors"] for own in sharded) == halved["memory"]["factors"] and numbers > 0
    whole = pools[2].run(dist_shards.train, stop=3, steps=6, trim=False, **case)
    state = whole[0]["optimizer"]["lngd"]["groups"].values()
    assert {t.dtype for own in state for t in own.values()} == {torch.float32, torch.bfloat16}
    found = dist_cases.train(**full, resume=whole[0], steps=6, trim=False)
    assert found["numbers"]["failed_inverses"] == 0
    sent = {}
    for kind in ("full", "bfloat16"):
        (first,), _ = pools[2].run(dist_shards.counted, steps=1, fields={"factor_dtype": kind})[0]
        sent[kind] = first["reduce_scatter_single"]
        assert first["reduce_scatter_single calls"] == (1 if kind == "full" else 2)  # one of each dtype
    assert sent["bfloat16"] < 0.35 * sent["full"]  # of float64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "here"
    dist_shards.save(str(folder), "images", RESUMED, 2)
    return folder


def cut(folder: Path) -> None:
    file = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {
    "cut": (cut, r"\.distcp: got \d+ bytes, accepted: at least \d+ bytes: it was cut off"),
    "zeroed": (partial(dist_refused.spoil, lambda b: bytes(len(b))), r"its files cannot be read \(rank 0"),
    "flipped": (
        partial(dist_refused.spoil, lambda b: bytes(c ^ 1 for c in b)),
        r"its files cannot be read \(rank 0",
    ),
    "coded": (dist_refused.spoil_plain, r"LNGD's state cannot be read \("),
    "missing": (lambda f: [p.unlink() for p in f.glob("*.distcp")], r"\.distcp: got no file"),
    "unfinished": (lambda f: (f / ".metadata").unlink(), r"got no \.metadata, which is written last"),
    "garbled": (lambda f: (f / ".metadata").write_bytes(b"no"), r"got a damaged \.metadata \("),
    "foreign": (dist_refused.save_foreign, r"got one without LNGD's state"),
    "elsewhere": (
        partial(dist_refused.change_metadata, dist_refused.point_elsewhere),
        r"a place in a file of this",
    ),
    "no tensors": (
        partial(dist_refused.change_metadata, dist_refused.hide_tensors),
        r"got one without LNGD's state",
    ),
    "odd entries": (partial(dist_refused.change_metadata, dist_refused.spoil_entries), r"got an entry of str"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    DAMAGES[damage][0](folder)
    refused(folder, dist_cases.make("images", torch.float64), DAMAGES[damage][1])


def test_another_models_checkpoint_is_named(checkpoint: Path) -> None:
    refused(checkpoint, core_marian(), "the model differs: ")
    refused(checkpoint, dist_cases.make("images", torch.float64), "config differs: damping_rho", damping_rho=0.5)


def refused(folder: Path, model: Any, message: str, **fields: Any) -> None:
    """A checkpoint is refused, and nothing of it is loaded."""
    optimizer = LNGD(model, **{**RESUMED, **fields})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert optimizer.memory_usage()["total"] == 0
