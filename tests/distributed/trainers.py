"""What the ranks of a pool run through transformers' Trainer."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from packaging.version import Version
from torch.distributed.fsdp import fully_shard
from transformers import DataCollatorForSeq2Seq

from hf_lngd import LNGD, LNGDSeq2SeqTrainer, LNGDSeq2SeqTrainingArguments, LNGDTrainer, LNGDTrainingArguments
from hf_lngd.capture import Capture
from hf_lngd.integrations import fsdp
from tests.distributed import loops
from tests.hf_helpers import hf_encoded, hf_images, hf_pairs, hf_seq2seq_model, hf_tokenizer, hf_vit
from tests.integration.test_other_trainers import make as make_beside

# No multiple of a step's rows, so that the last window of accumulation is a short one; a multiple of a round of
# micro-batches, which accelerate would otherwise fill up with rows that were seen already.
ROWS = 40
FSDP2 = "examples/accelerate/fsdp2.yaml"
TRANSFORMERS = Version(transformers.__version__)
# Before 5.18 it loads states to the device "cpu:0", which torch does not know, whatever the optimizer.
resumes_on_cpus = pytest.mark.skipif(
    Version("5.18") > TRANSFORMERS, reason="transformers before 5.18 does not resume on several processes of CPUs"
)
# torch 2.9.1 adds clipping's 1e-6 to each process's part of the norm of sharded gradients: weights then differ by 1e-8.
CLIP = 1.0 if Version("2.13") <= Version(torch.__version__) else 0.0
SETTINGS: dict[str, Any] = {
    "max_grad_norm": CLIP,
    "use_cpu": True,
    "report_to": "none",
    "num_train_epochs": 4,
    "save_strategy": "no",
    "disable_tqdm": True,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "logging_steps": 5,
}


def make_trainer(
    kind: str, folder: str, ranks: int, size: int, accumulation: int, double: bool = True, dropout: float = 0.0,
    **values: Any,
) -> Any:  # fmt: skip
    """A trainer of a small model; `double`: in float64."""
    layout = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    settings = {**SETTINGS, **layout, **({"ddp_backend": "gloo"} if ranks > 1 else {}), **values}
    precision = torch.float64 if double else torch.float32
    if kind == "images":
        model = freeze_keys(hf_vit(initializer_range=0.25, hidden_dropout_prob=dropout)).to(precision)
        return LNGDTrainer(
            model, LNGDTrainingArguments(folder, **settings), train_dataset=hf_images(ROWS, dtype=precision)
        )
    tokenizer = hf_tokenizer()
    model = freeze_keys(hf_seq2seq_model(kind, tokenizer, **({} if kind == "t5" else {"init_std": 0.25})))
    return LNGDSeq2SeqTrainer(
        model.to(precision),
        LNGDSeq2SeqTrainingArguments(folder, **settings),
        train_dataset=hf_encoded(tokenizer, hf_pairs(ROWS)),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )


def freeze_keys(model: Any) -> Any:
    """Keys' biases have a gradient of rounding alone."""
    for name, parameter in model.named_parameters():
        if name.endswith(("k_proj.bias", "key.bias")):
            parameter.requires_grad_(False)
    return model


# One sample in eight estimates the factors of convolutions, counted in each process: all of them, where processes are
# compared.
all_samples = patch.object(Capture, "convolution_samples", 1)


@all_samples
def train(
    kind: str, folder: str, ranks: int, size: int, accumulation: int, resume: bool | str | None = None, **values: Any
) -> dict[str, Any]:
    """Weights after training, what they were before, the losses that were logged, the optimizer's state."""
    trainer = make_trainer(kind, folder, ranks, size, accumulation, **values)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if ranks > 1:
        dist.barrier()
    result = {"weights": weights, "start": start, "losses": losses, "steps": trainer.state.global_step}
    state = trainer.optimizer.optimizer.state_dict() if hasattr(trainer.optimizer, "optimizer") else {}
    return result | {"state": state.get("lngd"), "rate": trainer.lr_scheduler.get_last_lr()}


