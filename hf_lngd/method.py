"""What a config is made of. The default's parts stand in the core, those of other options in `paper`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .capture import Capture
from .directions import Direction
from .factors import Bank, FactorSpec
from .topology import Group


@dataclass(frozen=True)
class Method:
    """What a config is made of: the class of hooks, the direction, and how factors are kept in banks.

    Attributes:
        scale: (group, m) → by what its factor has to be multiplied to be the paper's Φ, see `factors.FactorSpec`.
        rate: the rates of a step's layers, where the direction leaves them open, see `paper.rate`."""

    capture: type[Capture]
    direction: Direction
    banks: Callable[[Sequence[FactorSpec]], Sequence[Bank]]
    scale: Callable[[Group, int], float]
    rate: Any = None
