"""The Trainer on many processes: the weights of one, through the project's own trainers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import dist_trainers
from tests.dist_cases import distance
from tests.dist_pool import Pools, open_pools
from tests.hf_helpers import hf_vit


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    yield from open_pools(tmp_path_factory.mktemp("pool"), "tests.dist_trainers")


ARGS = "conv_rows=1,rate_rows=1,matrix_dtype=full,factor_interval=2,inverse_interval=4"
# (processes, rows of a micro-batch, accumulation): windows of 16 rows, the last of an epoch has 8
SMOOTHED = {"label_smoothing_factor": 0.1}
LAYOUTS = [(1, 4, 4), (2, 4, 2), (2, 2, 4), (4, 2, 2), (4, 1, 4)]


@pytest.mark.parametrize(
    ("kind", "values", "layouts"),
    [
        ("marian", {"optim_args": ARGS}, LAYOUTS),
        (
            "marian",
            {"optim_args": f"{ARGS},preset=paper,fisher=expected", "label_smoothing_factor": 0.1},
            LAYOUTS[-2:-1],
        ),
        ("t5", {"optim_args": f"{ARGS},fisher=empirical"}, LAYOUTS[1:2]),
        ("images", {"optim_args": ARGS}, LAYOUTS[-2:]),
        ("images", {"optim_args": f"{ARGS},rate=adaptive,momentum_on=update"}, LAYOUTS[1:2]),
    ],
    ids=str,
)
def test_many_processes_train_as_one(kind: str, values: Any, layouts: Any, pools: Pools, tmp_path: Path) -> None:
    one = dist_trainers.train(kind, str(tmp_path), 1, 16, 1, **values)
    assert one["steps"] == 12
    for ranks, size, accumulation in layouts:
        layout = {"ranks": ranks, "size": size, "accumulation": accumulation}
        case = {"kind": kind, "folder": str(tmp_path), **layout, **values}
        found = [dist_trainers.train(**case)] if ranks == 1 else pools[ranks].run(dist_trainers.train, **case)
        assert distance(found[0], one) <= 1e-10, layout
        assert found[0]["losses"] == pytest.approx(one["losses"], rel=1e-5)
        for other in found[1:]:
            assert all(torch.equal(w, found[0]["weights"][name]) for name, w in other["weights"].items())


def test_in_single_precision(pools: Pools, tmp_path: Path) -> None:
    case = {"kind": "marian", "folder": str(tmp_path), "double": False, "optim_args": ARGS}
    one = dist_trainers.train(ranks=1, size=16, accumulation=1, **case)
    found = pools[2].run(dist_trainers.train, ranks=2, size=4, accumulation=2, **case)
    assert distance(found[0], one) <= 1e-3


@pytest.mark.parametrize("settings", ["preset=lngd_lr,factor_interval=2,inverse_interval=2", "fisher=sampled"])
@pytest.mark.parametrize("kind", ["marian", "images"])
def test_draws_of_each_rank_leave_the_ranks_alike(kind: str, settings: str, pools: Pools, tmp_path: Path) -> None:
    case = {"kind": kind, "folder": str(tmp_path), "optim_args": settings, "num_train_epochs": 1}
    found = pools[2].run(dist_trainers.train, ranks=2, size=4, accumulation=2, **case)
    assert all(torch.equal(w, found[1]["weights"][name]) for name, w in found[0]["weights"].items())
    assert all(w.isfinite().all() for w in found[0]["weights"].values())


@pytest.mark.parametrize("committed", [False, True], ids=["layers wrapped", "examples/accelerate/fsdp2.yaml"])
def test_fsdp2_of_accelerate_trains_and_resumes(committed: bool, pools: Pools, tmp_path: Path) -> None:
    """Checkpoints hold all of LNGD's state, in the file that DDP writes: resume there and back."""
    optim_args = "conv_rows=1,matrix_dtype=full,factor_interval=4,inverse_interval=4"
    values = {"optim_args": optim_args, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    how = {"committed": committed}
    layout = {"kind": "images", "ranks": 2, "size": 4, "accumulation": 1}
    ddp = pools[2].run(dist_trainers.train, folder=str(tmp_path / "ddp"), **layout, **values)
    sharded = pools[2].run(dist_trainers.train_sharded, folder=str(tmp_path / "sharded"), **how, **values)
    assert distance(sharded[0], ddp[0]) <= 1e-10
    stop = tmp_path / "sharded" / "checkpoint-3"
    case = {"folder": str(tmp_path / "again"), "resume": str(stop), **how, **values}
    again = pools[2].run(dist_trainers.train_sharded, **case)
    for mine, theirs in zip(again, sharded, strict=True):
        assert all(torch.equal(w, theirs["weights"][name]) for name, w in mine["weights"].items())
        assert mine["memory"] == theirs["memory"]
    model = type(hf_vit()).from_pretrained(tmp_path / "sharded")  # what `save_model` wrote is whole
    for name, weight in sharded[0]["weights"].items():
        assert torch.equal(model.get_parameter(name).to(weight.dtype), weight), name
    states = [torch.load(tmp_path / name / "checkpoint-3" / "optimizer.pt") for name in ("sharded", "ddp")]
    assert states[0].keys() == states[1].keys()
    assert states[0]["lngd"]["layers"].keys() == states[1]["lngd"]["layers"].keys()
