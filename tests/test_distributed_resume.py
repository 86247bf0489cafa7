"""Resume on many processes: to the bit on as many, to rounding on more or fewer, through the Trainer's checkpoints."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import dist_trainers
from tests.dist_cases import distance
from tests.dist_pool import Pools, open_pools
from tests.integration.test_resume import assert_identical

ARGS = "conv_rows=1,matrix_dtype=full,factor_interval=4,inverse_interval=4"
# Rows of a micro-batch and accumulation that make steps of 16 rows; an epoch has three, the last of 8 rows.
LAYOUT = {1: (4, 4), 2: (4, 2), 4: (2, 2)}
# Two processes with accelerate's FSDP2 in place of DDP.
FSDP2 = "2, FSDP2"
Ranks = int | str


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    yield from open_pools(tmp_path_factory.mktemp("pool"), "tests.dist_trainers")


def run(pools: Pools, ranks: Ranks, folder: Path, **values: Any) -> list[dict[str, Any]]:
    if isinstance(ranks, str):
        values = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "optim_args": ARGS, **values}
        return pools[2].run(dist_trainers.train_sharded, folder=str(folder), size=4, accumulation=2, **values)
    size, accumulation = LAYOUT[ranks]
    case = {"kind": "images", "folder": str(folder), "ranks": ranks, "size": size, "accumulation": accumulation}
    case |= {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "optim_args": ARGS, **values}
    return pools[ranks].run(dist_trainers.train, **case) if ranks > 1 else [dist_trainers.train(**case)]


def resumed(pools: Pools, ranks: Ranks, whole: Path, stop: int, folder: Path, **values: Any) -> list[dict[str, Any]]:
    shutil.copytree(whole / f"checkpoint-{stop}", folder / f"checkpoint-{stop}")
    return run(pools, ranks, folder, resume=True, **values)


# Factor steps are 0, 1, 2, 4, 8: within an epoch between factor steps, at its end, and within the next before one.
STOPS = (5, 6, 8)
PROCESSES: tuple[Ranks, ...] = (1, 2, 4, FSDP2)
README = Path(__file__).resolve().parent.parent / "README.md"


def promise(before: Ranks, after: Ranks) -> str:
    """What the README says of a run that goes on from another's checkpoint."""
    return "to the bit" if before == after else "≤ 1e-10"


def test_the_table_of_the_readme_is_what_is_tested_here() -> None:
    head = f"| written by ↓, resumed on → | {' | '.join(map(str, PROCESSES))} |"
    rows = [f"| {b} | {' | '.join(promise(b, a) for a in PROCESSES)} |" for b in PROCESSES]
    table = "\n".join([head, "| --- " * (1 + len(PROCESSES)) + "|", *rows])
    assert table in README.read_text(encoding="utf-8"), table


@pytest.fixture(scope="module")
def unbroken(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[Ranks, Any]:
    """Runs that were not stopped, by number of processes."""
    made = {}
    for ranks in PROCESSES:
        folder = tmp_path_factory.mktemp("whole")
        made[ranks] = (folder, run(pools, ranks, folder))
    return made


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(("before", "after"), list(itertools.product(PROCESSES, repeat=2)))
def test_resume_on_as_many_and_on_others(
    before: Ranks, after: Ranks, stop: int, unbroken: dict[Ranks, Any], pools: Pools, tmp_path: Path
) -> None:
    folder, whole = unbroken[before]
    found = resumed(pools, after, folder, stop, tmp_path)
    assert found[0]["steps"] == whole[0]["steps"] == 12
    assert found[0]["rate"] == whole[0]["rate"]
    assert found[0]["losses"][-1] == pytest.approx(whole[0]["losses"][-1], rel=1e-6)
    if promise(before, after) == "≤ 1e-10":
        assert distance(found[0], whole[0]) <= 1e-10
    else:
        for mine, theirs in zip(found, whole, strict=True):
            assert_identical(mine["weights"], theirs["weights"])
            assert_identical(mine["state"], theirs["state"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_random_states_of_each_rank_come_back(ranks: int, pools: Pools, tmp_path: Path) -> None:
    """Dropout, the draws of the Fisher, and those that round factors."""
    values = {"optim_args": f"{ARGS},fisher=sampled,factor_dtype=bfloat16", "dropout": 0.2}
    whole = run(pools, ranks, tmp_path / "whole", **values)
    found = resumed(pools, ranks, tmp_path / "whole", 5, tmp_path / "again", **values)
    for mine, theirs in zip(found, whole, strict=True):
        assert_identical(mine["weights"], theirs["weights"])
        assert_identical(mine["state"], theirs["state"])


def test_there_and_back(unbroken: dict[Ranks, Any], pools: Pools, tmp_path: Path) -> None:
    """One process, then two, then one again."""
    first = tmp_path / "first"
    folder, whole = unbroken[1]
    resumed(pools, 2, folder, 3, first)
    last = resumed(pools, 1, first, 7, tmp_path / "last")
    assert distance(last[0], whole[0]) <= 1e-10


def test_a_checkpoint_is_finished_when_all_ranks_have_written(pools: Pools, tmp_path: Path) -> None:
    assert pools[2].run(dist_trainers.slow_to_save, folder=str(tmp_path)) == [True, True]
    assert torch.load(tmp_path / "checkpoint-2" / "rng_state_1.pth", weights_only=False)
