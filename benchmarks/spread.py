"""Inverses over 1 to 512 ranks, by the cost model alone: Transformer-big and NLLB-3.3B.

    python -m benchmarks.spread

Seconds are of a step in which every inverse is due (the first one, and any without `stagger`), on accelerators as
`hf_lngd.placement` takes them: nothing was run. The results are `benchmarks/results/spread.json` and a table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.tables import table
from hf_lngd.placement import SPEEDS, loads_of, placement

HERE = Path(__file__).resolve().parent
RANKS = (1, 8, 32, 128, 512)
# (width, width of the feed-forward layers, layers on each side)
MODELS = {"Transformer-big": (1024, 4096, 6), "NLLB-3.3B": (2048, 8192, 24)}


def tasks_of(width: int, inner: int, layers: int) -> list[tuple[int, int]]:
    """(blocks, width of a block) of each Φ of an encoder-decoder with ReLU feed-forward layers.

    q, k and v share one; the keys and values of all decoder layers' cross attention share one, too; that of the second
    feed-forward layer is cut into blocks (``max_factor_dim=auto``).
    """
    whole, cut = (1, width), (inner // width, width)
    encoder = [whole, whole, whole, cut]  # qkv, out, fc1, fc2
    decoder = [whole] * 5 + [cut]  # qkv, out, cross q, cross out, fc1, fc2
    return encoder * layers + decoder * layers + [whole]


def simulate(tasks: list[tuple[int, int]], ranks: int) -> tuple[float, float]:
    """Seconds of the busiest rank, and of sending everything to everyone (0 for one rank), kept in bfloat16."""
    speed = SPEEDS["accelerator"]
    costs = [k * b**3 / speed.cholesky for k, b in tasks]
    owners = placement(costs, ranks)
    sizes = loads_of([2.0 * k * b * b for k, b in tasks], owners, ranks)
    sending = 0.0 if ranks == 1 else speed.latency + ranks * max(sizes) / speed.bandwidth
    return max(loads_of(costs, owners, ranks)), sending


def main() -> None:
    """Compute and write."""
    rows = []
    for name, sizes in MODELS.items():
        tasks = tasks_of(*sizes)
        for ranks in RANKS:
            computing, sending = simulate(tasks, ranks)
            row = {"model": name, "inverses": len(tasks), "ranks": ranks, "computing": computing, "sending": sending}
            rows.append(row)
    path = HERE / "results" / "spread.json"
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    head = ["model", "inverses", "ranks", "busiest rank, s", "sending, s"]
    seconds = ("computing", "sending")
    print(table(head, [[*map(str, list(row.values())[:3]), *(f"{row[name]:.3f}" for name in seconds)] for row in rows]))


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()  # a wrong argument is named
    main()
