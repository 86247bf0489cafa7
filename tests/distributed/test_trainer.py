"""The Trainer on many processes: the weights of one; resume is to the bit on as many, to 1e-10 on others."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import TrainerState

from hf_lngd import LNGDTrainer, LNGDTrainingArguments
from hf_lngd.integrations import fsdp
from hf_lngd.integrations.sharded_weights import write_tensors
from tests.distributed import trainers
from tests.distributed.loops import distance
from tests.distributed.pool import Pools
from tests.helpers import assert_identical, flat, keeping
from tests.hf_helpers import hf_images, hf_vit

ARGS = "factor_interval=2,inverse_interval=4"
# Before 5.15 transformers takes T5's softmax, and label smoothing's mean over each micro-batch, in float32, whatever
# the model's dtype: how a batch is cut then shows in its rounding.
FLOAT32 = 1e-6 if Version("5.15") > trainers.TRANSFORMERS else 1e-10
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
    one = trainers.train(kind, str(tmp_path), 1, 16, 1, **values)
    assert one["steps"] == 12
    for ranks, size, accumulation in layouts:
        layout = {"ranks": ranks, "size": size, "accumulation": accumulation}
        case = {"kind": kind, "folder": str(tmp_path), **layout, **values}
        found = [trainers.train(**case)] if ranks == 1 else pools[ranks].run(trainers.train, **case)
        rounded = kind == "t5" or "label_smoothing_factor" in values
        assert distance(found[0], one) <= (FLOAT32 if rounded else 1e-10), layout
        assert found[0]["losses"] == pytest.approx(one["losses"], rel=1e-5)
        for other in found[1:]:
            assert all(torch.equal(w, found[0]["weights"][name]) for name, w in other["weights"].items())


def test_the_weights_of_a_loss_are_trained_as_on_one_process(pools: Pools, tmp_path: Path) -> None:
    """No DDP averages their gradients."""
    one = trainers.train_beside(str(tmp_path), ranks=1, size=8)
    found = pools[2].run(trainers.train_beside, folder=str(tmp_path), ranks=2, size=4)
    for name, value in one.items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)
        assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("marian", "preset=lngd_lr,factor_interval=2"), ("images", "fisher=sampled")],
)
def test_draws_of_each_rank_leave_the_ranks_alike(kind: str, settings: str, pools: Pools, tmp_path: Path) -> None:
    case = {"kind": kind, "folder": str(tmp_path), "optim_args": settings, "num_train_epochs": 1}
    found = pools[2].run(trainers.train, ranks=2, size=4, accumulation=2, **case)
    assert all(torch.equal(w, found[1]["weights"][name]) for name, w in found[0]["weights"].items())
    assert all(w.isfinite().all() for w in found[0]["weights"].values())


def test_fsdp2_of_the_committed_file_trains_and_resumes(pools: Pools, tmp_path: Path) -> None:
    """Checkpoints hold all of LNGD's state, in the file that DDP writes. With each layer wrapped: the table below."""
    optim_args = "factor_interval=4,inverse_interval=4"
    values = {"optim_args": optim_args, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    layout = {"kind": "images", "ranks": 2, "size": 4, "accumulation": 1}
    ddp = pools[2].run(trainers.train, folder=str(tmp_path / "ddp"), **layout, **values)
    sharded = pools[2].run(trainers.train_sharded, folder=str(tmp_path / "sharded"), committed=True, **values)
    assert distance(sharded[0], ddp[0]) <= 1e-10
    stop = tmp_path / "sharded" / "checkpoint-3"
    case = {"folder": str(tmp_path / "again"), "resume": str(stop), "committed": True, **values}
    again = pools[2].run(trainers.train_sharded, **case)
    for mine, theirs in zip(again, sharded, strict=True):
        assert all(torch.equal(w, theirs["weights"][name]) for name, w in mine["weights"].items())
        assert mine["memory"] == theirs["memory"]
    check_saved(tmp_path / "sharded", sharded[0]["weights"])
    states = [torch.load(tmp_path / name / "checkpoint-3" / "optimizer.pt") for name in ("sharded", "ddp")]
    assert states[0].keys() == states[1].keys()
    assert_near(states[0]["lngd"], states[1]["lngd"])


def check_saved(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """What `save_model` wrote is whole."""
    model = type(hf_vit()).from_pretrained(folder)
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name).to(weight.dtype), weight), name


