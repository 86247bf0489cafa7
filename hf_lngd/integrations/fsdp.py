"""Checkpoints of a Trainer under FSDP2: weights as the Trainer has it, LNGD's state whole, in the file that DDP writes.

The Trainer's own way is torch's `get_optimizer_state_dict`, which would lose LNGD's state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..optimizer import LNGD
from ..sharding import is_sharded


def save(trainer: Any, optimizer: LNGD, folder: str | Path) -> None:
    """Weights, optimizer and scheduler of a checkpoint. Every rank has to call it."""
    save_weights(trainer, folder)
    state = optimizer.state_dict()
    if trainer.args.should_save:
        torch.save(state, Path(folder) / OPTIMIZER_NAME)
        torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)


def save_weights(trainer: Any, folder: str | Path) -> None:
    """As the Trainer saves them, for its own loading."""
    from accelerate.utils import save_fsdp_model
    from transformers.distributed.fsdp import get_fsdp_ckpt_kwargs

    accelerator = trainer.accelerator
    save_fsdp_model(accelerator.state.fsdp_plugin, accelerator, trainer.model, str(folder), **get_fsdp_ckpt_kwargs())


def save_model(trainer: Any, folder: str | Path) -> None:
    """The whole model, for `from_pretrained`. Every rank has to call it; tensor by tensor, to rank 0's CPU.

    The Trainer writes nothing of sharded state dicts here, and takes full ones from accelerate, whose tensors
    safetensors cannot write where nothing copied them to the CPU (gloo).
    """
    writes = trainer.args.should_save
    state: dict[str, Any] = {}
    for name, value in trainer.model.state_dict().items():
        whole = value.full_tensor() if is_sharded(value) else value
        if writes:
            state[name] = whole.cpu()
    if writes:
        trainer._save(str(folder), state_dict=state)
    trainer.accelerator.wait_for_everyone()


def load(trainer: Any, optimizer: LNGD, folder: str | Path) -> None:
    """Optimizer and scheduler of a checkpoint, one of DDP or of one process too. Every rank has to call it."""
    # mapped: a rank reads its own share
    state = torch.load(Path(folder) / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
    optimizer.load_state_dict(state)
    trainer.lr_scheduler.load_state_dict(torch.load(Path(folder) / SCHEDULER_NAME, weights_only=True))
