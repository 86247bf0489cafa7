"""Tiny models of every architecture that transformers classifies images or translates with.

A few thousand to a hundred thousand parameters each, random weights, no dropout. What cannot be built has its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.coverage.entry import Entry
from benchmarks.coverage.images import ABSENT_IMAGES, IMAGES
from benchmarks.coverage.translation import ABSENT_TRANSLATION, TRANSLATION

ZOO: dict[str, Entry] = {entry.name: entry for entry in [*IMAGES, *TRANSLATION]}
ABSENT: dict[str, str] = {**ABSENT_IMAGES, **ABSENT_TRANSLATION}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
MAPPINGS = ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES")


def known() -> dict[str, tuple[str, ...]]:
    """The installed transformers' own list: architecture → its model classes."""
    found: dict[str, tuple[str, ...]] = {}
    for mapping in MAPPINGS:
        for architecture, classes in getattr(modeling_auto, mapping).items():
            found[architecture] = (classes,) if isinstance(classes, str) else tuple(classes)
    return found


def unknown() -> list[str]:
    """Architectures and heads of the installed transformers that are neither in the zoo nor absent for a reason."""
    built = {(entry.architecture, entry.class_name) for entry in ZOO.values()}
    return [
        f"{architecture}: {name}"
        for architecture, classes in known().items()
        for name in classes
        if architecture not in ABSENT and (architecture, name) not in built
    ]


def build(entry: Entry, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model in training mode, eager attention (the one that every architecture has), nothing random in it."""
    torch.manual_seed(seed)
    model = getattr(transformers, entry.class_name)._from_config(
        _config(entry, entry.fields), attn_implementation="eager"
    )
    for module in model.modules():
        for holder in (module, getattr(module, "config", module)):  # some forwards read the configuration
            for name, value in vars(holder).items():
                if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, DROPOUTS))):
                    setattr(holder, name, 0.0)
        if isinstance(vars(module).get("dtype"), torch.dtype):
            module.dtype = dtype  # a router's: it turns its weight into it
    model.config.use_cache = False
    return model.to(dtype).train()


def batch(entry: Entry, rows: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A random batch of the model's inputs and its labels."""
    tensors = entry.inputs(rows, torch.Generator().manual_seed(seed))
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


def build_full(entry: Entry) -> nn.Module:
    """The model with the configuration's default sizes, those of a published one, without memory (meta device)."""
    with torch.device("meta"):
        return getattr(transformers, entry.class_name)(_config(entry, entry.full))


def _config(entry: Entry, fields: Mapping[str, Any]) -> Any:
    return CONFIG_MAPPING[entry.architecture](**fields)
