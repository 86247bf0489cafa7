"""How far apart one process and many end: the figures of the README's part on many processes.

    python -m benchmarks.invariance

Models, batches and the loop are those of the tests (`tests/dist_cases.py`), whose bounds these figures stay below.
The results are `benchmarks/results/invariance.json` and a table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import table
from tests import dist_cases
from tests.dist_pool import Pools, open_pools

HERE = Path(__file__).resolve().parent
LAYOUTS = [(ranks, accumulation) for ranks in (1, 2, 4) for accumulation in (1, 2, 4)][1:]
EXACT: dict[str, Any] = {"conv_rows": 1, "rate_rows": 1, "matrix_dtype": "full"}
PAPER: dict[str, Any] = {"preset": "paper", "fisher": "expected", "factor_interval": 5, "inverse_interval": 5}
# (model, settings' name, settings, dtype)
CASES: list[tuple[str, str, dict[str, Any], str]] = [
    (kind, name, {**EXACT, **fields}, dtype)
    for kind in ("marian", "images")
    for name, fields in (("fast", {}), ("paper, expected", PAPER))
    for dtype in ("float64", "float32")
]
HALF: dict[str, Any] = {"conv_rows": 1, "rate_rows": 1, "matrix_dtype": "bfloat16"}
HALVES = [(kind, "fast, bfloat16", HALF, "float32") for kind in ("marian", "images")]


def worst(pools: Pools, kind: str, fields: dict[str, Any], dtype: str) -> float:
    """The greatest distance to one process over all layouts."""
    case: dict[str, Any] = {"kind": kind, "fields": fields, "dtype": dtype}
    one = dist_cases.train(**case)
    found = []
    for ranks, accumulation in LAYOUTS:
        layout = {**case, "ranks": ranks, "accumulation": accumulation, "uneven": accumulation == 2}
        many = dist_cases.train(**layout) if ranks == 1 else pools[ranks].run(dist_cases.train, **layout)[0]
        found.append(dist_cases.distance(many, one))
    return max(found)


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for pools in open_pools(Path(folder), "tests.dist_cases"):
            rows: list[dict[str, Any]] = [
                {"model": kind, "settings": name, "dtype": dtype, "distance": worst(pools, kind, fields, dtype)}
                for kind, name, fields, dtype in [*CASES, *HALVES]
            ]
    path = HERE / "results" / "invariance.json"
    path.write_text(json.dumps({"steps": 20, "layouts": LAYOUTS, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    head = ["model", "settings", "dtype", "greatest distance"]
    print(table(head, [[r["model"], r["settings"], r["dtype"], f"{r['distance']:.1e}"] for r in rows]))


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()  # a wrong argument is named
    main()
