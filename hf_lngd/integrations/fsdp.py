"""Checkpoints of a Trainer under FSDP2: weights as the Trainer has it, LNGD's state whole, in the file that DDP writes.
Runs go on from them under DDP and in one process, and from theirs under FSDP2.

The Trainer's own way is torch's `get_optimizer_state_dict`, which would lose LNGD's state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..optimizer import LNGD
from ..parallel.checkpoint import whole_state, whole_tensors
from ..torch_internals import is_fully_sharded
from . import checkpoints
from .checkpoints import SHARDED, restores_by_name
from .sharded_weights import read_tensors, untied, write_tensors


def save(trainer: Any, optimizer: LNGD, folder: str | Path) -> None:
    """Weights (under FSDP2), optimizer and scheduler of a checkpoint. Every rank has to call it."""
    if trainer.is_fsdp_enabled:
        save_weights(trainer, folder)
    state = whole_state(optimizer)
    if trainer.args.should_save:
        torch.save(state, Path(folder) / OPTIMIZER_NAME)
        torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)


def save_weights(trainer: Any, folder: str | Path) -> None:
    """Sharded by rows in safetensors, or whole as the Trainer saves them, for its own loading."""
    from accelerate.utils import save_fsdp_model

    plugin = trainer.accelerator.state.fsdp_plugin
    if "SHARDED" not in str(plugin.state_dict_type):
        save_fsdp_model(plugin, trainer.accelerator, trainer.model, str(folder), adapter_only=True)
        return
    parts = Path(folder) / f"{SHARDED}0"
    parts.mkdir(parents=True, exist_ok=True)
    weights = get_model_state_dict(trainer.model, options=_options(trainer.model))
    write_tensors(parts, untied(trainer.model, weights))


def _options(model: nn.Module) -> StateDictOptions:
    adapters = hasattr(model, "peft_config")  # of which what is trained is saved
    return StateDictOptions(ignore_frozen_params=adapters, strict=not adapters)


def save_model(trainer: Any, folder: str | Path) -> None:
    """The whole model, for `from_pretrained`. Every rank has to call it; tensor by tensor, to rank 0's CPU.

    The Trainer writes nothing of sharded state dicts here, and takes full ones from accelerate, whose tensors
    safetensors cannot write where nothing copied them to the CPU (gloo).
    """
    state = whole_tensors(trainer.model.state_dict(), trainer.args.should_save)
    if trainer.args.should_save:
        trainer._save(str(folder), state_dict=state)
    trainer.accelerator.wait_for_everyone()


def load_weights(model: nn.Module, folder: str | Path, under_fsdp: bool, crossing: bool) -> bool:
    """Weights of a checkpoint, whole ones or those that FSDP2 has sharded; False: this one is the Trainer's business.

    Every rank has to call it: in one process, before DDP wraps the model, or sharded by FSDP2. Nothing is loaded where
    it raises.

    Args:
        under_fsdp: the model is run by accelerate's FSDP.
        crossing: a checkpoint of the other way may be loaded: what goes with the weights can be.

    Raises:
        RuntimeError: weights of another model, or whole ones that cannot be dealt out.
        ValueError: sharded ones that cannot be read.
    """
    parts, whole = Path(folder) / f"{SHARDED}0", restores_by_name(model, str(folder))
    if under_fsdp and not is_fully_sharded(model):
        return False  # FSDP1
    if parts.is_dir() and (under_fsdp or crossing):
        options = _options(model)
        state: dict[str, Any] = get_model_state_dict(model, options=options)
        weights = {name: torch.empty_like(value) for name, value in untied(model, state).items()}
        read_tensors(parts, weights)
        set_model_state_dict(model, {**state, **weights}, options=options)
    elif not parts.is_dir() and whole and (crossing or not under_fsdp):
        checkpoints.load_weights(model, str(folder))
    elif under_fsdp and crossing and not (Path(folder) / "pytorch_model_fsdp.bin").is_file():
        raise RuntimeError(
            f"checkpoint {folder}: got whole weights of adapters, or no config.json, accepted under FSDP2: those of a "
            "model of transformers, or what FSDP2 wrote; or go on under DDP"
        )
    else:
        return False
    return True


def load(trainer: Any, optimizer: LNGD, folder: str | Path) -> None:
    """Optimizer and scheduler of a checkpoint, one of DDP or of one process too. Every rank has to call it."""
    # mapped: a rank reads its own share
    state = torch.load(Path(folder) / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
    optimizer.load_state_dict(state)
    trainer.lr_scheduler.load_state_dict(torch.load(Path(folder) / SCHEDULER_NAME, weights_only=True))
