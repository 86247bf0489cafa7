"""The last whole checkpoint is found, and what is damaged is named. Runs that are killed: tests/distributed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from run_shared import find_checkpoint
from safetensors.torch import save_file

from hf_lngd import LNGDTrainer, LNGDTrainingArguments
from hf_lngd.integrations.checkpoints import check_checkpoint, last_checkpoint, problem_of
from hf_lngd.integrations.sharded_weights import write_tensors
from hf_lngd.integrations.usage import UsageError
from tests.helpers import keeping
from tests.hf_helpers import hf_images, hf_vit

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    trainer_in(folder).train()
    return folder


def cut_shards(folder: Path) -> None:
    """Sharded weights in the place of whole ones, as under FSDP2; a file of them was cut off."""
    inner = folder / "pytorch_model_fsdp_0"
    write_tensors(inner, {"weight": torch.ones(300)})
    (folder / "model.safetensors").unlink()
    check_checkpoint(folder)
    (part,) = inner.glob("*.safetensors")
    os.truncate(part, 500)


DAMAGES: dict[str, tuple[Any, str]] = {
    "empty weights": (lambda f: os.truncate(f / "model.safetensors", 0), "damaged model.safetensors"),
    "cut random state": (lambda f: os.truncate(f / "rng_state.pth", 100), "damaged rng_state.pth"),
    "cut state": (lambda f: os.truncate(f / "trainer_state.json", 30), "damaged trainer_state.json"),
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
def test_a_damaged_checkpoint_is_named_and_nothing_is_loaded(damage: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(whole / "checkpoint-5", folder)
    check_checkpoint(folder)
    do, message = DAMAGES[damage]
    do(folder)
    made = trainer_in(tmp_path)
    with keeping(made.model), pytest.raises(ValueError, match=f"{folder}.*{message}"):
        made.train(resume_from_checkpoint=str(folder))
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


def test_killed_in_the_very_first_save(whole: Path, tmp_path: Path, caplog: Any) -> None:
    """`--resume_from_checkpoint last` starts anew, as long as no checkpoint was ever finished."""
    given = SimpleNamespace(resume_from_checkpoint="last", output_dir=str(tmp_path))
    assert find_checkpoint(given) is None
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(whole / "checkpoint-5", folder)
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