def train_beside(folder: str, ranks: int, size: int) -> dict[str, torch.Tensor]:
    """Weights of a model and of a loss beside it, which no DDP wraps, after training."""
    settings = {"ddp_backend": "gloo"} if ranks > 1 else {}
    trainer = make_beside("mixin", Path(folder), per_device_train_batch_size=size, save_strategy="no", **settings)
    trainer.train()
    head = {f"head.{name}": p.detach().clone() for name, p in trainer.loss.head.named_parameters()}
    return head | {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def fsdp2_environment() -> dict[str, str]:
    """What `accelerate launch` with the committed file for FSDP2 tells its processes of FSDP."""
    path = str(Path(__file__).resolve().parents[2] / FSDP2)
    args = launch_command_parser().parse_args(["--config_file", path, "--num_processes", "2", "script.py"])
    args, _, _ = _validate_launch_command(args)
    assert args.use_fsdp and args.fsdp_version == 2 and args.num_processes == 2
    told = prepare_multi_gpu_env(args)
    return {name: value for name, value in told.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}


def fsdp2_plugin() -> FullyShardedDataParallelPlugin:
    """accelerate's FSDP2 with each layer of a ViT wrapped."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=["ViTLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )


@all_samples
def train_sharded(
    folder: str, resume: str | bool | None = None, committed: bool = False, size: int = 4, accumulation: int = 1,
    **values: Any,
) -> dict[str, Any]:  # fmt: skip
    """As `train`, of images, with accelerate's FSDP2, whose branch is entered here though there is no GPU.

    Args:
        committed: with the settings of the committed file, else with each layer wrapped.
    """
    trainer = make_trainer("images", folder, 2, size, accumulation, **values)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    if committed:
        with patch.dict(os.environ, fsdp2_environment()):
            plugin = FullyShardedDataParallelPlugin()
    else:
        plugin = fsdp2_plugin()
    state = trainer.accelerator.state
    kind = state.distributed_type
    state.distributed_type, state.fsdp_plugin, trainer.is_fsdp_enabled = DistributedType.FSDP, plugin, True
    try:
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
    finally:  # it is shared by all accelerators of the process
        state.distributed_type, state.fsdp_plugin = kind, None
    trained = {n: p.detach().full_tensor().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    optimizer = trainer.optimizer.optimizer
    result = {"weights": trained, "start": start, "memory": optimizer.memory_usage()["total"]}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result |= {"losses": losses, "steps": trainer.state.global_step, "state": optimizer.state_dict()["lngd"]}
    return result | {"rate": trainer.lr_scheduler.get_last_lr()}


def load_sharded(folder: str) -> tuple[str, bool]:
    """What loading a checkpoint into a ViT of FSDP2 raises, and whether weights are as before."""
    model: Any = hf_vit()
    fully_shard(model)
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    try:
        fsdp.load_weights(model, folder, under_fsdp=True, crossing=True)
    except RuntimeError as error:
        return str(error), all(torch.equal(p.full_tensor(), before[name]) for name, p in model.named_parameters())
    return "", False


DYING = 3  # the step whose checkpoint is being written
KILLED: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "max_steps": 5,
    "optim_args": "fisher=sampled,factor_interval=2,inverse_interval=2",
}


def train_killed(
    folder: str, how: str, resume: bool | None = None, victim: int | None = None, event: str = ""
) -> tuple[dict[str, Any], str]:
    """The Trainer's run under DDP or FSDP2, and what was warned of.

    Args:
        victim: the rank that is killed at `event` of the third checkpoint.
    """
    if victim == dist.get_rank():
        loops.kill_at(event, f"{os.sep}checkpoint-{DYING}{os.sep}")
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hf_lngd").addHandler(handler)
    if how == "ddp":
        found = train("images", folder, 2, 4, 1, double=False, resume=resume, **KILLED)
    else:
        found = train_sharded(folder, resume, double=False, **KILLED)
    return found["weights"], "\n".join(warned)


def accelerated(folder: str, layout: str, load: bool = False) -> dict[str, torch.Tensor]:
    """Three steps in accelerate's loop and three after `save_state`; or (`load`) these alone, after `load_state`."""
    accelerator = Accelerator(cpu=True)
    model = hf_vit(seed=int(load)).double()
    optimizer = LNGD(model, lr=0.1 if load else 1e-3, factor_interval=2, layout=layout)
    model, optimizer = accelerator.prepare(model, optimizer)
    if load:
        accelerator.load_state(folder)
    for step in range(3 if load else 0, 6):
        if step == 3 and not load:
            accelerator.save_state(folder)
        images = hf_images(8, seed=step, dtype=torch.float64)[dist.get_rank() :: 2]
        batch = {"pixel_values": torch.stack([image["pixel_values"] for image in images])}
        labels = torch.tensor([image["labels"] for image in images])
        accelerator.backward(model(**batch, labels=labels).loss)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}
