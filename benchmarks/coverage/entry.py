"""What the zoo says of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = Callable[[int, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Entry:
    """One tiny model.

    Attributes:
        name: the row's: the architecture, and what sets this model apart from others of it.
        architecture: transformers' model type.
        class_name: of the model, in transformers.
        fields: of its configuration.
        inputs: makes a batch of so many rows with a generator.
        full: what the configuration of a full-size model needs besides its defaults.
        rests: a regular expression of the layers that see nothing here, and why: (pattern, reason).
        low: why LNGD owns less of it than of others.
        single: why the model cannot compute in float64; it is checked in float32 then.
        exempt: checks that cannot hold for a reason that is the model's own: check → reason.
    """

    name: str
    architecture: str
    class_name: str
    fields: Mapping[str, Any]
    inputs: Inputs
    full: Mapping[str, Any] = field(default_factory=dict)
    rests: tuple[str, str] | None = None
    low: str = ""
    single: str = ""
    exempt: Mapping[str, str] = field(default_factory=dict)