def assert_near(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """All parts of a state, to rounding."""
    mine, theirs = flat(found), flat(expected)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert mine[name].dtype == value.dtype, name
            torch.testing.assert_close(mine[name], value, rtol=1e-7, atol=1e-9, equal_nan=True, msg=name)
        else:
            assert plain(mine[name]) == plain(value), name


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


SAVED = {"optim_args": ARGS, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@trainers.resumes_on_cpus
def test_a_checkpoint_that_is_written_over_holds_weights_of_one_kind(pools: Pools, tmp_path: Path) -> None:
    """A run under DDP goes on under FSDP2, then again under DDP, each time from before what was written last."""
    folder, stop = tmp_path / "run", tmp_path / "run" / "checkpoint-2"
    layout = {"kind": "images", "ranks": 2, "size": 4, "accumulation": 1, "folder": str(folder)}
    first = pools[2].run(trainers.train, **layout, **SAVED)
    second = pools[2].run(trainers.train_sharded, folder=str(folder), resume=str(stop), **SAVED)
    last = folder / "checkpoint-4"
    assert (last / "pytorch_model_fsdp_0").is_dir() and not list(last.glob("*.safetensors"))
    third = pools[2].run(trainers.train, resume=str(stop), **layout, **SAVED)
    assert not (last / "pytorch_model_fsdp_0").exists() and (last / "model.safetensors").is_file()
    assert distance(second[0], first[0]) <= 1e-10 and distance(third[0], first[0]) <= 1e-10


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a ViT with sharded weights alone, as under FSDP2 with `save_only_model`."""
    folder = tmp_path_factory.mktemp("parts") / "checkpoint-2"
    save_parts(get_model_state_dict(hf_vit(seed=1)), folder)
    return folder


def save_parts(weights: dict[str, Any], folder: Path) -> None:
    (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
    write_tensors(folder / "pytorch_model_fsdp_0", weights)
    TrainerState(global_step=2, max_steps=4, num_train_epochs=4, train_batch_size=4).save_to_json(
        str(folder / "trainer_state.json")
    )


def one_process(model: Any, folder: Path, **values: Any) -> LNGDTrainer:
    settings = {**trainers.SETTINGS, "max_steps": 4, "optim": "lngd", **values}
    return LNGDTrainer(model, LNGDTrainingArguments(str(folder), **settings), train_dataset=hf_images(16))


def test_sharded_weights_go_into_one_process(parts: Path, tmp_path: Path) -> None:
    trainer = one_process(hf_vit(), tmp_path)
    trainer._load_from_checkpoint(str(parts))
    for name, weight in hf_vit(seed=1).named_parameters():
        assert torch.equal(trainer.model.get_parameter(name), weight), name


@pytest.mark.parametrize(
    ("layers", "kind", "message"),
    [
        (1, RuntimeError, r"weights of another model: vit\.(encoder\.)?layer"),
        (3, ValueError, r"vit\.\S+: got none, accepted"),
    ],
)
def test_sharded_weights_of_another_model_are_refused(
    layers: int, kind: type[Exception], message: str, parts: Path, tmp_path: Path
) -> None:
    trainer = one_process(hf_vit(num_hidden_layers=layers), tmp_path)
    with keeping(trainer.model), pytest.raises(kind, match=message):
        trainer.train(resume_from_checkpoint=str(parts))


def test_other_optimizers_do_not_go_on_from_fsdp(parts: Path, tmp_path: Path) -> None:
    """Their state would be lost: the Trainer refuses it."""
    with pytest.raises(ValueError, match="only supported when using PyTorch FSDP"):
        one_process(hf_vit(), tmp_path, optim="adamw_torch").train(resume_from_checkpoint=str(parts))


def test_sharded_adapters_go_into_one_process(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "query"], init_lora_weights=False)
    saved, model = (get_peft_model(hf_vit(), config) for _ in range(2))
    save_parts(get_model_state_dict(saved, options=StateDictOptions(ignore_frozen_params=True)), tmp_path / "there")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert fsdp.load_weights(model, tmp_path / "there", under_fsdp=False, crossing=True)
    for name, weight in saved.named_parameters():
        assert torch.equal(model.get_parameter(name), weight), name


def test_what_fsdp2_cannot_take_is_refused_on_every_rank(pools: Pools, tmp_path: Path) -> None:
    hf_vit(num_hidden_layers=3).save_pretrained(tmp_path / "other")
    hf_vit().save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    for name, message in (
        ("other", "weights of another model: vit."),
        ("bare", "or no config.json, accepted under FSDP2"),
    ):
        for told, unchanged in pools[2].run(trainers.load_sharded, folder=str(tmp_path / name)):
            assert message in told and unchanged


# Resume

RESUMED = "factor_interval=4,inverse_interval=4"
# Rows of a micro-batch and accumulation that make steps of 16 rows; an epoch has three, the last of 8 rows.
LAYOUT = {1: (4, 4), 2: (4, 2), 4: (2, 2)}
# Two processes with accelerate's FSDP2 in place of DDP.
FSDP2 = "2, FSDP2"
Ranks = int | str


def run(pools: Pools, ranks: Ranks, folder: Path, **values: Any) -> list[dict[str, Any]]:
    if isinstance(ranks, str):
        values = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "optim_args": RESUMED, **values}
        return pools[2].run(trainers.train_sharded, folder=str(folder), size=4, accumulation=2, **values)
    size, accumulation = LAYOUT[ranks]
    case = {"kind": "images", "folder": str(folder), "ranks": ranks, "size": size, "accumulation": accumulation}
    case |= {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "optim_args": RESUMED, **values}
    return pools[ranks].run(trainers.train, **case) if ranks > 1 else [trainers.train(**case)]


def resumed(pools: Pools, ranks: Ranks, whole: Path, stop: int, folder: Path, **values: Any) -> list[dict[str, Any]]:
    shutil.copytree(whole / f"checkpoint-{stop}", folder / f"checkpoint-{stop}")
    return run(pools, ranks, folder, resume=True, save_strategy="no", **values)


# Factor steps are 0, 4, 8: within an epoch between factor steps, at its end, and within the next before one.
STOPS = (5, 6, 8)
PROCESSES: tuple[Ranks, ...] = (1, 2, 4, FSDP2)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"


def promise(before: Ranks, after: Ranks) -> str:
    """What docs/checkpoints.md says of a run that goes on from another's checkpoint."""
    return "to the bit" if before == after else "≤ 1e-10"


def test_the_table_of_the_page_is_what_is_tested_here() -> None:
    head = f"| written by ↓, resumed on → | {' | '.join(map(str, PROCESSES))} |"
    rows = [f"| {b} | {' | '.join(promise(b, a) for a in PROCESSES)} |" for b in PROCESSES]
    table = "\n".join([head, "| --- " * (1 + len(PROCESSES)) + "|", *rows])
    assert table in PAGE.read_text(encoding="utf-8"), table


@pytest.fixture(scope="module")
def unbroken(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[Ranks, Any]:
    """Runs that were not stopped, by number of processes."""
    made = {}
    for ranks in PROCESSES:
        folder = tmp_path_factory.mktemp("whole")
        made[ranks] = (folder, run(pools, ranks, folder))
    return made


# Each pair once, a process number with itself at every stop.
PAIRS = [
    pytest.param(before, after, stop, marks=trainers.resumes_on_cpus if after in (2, 4) else ())
    for i, (before, after) in enumerate(itertools.product(PROCESSES, repeat=2))
    for stop in (STOPS if before == after else (STOPS[i % len(STOPS)],))
]


@pytest.mark.parametrize(("before", "after", "stop"), PAIRS)
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
    if after == FSDP2:
        check_saved(tmp_path, found[0]["weights"])


@trainers.resumes_on_cpus
def test_random_states_of_each_rank_come_back(pools: Pools, tmp_path: Path) -> None:
    """Dropout, and the draws of the Fisher."""
    values = {"optim_args": f"{RESUMED},fisher=sampled", "dropout": 0.2}
    whole = run(pools, 2, tmp_path / "whole", **values)
    found = resumed(pools, 2, tmp_path / "whole", 5, tmp_path / "again", **values)
    for mine, theirs in zip(found, whole, strict=True):
        assert_identical(mine["weights"], theirs["weights"])
        assert_identical(mine["state"], theirs["state"])
