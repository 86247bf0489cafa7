"""A rank may be killed at any moment of saving: the job ends, the next goes on from the last whole checkpoint."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import loops, trainers
from tests.distributed.pool import DistPool

SHARD = "shard-0000{}-model-00001-of-00001.safetensors"  # of a rank, counted from 1, as torch's writer names it
HALF = f"checkpoint-{trainers.DYING}"


@contextmanager
def job(folder: Path) -> Iterator[DistPool]:
    """Two processes of their own: some do not live long."""
    folder.mkdir()
    pool = DistPool(2, folder, "tests.distributed.trainers")
    try:
        yield pool
    finally:
        pool.close()


def killed(place: Path, function: Any, victim: int, **case: Any) -> None:
    """One rank is killed, and the other one does not wait for it until the time is out."""
    with job(place) as pool:
        outcomes = pool.outcomes(function, victim=victim, **case)
    assert outcomes[victim] == (False, -signal.SIGKILL)
    returned, message = outcomes[1 - victim]
    assert not returned and message != "no answer" and "Timed out" not in message, message


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    with job(folder / "job") as pool:
        return {how: pool.run(trainers.train_killed, folder=str(folder / how), how=how) for how in ("ddp", "fsdp2")}


TRAINERS = [
    pytest.param("ddp", 0, "model.safetensors", marks=trainers.resumes_on_cpus),
    pytest.param("ddp", 0, "optimizer.pt", marks=trainers.resumes_on_cpus),
    pytest.param("ddp", 0, "trainer_state.json", marks=[pytest.mark.slow, trainers.resumes_on_cpus]),
    pytest.param("ddp", 0, "rotation", marks=trainers.resumes_on_cpus),
    pytest.param("ddp", 1, "rng_state_1.pth", marks=trainers.resumes_on_cpus),
    pytest.param("fsdp2", 0, SHARD.format(1), marks=pytest.mark.slow),
    ("fsdp2", 0, "optimizer.pt"),
    ("fsdp2", 1, SHARD.format(2)),
    pytest.param("fsdp2", 1, "rng_state_1.pth", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("how", "victim", "event"), TRAINERS)
def test_the_trainer_goes_on_by_itself(
    how: str, victim: int, event: str, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    case = {"folder": str(tmp_path / "run"), "how": how}
    killed(tmp_path / "first", trainers.train_killed, victim, event=event, **case)
    with job(tmp_path / "second") as pool:
        resumed = pool.run(trainers.train_killed, resume=True, **case)
    for (mine, warned), (theirs, _) in zip(resumed, unbroken[how], strict=True):
        assert (HALF in warned and "It is passed over." in warned) != (event == "rotation")  # the new one is whole then
        assert all(torch.equal(w, theirs[name]) for name, w in mine.items())


CASE: dict[str, Any] = {"kind": "images", "fields": {"factor_interval": 2, "inverse_interval": 2}, "steps": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A checkpoint of a plain loop after two steps, and what came of two more."""
    folder = tmp_path_factory.mktemp("plain")
    with job(folder / "job") as pool:
        return folder / "checkpoint", pool.run(loops.checkpointed, folder=str(folder / "checkpoint"), **CASE)


PLAIN = [(0, "lngd.pt.tmp", 2), (0, "swap", 3)]


@pytest.mark.parametrize(("victim", "event", "steps"), PLAIN)
def test_a_checkpoint_that_is_written_over_stays_until_the_new_one_is_whole(
    victim: int, event: str, steps: int, plain: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(plain[0], folder)
    (folder / "scheduler.pt").write_bytes(b"the user's own")
    killed(tmp_path / "first", loops.checkpointed, victim, folder=str(folder), event=event, load=True, **CASE)
    with job(tmp_path / "second") as pool:
        resumed = pool.run(loops.checkpointed, folder=str(folder), load=True, last=4, **{**CASE, "steps": steps})
    for mine, theirs in zip(resumed, plain[1], strict=True):
        assert all(torch.equal(w, theirs["weights"][name]) for name, w in mine["weights"].items())
    assert (folder / "scheduler.pt").read_bytes() == b"the user's own"
