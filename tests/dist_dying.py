"""What the ranks of a pool run where one of them is killed while a checkpoint is saved."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem
from transformers import modeling_utils, trainer_callback, trainer_utils

from hf_lngd import LNGD, load_checkpoint, save_checkpoint
from tests import dist_shards, dist_trainers
from tests.dist_cases import backward, batch_of, make, micro_batches

# The step whose checkpoint is being written.
DYING = 3
VALUES: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "max_steps": 5,
    "optim_args": "fisher=sampled,factor_interval=2,inverse_interval=2,conv_rows=1",
}
PLAIN: dict[str, Any] = {"conv_rows": 1, "matrix_dtype": "full", "factor_interval": 2, "inverse_interval": 2}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(event: str, place: str) -> None:
    """From now on this process is killed when a file that ends in `event`, in a folder of `place`, is half written.

    Args:
        event: or ``rotation``: a checkpoint is half removed; ``swap``: the first file was put in its place.
    """

    def half(path: Any) -> None:
        if place in str(path) and str(path).endswith(event):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def killed_by(write: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = write(*args, **kwargs)
            for given in (*args, *kwargs.values()):
                if isinstance(given, (str, Path)):
                    half(given)
            return result

        return wrapped

    create = FileSystem.create_stream

    @contextlib.contextmanager
    def stream(self: Any, path: Any, mode: str) -> Iterator[Any]:
        with create(self, path, mode) as opened:
            yield opened
        half(path)

    def remove_half(path: Any, *args: Any, **kwargs: Any) -> None:
        (Path(path) / "trainer_state.json").unlink()
        die()

    replace = Path.replace

    def replace_and_die(path: Path, target: Any) -> Any:
        replace(path, target)
        return die()

    FileSystem.create_stream = stream  # type: ignore[method-assign]
    torch.save = killed_by(torch.save)
    modeling_utils.safe_save_file = killed_by(modeling_utils.safe_save_file)
    state = trainer_callback.TrainerState
    state.save_to_json = killed_by(state.save_to_json)  # type: ignore[method-assign]
    if event == "rotation":
        trainer_utils.shutil.rmtree = remove_half
    if event == "swap":
        Path.replace = replace_and_die  # type: ignore[method-assign]


def train(
    folder: str, how: str, resume: bool | None = None, victim: int | None = None, event: str = ""
) -> tuple[dict[str, Any], str]:
    """The Trainer's run under DDP or FSDP2, and what was warned of.

    Args:
        victim: the rank that is killed at `event` of the third checkpoint.
    """
    if victim == dist.get_rank():
        kill_at(event, f"{os.sep}checkpoint-{DYING}{os.sep}")
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hf_lngd").addHandler(handler)
    if how == "ddp":
        found = dist_trainers.train("images", folder, 2, 4, 1, double=False, resume=resume, **VALUES)
    else:
        found = dist_trainers.train_sharded(folder, resume, double=False, **VALUES)
    return {"weights": found["weights"]}, "\n".join(warned)


def step_and_save(folder: str, victim: int, event: str) -> None:
    """Go on from a checkpoint of a plain loop (step 2), make a step, be killed while it is saved in the same folder."""
    model = make("images", torch.float64)
    optimizer = LNGD(model, lr=1.0, **PLAIN)
    dist_shards.shard(model, "blocks")
    load_checkpoint(folder, model, optimizer)
    batch = batch_of("images", 2, 16, torch.float64)
    part = micro_batches(batch, [8, 8], False)[dist.get_rank()]
    backward(model, optimizer, part, (batch["labels"] != -100).sum(), 2, False)
    optimizer.step()
    if dist.get_rank() == victim:
        kill_at(event, f"{os.sep}")
    save_checkpoint(folder, model, optimizer)


def go_on(folder: str, first: int, last: int) -> dict[str, Any]:
    """The plain loop from its checkpoint on."""
    return dist_shards._go(folder, "images", PLAIN, range(0), range(first, last), "blocks")
