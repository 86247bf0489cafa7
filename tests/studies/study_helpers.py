"""What the tests of the benchmarks share: a tiny task, and rows as runs leave them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from benchmarks.studies import runs
from benchmarks.studies.rivals import Settings

WORDS = ["red", "dog", "man", "sees", "two", "balls", "on", "grass", "girl", "runs", "park", "boat"]


def write_multi30k(folder: Path, parts: dict[str, int] | None = None) -> Path:
    """A tiny task in Multi30k's format: part → number of sentence pairs."""
    folder.mkdir(exist_ok=True)
    for part, count in (parts or {"train": 192, "validation": 24}).items():
        with gzip.open(folder / f"{part}.json.gz", "wt", encoding="utf-8") as file:
            for number in range(count):
                words = [WORDS[(number * step + step) % len(WORDS)] for step in range(1, 3 + number % 5)]
                pair = {"en": " ".join(words), "de": " ".join(word[::-1] for word in words)}
                file.write(json.dumps({"translation": pair}) + "\n")
    return folder


def row_of(name: str, seed: int, curve: list[tuple[int, float, float]], phase: str = "report") -> runs.Row:
    """A row as a run would leave it."""
    diverged = curve[-1][2] is None
    return {
        "phase": phase,
        "optimizer": name,
        "seed": seed,
        "settings": Settings(1e-3, 1e-2).to_dict(),
        "steps": curve[-1][0],
        "seconds": curve[-1][1],
        "loss": curve[-1][2],
        "diverged": diverged,
        "train_curve": curve,
        "validation_curve": curve,
        "state_mib": 1.0,
    }


def study(path: Path, **changes: Any) -> Path:
    """A spec file: two rivals, short runs."""
    rates = "lr = 1e-2\nother_lr = 1e-2\nshorter = [1, 2]"
    values: dict[str, Any] = {"task": "multi30k", "title": "T", "steps": 12, "warmup": 4, "trials": 2, "seeds": [1, 2]}
    values |= {"fractions": [0.67], **changes}
    rivals = values.pop("rivals", {"adamw": rates, "lngd": rates})
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
    path.write_text("\n".join([*lines, *(f"[rivals.{k}]\n{v}" for k, v in rivals.items())]), encoding="utf-8")
    return path
