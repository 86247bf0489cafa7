"""Loading a checkpoint's weights without losing any.

`save_pretrained` writes some models (ViT, Swin, …) under older names of their parameters. The Trainer loads such a
file by today's names, finds none of them, and goes on with the weights that it has. `from_pretrained` knows both.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def restores_by_name(model: nn.Module, folder: str) -> bool:
    """True if :func:`load_weights` can stand in for the Trainer's loading: a model of transformers, no adapters."""
    adapters = any(os.path.exists(os.path.join(folder, name)) for name in _ADAPTERS)
    return isinstance(model, PreTrainedModel) and not adapters and os.path.isfile(os.path.join(folder, "config.json"))


def freeze_fixed_positions(model: nn.Module) -> None:
    """Make sinusoidal positions constants again.

    `from_pretrained` makes them parameters that want a gradient (transformers 5.23, 5.24), and `save_pretrained` leaves
    them out: what an optimizer made of them would be lost with every save, and a resumed run go another way.
    """
    for module in model.modules():
        if "sinusoidal" in type(module).__name__.lower():
            module.requires_grad_(False)


def load_weights(model: Any, folder: str) -> None:
    """Copy the weights of a checkpoint into a model, bit for bit.

    Raises:
        RuntimeError: a parameter that one of the two has and the other has not, or of another shape.
    """
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng():  # weights are drawn before they are loaded; training's random state stays as it is
        loaded, report = type(model).from_pretrained(folder, config=config, dtype=model.dtype, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise RuntimeError(f"checkpoint {folder}: no weights for {', '.join(missing[:5])}")
    model.load_state_dict(loaded.state_dict(), strict=True)
