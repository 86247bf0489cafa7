"""How far factors are from those of float32: precision × accumulation × checkpointing × model.

    python -m benchmarks.precision

Models, batches and the loop are those of the tests (`tests/precision_cases.py`), whose bounds these figures stay below.
The results are `benchmarks/results/precision.json` and the table `precision.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import table
from tests.precision_cases import (  # fmt: skip
    ACCUMULATIONS,
    CHECKPOINTING,
    FORWARD,
    FULL,
    GRADIENTS,
    MODELS,
    PRECISIONS,
    factors,
    gap,
)

RESULTS = Path(__file__).resolve().parent / "results"
HEAD = ["model", "precision", "micro-batches", "checkpointing", "Φ, Ψ", "KFAC's A, B", "rates α_l", "steps left out"]


def measure() -> list[dict[str, Any]]:
    """A row for each combination: the greatest relative difference over layers. None: gradients are hidden."""
    rows = []
    for kind in MODELS:
        plain, _, _ = factors(kind, FULL, 1, "off", FORWARD)
        of_gradients, rates, _ = factors(kind, FULL, 1, "off", GRADIENTS)
        for precision in PRECISIONS:
            for accumulation in ACCUMULATIONS:
                for checkpointing, reentrant in CHECKPOINTING.items():
                    case = (kind, precision, accumulation, checkpointing)
                    row: dict[str, Any] = dict(zip(HEAD, case, strict=False))
                    found, _, row["steps left out"] = factors(*case, FORWARD)
                    row["Φ, Ψ"] = gap(found, plain)
                    row["KFAC's A, B"] = row["rates α_l"] = None
                    if not reentrant:
                        found, own, _ = factors(*case, GRADIENTS)
                        row["KFAC's A, B"], row["rates α_l"] = gap(found, of_gradients), gap(own, rates)
                    rows.append(row)
    return rows


def text_of(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""

    def cell(value: Any) -> str:
        return "refused" if value is None else f"{value:.1e}" if isinstance(value, float) else str(value)

    return table(HEAD, [[cell(row[name]) for name in HEAD] for row in rows])


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    rows = measure()
    (RESULTS / "precision.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    title = "# Factors in half precision: greatest relative difference to float32 over layers\n\n"
    note = (
        "`python -m benchmarks.precision`. Without accumulation and checkpointing in float32 stands the row itself.\n\n"
    )
    (RESULTS / "precision.md").write_text(title + note + text_of(rows) + "\n", encoding="utf-8")
    print(text_of(rows))


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()  # a wrong argument is named
    main()
