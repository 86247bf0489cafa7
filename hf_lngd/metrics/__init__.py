"""Metrics that load without a network: modules for `evaluate`, inside the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent


def available() -> list[str]:
    """The names that :func:`load_metric` accepts."""
    return sorted(path.name for path in _FOLDER.iterdir() if (path / f"{path.name}.py").is_file())


def load_metric(name: str) -> Any:
    """An `evaluate.Metric` from this package.

    Args:
        name: ``sacrebleu``: BLEU and chrF with their signatures; ``accuracy``: accuracy and top-k accuracy.

    Raises:
        ValueError: no such metric; the names are listed.
    """
    if name not in available():
        raise ValueError(f"metric: got {name!r}, accepted: {', '.join(available())}")
    import evaluate

    # In memory: no file that two processes of one run would lock against each other.
    return evaluate.load(str(_FOLDER / name), keep_in_memory=True)
