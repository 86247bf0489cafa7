"""LNGD's diagnostics as entries of the Trainer's own log, and so of TensorBoard, trackio and whatever it reports to."""

from __future__ import annotations

from typing import Any

from ..optimizer import LNGD

PREFIX = "lngd_"


def lngd_of(optimizer: Any) -> LNGD | None:
    """The LNGD inside accelerate's wrapper (or bare), else None."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, LNGD) else None


def log_entries(optimizer: LNGD) -> dict[str, float]:
    """`LNGD.diagnostics` under names that begin with ``lngd_``, to four digits: they share a line with the loss."""
    return {f"{PREFIX}{name}": float(f"{value:.4g}") for name, value in optimizer.diagnostics().items()}
