"""A process may die at any moment of saving: the last whole checkpoint is found, and what is damaged is named."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from transformers import modeling_utils, trainer_callback, trainer_utils

from hf_lngd import LNGDTrainer, LNGDTrainingArguments
from hf_lngd.integrations.checkpoints import check_checkpoint, find_checkpoint, last_checkpoint, problem_of
from hf_lngd.integrations.usage import UsageError
from hf_lngd.parallel.checkpoint import write_tensors
from tests.hf_helpers import hf_images, hf_vit

# The step whose checkpoint is being written.
DYING = 3
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
VALUES: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "max_steps": 5,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "optim_args": "fisher=sampled,factor_interval=2,inverse_interval=2",
}


def trainer_in(folder: str | Path, **values: Any) -> LNGDTrainer:
    args = LNGDTrainingArguments(str(folder), **{**VALUES, **values})
    return LNGDTrainer(hf_vit(initializer_range=0.25), args, train_dataset=hf_images(16))


def run(folder: str, resume: bool | None = None) -> dict[str, Any]:
    trainer = trainer_in(folder)
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return {"weights": weights, "steps": trainer.state.global_step}


def die_at(folder: str, event: str) -> None:
    """Train, and be killed while a file of the third checkpoint is half written, or while an old one is removed."""
    place = f"{os.sep}checkpoint-{DYING}{os.sep}"

    def killed_by(write: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = write(*args, **kwargs)
            for given in (*args, *kwargs.values()):
                if isinstance(given, (str, Path)) and place in str(given) and str(given).endswith(event):
                    os.truncate(given, os.path.getsize(given) // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    def remove_half(path: Any, *args: Any, **kwargs: Any) -> None:
        (Path(path) / "trainer_state.json").unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = killed_by(torch.save)
    modeling_utils.safe_save_file = killed_by(modeling_utils.safe_save_file)
    state = trainer_callback.TrainerState
    state.save_to_json = killed_by(state.save_to_json)
    if event == "rotation":
        trainer_utils.shutil.rmtree = remove_half
    run(folder)


def in_a_fresh_process(function: Any, folder: Path, *arguments: Any) -> tuple[int | None, Any]:
    """Exit code and result: other tests may have left this process with settings of torch that change last bits."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_lngd.integrations.trainer", "tests.hf_helpers"])
    result = folder / "result.pt"
    process = context.Process(target=keep, args=(str(result), function, str(folder), *arguments))
    process.start()
    process.join(120)
    return process.exitcode, torch.load(result, weights_only=False) if result.is_file() else None


def keep(result: str, function: Any, *arguments: Any) -> None:
    gc.freeze()  # the Trainer collects garbage again and again: not in what was imported
    torch.set_num_threads(1)
    torch.save(function(*arguments), result)


def resume(folder: str) -> tuple[dict[str, Any], str]:
    """The run from its last whole checkpoint on, and what was warned of."""
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hf_lngd").addHandler(handler)
    return run(folder, resume=True), "\n".join(warned)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    return {**in_a_fresh_process(run, folder)[1], "folder": folder}


@pytest.mark.parametrize(
    "event",
    [
        *(pytest.param(name, marks=[pytest.mark.slow] * (name in ("scheduler.pt", "rng_state.pth"))) for name in FILES),
        "rotation",
    ],
)
def test_killed_while_saving(event: str, whole: dict[str, Any], tmp_path: Path) -> None:
    assert in_a_fresh_process(die_at, tmp_path, event)[0] == -signal.SIGKILL
    resumed, warned = in_a_fresh_process(resume, tmp_path)[1]
    half = str(tmp_path / f"checkpoint-{DYING}")
    finished = event == "rotation"  # which happens when the new one is whole
    assert (half in warned and "It is passed over." in warned) != finished
    assert resumed["steps"] == 5
    assert all(torch.equal(w, resumed["weights"][name]) for name, w in whole["weights"].items())
    assert problem_of(half) is None or not Path(half).exists()  # written anew, or rotated away


def cut_shards(folder: Path) -> None:
    """Sharded weights in the place of whole ones, as under FSDP2; a file of them was cut off."""
    inner = folder / "pytorch_model_fsdp_0"
    write_tensors(inner, {"weight": torch.ones(300)}, None)
    (folder / "model.safetensors").unlink()
    check_checkpoint(folder)
    (part,) = inner.glob("*.safetensors")
    os.truncate(part, 500)


