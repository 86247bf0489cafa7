"""Checkpoints of many processes: to the bit on as many, to rounding on more, fewer or under another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lngd import LNGD, load_checkpoint
from tests.distributed import loops, trainers
from tests.distributed.loops import distance
from tests.distributed.pool import Pools
from tests.helpers import keeping, tiny_marian

FIELDS: dict[str, Any] = {"factor_interval": 4, "inverse_interval": 4}
KINDS: dict[str, dict[str, Any]] = {"images": {**FIELDS, "bias": "factor"}, "marian": {**FIELDS, "embedding": "exact"}}
# (layout, processes)
Place = tuple[str, int]
ONE: Place = ("whole", 1)


def run(pools: Pools, place: Place, function: Any, **case: Any) -> list[dict[str, Any]]:
    """On one process, or on a pool's."""
    layout, ranks = place
    return [function(layout=layout, **case)] if ranks == 1 else pools[ranks].run(function, layout=layout, **case)


def check_resumed(found: list[dict[str, Any]], whole: list[dict[str, Any]], same: bool) -> None:
    assert distance(found[0], whole[0]) <= 1e-10
    assert found[0]["numbers"]["direction_scale_mean"] == pytest.approx(whole[0]["numbers"]["direction_scale_mean"])
    for mine, theirs in zip(found, whole, strict=True) if same else ():
        assert all(torch.equal(w, theirs["weights"][name]) for name, w in mine["weights"].items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [ONE, ("whole", 2), ("owned", 2)], ids=str)
def test_a_state_dict_goes_on_anywhere_under_ddp(before: Place, kind: str, pools: Pools) -> None:
    case = {"kind": kind, "fields": KINDS[kind], "steps": 6, "trim": False}
    whole, half = run(pools, before, loops.train, **case), run(pools, before, loops.train, stop=3, **case)[0]
    for after in (ONE, ("whole", 2), ("owned", 2), ("owned", 4)):
        if after == before or after[1] != before[1]:
            check_resumed(run(pools, after, loops.train, resume=half, **case), whole, before == after)


def test_the_state_of_a_model_that_ddp_wraps_is_that_of_the_model(pools: Pools) -> None:
    case: dict[str, Any] = {"kind": "images", "fields": FIELDS, "trim": False}
    half = pools[2].run(loops.train, layout="owned", first="shards", stop=3, **case)[0]
    check_resumed([loops.train(resume=half, **case)], [loops.train(**case)], False)


PLACES: list[Place] = [ONE, ("whole", 2), ("owned", 2), ("rows", 2)]


@pytest.mark.parametrize("tool", ["lngd", "dcp"])
@pytest.mark.parametrize("before", PLACES, ids=str)
def test_a_distributed_checkpoint_goes_on_anywhere(before: Place, tool: str, pools: Pools, tmp_path: Path) -> None:
    """Of `save_checkpoint`, and of torch's own functions: on as many processes, on others, DDP ↔ FSDP2."""
    kind = "images" if before[0] in ("owned", "rows") else "marian"
    case = {"kind": kind, "fields": KINDS[kind], "folder": str(tmp_path), "tool": tool}
    whole = run(pools, before, loops.checkpointed, **case)
    for after in [*PLACES, ("rows", 4)]:
        if tool == "lngd" or after == before or after[0] == before[0]:
            check_resumed(run(pools, after, loops.checkpointed, load=True, **case), whole, before == after)


# without a GPU accelerate has no branch for FSDP, and cannot write DTensors, AdamW's neither
@pytest.mark.parametrize("layout", ["whole", "owned"])
def test_accelerates_saved_states(layout: str, pools: Pools, tmp_path: Path) -> None:
    whole = pools[2].run(trainers.accelerated, folder=str(tmp_path), layout=layout)
    again = pools[2].run(trainers.accelerated, folder=str(tmp_path), layout=layout, load=True)
    for mine, theirs in zip(again, whole, strict=True):
        assert all(torch.equal(w, theirs[name]) for name, w in mine.items())


def test_bfloat16_weights_and_what_rounding_took_off(pools: Pools, tmp_path: Path) -> None:
    case = {"kind": "marian", "fields": FIELDS, "folder": str(tmp_path), "dtype": "bfloat16"}
    whole, again = (pools[2].run(loops.checkpointed, load=load, **case) for load in (False, True))
    check_resumed(again, whole, True)
    every = {**FIELDS, "update_interval": 1}  # after a step all weights have a rest
    alone = loops.train("marian", every, dtype="bfloat16", steps=1)
    assert sum(found["memory"]["rounding"] for found in whole) == alone["memory"]["rounding"]


def test_counts_are_kept_once(pools: Pools) -> None:
    case = {"kind": "images", "fields": {"factor_interval": 1}, "steps": 4}
    half = pools[2].run(loops.train, spoil=1, stop=3, **case)[0]
    found = pools[4].run(loops.train, resume=half, **case)
    assert len({own["numbers"]["skipped_factors"] for own in found}) == 1


# What is refused


# What damage does: docs/faults.md and tests/test_security.py.


def test_another_models_checkpoint_is_named(tmp_path: Path) -> None:
    loops.checkpointed(str(tmp_path), "images", FIELDS, 2, layout="whole")
    for model, message, more in (
        (tiny_marian(), "the model differs: ", {}),
        (loops.make("images"), "config differs: damping", {"damping": 0.5}),
    ):
        optimizer = LNGD(model, **FIELDS, **more)
        with keeping(model), pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path, model, optimizer)
        assert optimizer.memory_usage()["total"] == 0
