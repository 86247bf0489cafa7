"""Ways of running that LNGD is not made for are refused by name, with the command to use."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_lngd import LNGDTrainer, LNGDTrainingArguments, create_lngd_optimizer
from hf_lngd.integrations.launching import launcher, refuse_unsupported
from hf_lngd.integrations.stock import Factory
from tests.hf_helpers import hf_vit


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--optim", "lngd"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def arguments(**given: Any) -> SimpleNamespace:
    plain = {"n_gpu": 1, "fsdp": None, "fsdp_config": None, "deepspeed": None, "world_size": 4, "use_cpu": False}
    return SimpleNamespace(**{**plain, "parallelism_config": None, **given})


def test_data_parallel_is_refused_with_the_command(tmp_path: Path) -> None:
    args = LNGDTrainingArguments(str(tmp_path), use_cpu=True)
    assert args.n_gpu == 0
    args._n_gpu = 2
    with pytest.raises(RuntimeError, match=r"DataParallel.*Use: torchrun --nproc_per_node 2 train.py --optim lngd"):
        LNGDTrainer(hf_vit(), args)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)


CASES = [
    ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, "FSDP1 "),
    ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1 "),
    ({"fsdp": True, "use_cpu": True}, {}, "FSDP2 on CPU, which accelerate has not got"),
    ({"deepspeed": "zero.json"}, {}, "DeepSpeed ZeRO "),
    ({}, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "DeepSpeed ZeRO-3 "),
    ({"parallelism_config": SimpleNamespace(tp_size=2)}, {}, r"tensor parallelism \(parallelism_config.tp_size\)"),
    ({"parallelism_config": SimpleNamespace(cp_size=2)}, {}, "context parallelism"),
]


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("given", "environment", "name"), CASES, ids=[case[-1] for case in CASES])
def test_what_shards_is_refused_by_name(
    given: dict[str, Any], environment: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    wanted = rf"LNGD: got {name}.*DDP.*fsdp_version: 2.*: torchrun --nproc_per_node 4 train.py --optim lngd"
    with pytest.raises(RuntimeError, match=wanted):
        refuse_unsupported(arguments(**given))


@pytest.mark.usefixtures("gpus")
def test_what_shards_is_refused_in_a_loop_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    environment, name = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1 "
    for variable, value in {**environment, "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(variable, value)
    wanted = rf"LNGD: got {name}.*DDP.*: torchrun --nproc_per_node 4 train.py --optim lngd"
    with pytest.raises(RuntimeError, match=wanted):
        create_lngd_optimizer(torch.nn.Linear(4, 3), lr=1e-3)
    monkeypatch.delenv(next(iter(environment)))
    split = torch.nn.Linear(4, 3)
    split._tp_size = 2  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="tensor parallelism"):
        create_lngd_optimizer(split, lr=1e-3)
    create_lngd_optimizer(torch.nn.Linear(4, 3), lr=1e-3)


def test_the_launcher_counts_nodes() -> None:
    assert launcher(1, 1) == ["python"] and launcher(2, 2) == ["torchrun", "--nproc_per_node", "2"]
    assert launcher(8, 4) == ["torchrun", "--nnodes", "2", "--nproc_per_node", "4"]


@pytest.mark.parametrize(
    ("world", "local", "printed"),
    [
        (8, "4", "torchrun --nnodes 2 --nproc_per_node 4 train.py"),
        (2, "1", "torchrun --nnodes 2 --nproc_per_node 1 train.py"),  # a process on each of two nodes
        (8, None, "torchrun --nproc_per_node 8 train.py"),
        (1, None, "python train.py"),
    ],
)
def test_the_command_counts_the_processes_of_a_node(
    world: int, local: str | None, printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    with pytest.raises(RuntimeError, match=f"Use, without it: {printed}"):
        refuse_unsupported(arguments(fsdp=True, fsdp_config={"version": 1}, world_size=world))


@pytest.mark.usefixtures("gpus")
def test_several_processes_and_fsdp2_on_gpus_are_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unsupported(arguments())
    refuse_unsupported(arguments(fsdp=True))
    monkeypatch.setenv("FSDP_VERSION", "1")
    refuse_unsupported(arguments(fsdp=True, fsdp_config={"version": 2}))  # the Trainer's own settings count
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refuse_unsupported(arguments())


@pytest.mark.usefixtures("gpus")
def test_a_stock_trainer_under_fsdp_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"FSDP in a stock Trainer.*accepted: hf_lngd\.LNGDTrainer"):
        Factory()(hf_vit(), arguments(fsdp=True, optim="lngd"))


def test_fsdp_on_the_cpu_is_refused_before_training(tmp_path: Path) -> None:
    args = LNGDTrainingArguments(str(tmp_path), use_cpu=True, fsdp=True)
    with pytest.raises(RuntimeError, match="FSDP2 on CPU"):
        LNGDTrainer(hf_vit(), args)