DAMAGES: dict[str, tuple[Any, str]] = {
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 2000), "damaged model.safetensors"),
    "empty weights": (lambda f: os.truncate(f / "model.safetensors", 0), "damaged model.safetensors"),
    "cut optimizer": (lambda f: os.truncate(f / "optimizer.pt", 5000), "damaged optimizer.pt"),
    "cut random state": (lambda f: os.truncate(f / "rng_state.pth", 100), "damaged rng_state.pth"),
    "cut state": (lambda f: os.truncate(f / "trainer_state.json", 30), "damaged trainer_state.json"),
    "no state": (lambda f: (f / "trainer_state.json").unlink(), "no trainer_state.json"),
    "no scheduler": (lambda f: (f / "scheduler.pt").unlink(), "no scheduler.pt"),
    "no optimizer": (lambda f: (f / "optimizer.pt").unlink(), "no optimizer.pt"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "cut shards": (
        lambda f: cut_shards(f),
        r"damaged shard\S+\.safetensors: it was cut off, or is of another kind in pytorch_model_fsdp_0",
    ),
    "no shards": (
        lambda f: (f / "pytorch_model_fsdp_0").mkdir(),
        "no weights in pytorch_model_fsdp_0 that this Trainer can read",
    ),
    "no part": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-2.safetensors"}}'),
        "no model-1-of-2.safetensors",
    ),
    "no folder": (shutil.rmtree, "no folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_nothing_is_loaded(
    damage: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(whole["folder"] / "checkpoint-5", folder)
    check_checkpoint(folder)
    do, message = DAMAGES[damage]
    do(folder)
    made = trainer_in(tmp_path)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    with pytest.raises(ValueError, match=f"{folder}.*{message}"):
        made.train(resume_from_checkpoint=str(folder))
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("kept", ["optimizer.bin", "optimizer_0/__0_0.distcp", "global_step5/zero_pp_rank_0.pt", None])
def test_optimizers_that_fsdp_and_deepspeed_keep_elsewhere(kept: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    torch.save({}, folder / "pytorch_model.bin")
    torch.save({}, folder / "scheduler.pt")
    if kept is not None and kept.endswith(".distcp"):
        dcp.save({"step": torch.ones(1)}, checkpoint_id=(folder / kept).parent, no_dist=True)
    elif kept is not None:
        (folder / kept).parent.mkdir(exist_ok=True)
        torch.save({}, folder / kept)
    assert problem_of(folder) == (None if kept else "has no optimizer.pt")
    assert last_checkpoint(tmp_path) == (str(folder) if kept else None)


@pytest.mark.parametrize(
    "kept",
    ["model.safetensors", "adapter_model.bin", "model-1-of-2.safetensors", "second/adapter_model.safetensors"]
    + ["pytorch_model_fsdp.bin", "global_step5/mp_rank_00_model_states.pt", "optimizer.bin", "rng_state.pth", "a/b.md"],
)
def test_what_counts_as_weights(kept: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    (folder / kept).parent.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    torch.save({}, folder / "training_args.bin")
    if kept.endswith(".safetensors"):
        save_file({"weight": torch.ones(1)}, folder / kept)
    else:
        torch.save({}, folder / kept)
    weights = kept not in ("optimizer.bin", "rng_state.pth", "a/b.md")
    assert problem_of(folder) == (None if weights else "has no weights")


def test_a_foreign_checkpoint_is_named(whole: dict[str, Any], tmp_path: Path) -> None:
    trainer_in(tmp_path, optim="adamw_torch", optim_args=None).train()
    lngd = trainer_in(tmp_path, max_steps=7)
    with pytest.raises(ValueError, match="state of another optimizer"):
        lngd.train(resume_from_checkpoint=True)


def test_killed_in_the_very_first_save(whole: dict[str, Any], tmp_path: Path, caplog: Any) -> None:
    """`--resume_from_checkpoint last` starts anew, as long as no checkpoint was ever finished."""
    given = SimpleNamespace(resume_from_checkpoint="last", output_dir=str(tmp_path))
    assert find_checkpoint(given) is None
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(whole["folder"] / "checkpoint-5", folder)
    (folder / "trainer_state.json").rename(tmp_path / "kept")
    caplog.clear()
    assert find_checkpoint(given) is None
    said = [record.getMessage() for record in caplog.records]
    assert "has no trainer_state.json" in said[0] and "It is passed over." in said[0]
    assert said[1] == f"{tmp_path} has no checkpoint yet: training starts at the beginning (resume_from_checkpoint)"
    with pytest.raises(UsageError, match="got 'true', but .* has no checkpoint"):
        find_checkpoint(SimpleNamespace(resume_from_checkpoint="true", output_dir=str(tmp_path)))
    (tmp_path / "kept").rename(folder / "trainer_state.json")
    assert find_checkpoint(given) == str(folder)
    (folder / "optimizer.pt").unlink()  # it was whole once, and to start anew would be to lose it
    with pytest.raises(UsageError, match=f"got 'last', but {folder} has no optimizer.pt, accepted: a whole checkpoint"):
        find_checkpoint(given)


def test_without_any_checkpoint(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoint-x").mkdir()
    made = trainer_in(tmp_path)
    with pytest.raises(ValueError, match="No valid checkpoint"):
        made.train(resume_from_checkpoint=True)
