"""Rows: checkpoints on a disk, through the Trainer, and sharded ones."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from hf_lngd import load_checkpoint, save_checkpoint
from hf_lngd.integrations.checkpoints import last_checkpoint
from tests.contract.fault_table import Scene, fault
from tests.distributed.trainers import make_trainer
from tests.helpers import Bomb, keeping

FILES = "Checkpoints (the Trainer)"
LOOPS = "Checkpoints of a loop (`load_checkpoint`)"
BEFORE = "named before any weight is loaded; nothing is changed"
VALUES: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 2,
    "optim": "lngd",
    "optim_args": "factor_interval=1",
}


def trainer(folder: Path, **values: Any) -> Any:
    return make_trainer("images", str(folder), 1, 4, 1, double=False, **{**VALUES, **values})


@cache
def checkpoint() -> Path:
    """A whole checkpoint of two steps."""
    folder = Path(mkdtemp())
    trainer(folder).train()
    return folder / "checkpoint-2"


def resume_refused(scene: Scene, spoil: Callable[[Path], Any], **values: Any) -> None:
    """Resuming raises before anything is loaded; the checkpoint as it was is resumed from."""
    folder = scene.folder / "checkpoint-2"
    shutil.copytree(checkpoint(), folder)
    spoil(folder)
    made = trainer(scene.folder, max_steps=3, **values)
    with keeping(made.model), scene.refused():
        made.train(resume_from_checkpoint=str(folder))
    again = trainer(scene.folder / "again", max_steps=3)
    again.train(resume_from_checkpoint=str(checkpoint()))
    assert again.state.global_step == 3


def write(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "optimizer.pt")


def file_rows() -> None:
    rows: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "weights that were cut off": (
            "has a damaged model.safetensors", lambda f: os.truncate(f / "model.safetensors", 2000)),
        "an optimizer.pt that was cut off": (
            "has a damaged optimizer.pt", lambda f: os.truncate(f / "optimizer.pt", 5000)),
        "a trainer_state.json that is gone": (
            "has no trainer_state.json", lambda f: (f / "trainer_state.json").unlink()),
        "an optimizer.pt that is another optimizer's": (
            "optimizer.pt: state_dict: got the state of another optimizer",
            lambda f: write(f, lambda s: s.pop("lngd"))),
        "an optimizer.pt of another version": (
            "optimizer.pt: state_dict: got version 99", lambda f: write(f, lambda s: s["lngd"].update(version=99))),
        "an optimizer.pt of other settings": (
            "optimizer.pt: state_dict: the config differs: seed: checkpoint 5, here 0",
            lambda f: write(f, lambda s: s["lngd"]["config"].update(seed=5))),
        "an optimizer.pt of another model": (
            "optimizer.pt: state_dict: the model differs: vit.layernorm.weight: checkpoint none, here [16]",
            lambda f: write(f, lambda s: s["lngd"]["parameters"].pop("vit.layernorm.weight"))),
        "an optimizer.pt of which a part is gone": (
            "optimizer.pt: state_dict: topology: got 'none', accepted: a list",
            lambda f: write(f, lambda s: s["lngd"].pop("topology"))),
    }  # fmt: skip
    for name, (told, spoil) in rows.items():

        @fault(FILES, name, BEFORE, error=told)
        def happens(scene: Scene, spoil: Callable[[Path], Any] = spoil) -> None:
            resume_refused(scene, spoil)


file_rows()


@fault(FILES, "LNGD's checkpoint for a run with AdamW", BEFORE, error="optimizer.pt is LNGD's, accepted: that of the …")
def for_adamw(scene: Scene) -> None:
    resume_refused(scene, lambda f: None, optim="adamw_torch", optim_args=None)


@fault(FILES, "an optimizer.pt with code in its pickle", f"the code does not run; {BEFORE}", error="cannot be read …")
def bomb(scene: Scene) -> None:
    ran = scene.folder / "ran"
    resume_refused(scene, lambda f: torch.save({"lngd": Bomb(ran)}, f / "optimizer.pt"))
    assert not ran.exists()
    pickle.loads(pickle.dumps(Bomb(ran)))
    assert ran.exists()  # it would have


@fault(FILES, "sharded weights (FSDP2) in another program's format (pickled metadata)",
       f"nothing of them is read; {BEFORE}",
       error="has no weights in pytorch_model_fsdp_0 that this Trainer can read…")  # fmt: skip
def foreign_of_fsdp(scene: Scene) -> None:
    def spoil(folder: Path) -> None:
        dcp.save({"model": {"weight": torch.ones(3)}}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)

    resume_refused(scene, spoil)


def load_refused(scene: Scene, spoil: Callable[[Path], Any]) -> None:
    """Loading raises before anything is changed; the checkpoint as it was is loaded."""
    model, optimizer = scene.make()
    folder, copied = scene.folder / "saved", scene.folder / "spoiled"
    save_checkpoint(folder, model, optimizer)
    shutil.copytree(folder, copied)
    spoil(copied)
    with keeping(model), scene.refused():
        load_checkpoint(copied, model, optimizer)
    load_checkpoint(folder, model, optimizer)


@fault(LOOPS, "a file that was cut off", BEFORE, error="lngd.pt: cannot be read …")
def cut_of_a_loop(scene: Scene) -> None:
    load_refused(scene, lambda folder: os.truncate(folder / "lngd.pt", 2000))


@fault(LOOPS, "a checkpoint that was not finished", BEFORE, error="lngd.pt: cannot be read (FileNotFoundError…")
def unfinished_of_a_loop(scene: Scene) -> None:
    load_refused(scene, lambda folder: (folder / "lngd.pt").rename(folder / "lngd.pt.tmp"))


@fault(FILES, "a disk that is full while a checkpoint is written",
       "training ends with the system's error; the checkpoint before is whole, and is resumed from",
       error="No space left on device", log="checkpoint …checkpoint-2 has …. It is passed over.")  # fmt: skip
def full_disk(scene: Scene) -> None:
    real = torch.save

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        real(value, path, *args, **kwargs)
        if f"checkpoint-2{os.sep}" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    scene.patch.setattr(torch, "save", save)
    with scene.refused(OSError):
        trainer(scene.folder).train()
    scene.patch.undo()
    assert last_checkpoint(scene.folder) == str(scene.folder / "checkpoint-1")
    scene.messages.clear()
    again = trainer(scene.folder)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
