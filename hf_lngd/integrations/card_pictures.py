"""The picture that every model card has: loss against steps. matplotlib is an extra of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

LOSSES = "loss_curves.png"
_KINDS = {"loss": ("training", "#0f766e"), "eval_loss": ("validation", "#d97706")}


def pyplot() -> Any:
    """matplotlib's pyplot, which draws into files; None, and a line once, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        logger.warning_once("no pictures: matplotlib is not installed; pip install 'hf_lngd[plot]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def losses_by_step(history: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """`loss` and `eval_loss` of a Trainer's log, by step; of a step that was logged twice the last."""
    rows: dict[int, dict[str, float]] = {}
    for entry in history:
        for key in _KINDS:
            if key in entry:
                rows.setdefault(entry["step"], {})[key] = entry[key]
    return dict(sorted(rows.items()))


def draw_losses(folder: str | Path, history: Sequence[Mapping[str, Any]], title: str) -> bool:
    """Draw :data:`LOSSES` into a folder; True if it is there now.

    Args:
        folder: the model's.
        history: a Trainer's log; without two training losses there is no curve, and an old picture is removed.
        title: the model's name.
    """
    path, rows = Path(folder) / LOSSES, losses_by_step(history)
    plt = pyplot() if sum("loss" in row for row in rows.values()) > 1 else None
    if plt is None:
        path.unlink(missing_ok=True)
        return False
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for key, (name, colour) in _KINDS.items():
        points = [(step, row[key]) for step, row in rows.items() if key in row]
        if points:
            few = len(points) <= 20
            axis.plot(*zip(*points, strict=True), label=name, color=colour, marker="o" if few else None, markersize=3)
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("loss, nats")
    axis.set_title(title, loc="left", fontsize=11)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
