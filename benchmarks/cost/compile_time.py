"""What torch.compile saves with LNGD: seconds of steps in which it collects statistics, and of the others.

    python -m benchmarks.cost.compile_time

A Marian (d=128, 2+2 layers) on batches of 32 × 32 random tokens, AdamW and LNGD, each as it is and compiled. Each round
takes a step of every contender, another one first each round. Steps in which LNGD
collects statistics (here one in ten) run eagerly.
The result is `benchmarks/results/compile_time.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.cost.cases import marian
from benchmarks.report.tables import table
from hf_lngd import LNGD

RESULTS = Path(__file__).resolve().parents[1] / "results" / "compile_time.json"
BATCH, TOKENS, VOCABULARY = 32, 32, 4_000
INTERVAL = 10
# Rounds before anything is counted: what is compiled is so in the second, in which LNGD collects nothing.
WARMUP = INTERVAL


class Contender:
    """A model and its optimizer.

    Args:
        name: ``adamw`` or ``lngd``.
        backend: of torch.compile; none: it runs as it is.
    """

    def __init__(self, name: str, backend: str | None) -> None:
        torch.manual_seed(0)
        model: Any = marian(128, 512, 4, 2, VOCABULARY).train()
        every: dict[str, Any] = {"factor_interval": INTERVAL, "inverse_interval": INTERVAL}
        self.lngd = LNGD(model, lr=1e-3, **every) if name == "lngd" else None
        self.optimizer: torch.optim.Optimizer = self.lngd or torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
        self.call: Any = model if backend is None else torch.compile(model, backend=backend)
        self.seconds: dict[str, list[float]] = {"watched": [], "others": []}
        self.first = 0.0
        self.rest()

    def rest(self) -> None:
        """The other contenders' turn: what is compiled of them must run so."""
        if self.lngd is not None:
            self.lngd.eval()

    def step(self, batch: dict[str, Tensor], turn: int) -> None:
        """One training step."""
        if self.lngd is not None:
            self.lngd.train()
        start = time.perf_counter()
        self.call(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.call.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - start
        if turn < WARMUP:
            self.first = max(self.first, seconds)
        else:
            self.seconds["others" if turn % INTERVAL else "watched"].append(seconds)
        self.rest()


# Of a row: what the table calls it.
COLUMNS = {
    "optimizer": "optimizer",
    "compiled": "compiled",
    "watched": "factor steps, ms",
    "others": "others, ms",
    "mean": "mean, ms",
    "first_seconds": "first, s",
}


def measure(rounds: int, backend: str) -> list[dict[str, Any]]:
    """A row for each contender: milliseconds are medians; `first_seconds` is the longest uncounted step, with what was
    compiled in it. All are in one process: whoever comes second finds the forward compiled already."""
    contenders = {(name, way): Contender(name, way) for name in ("adamw", "lngd") for way in (None, backend)}
    draw, order = torch.Generator().manual_seed(0), list(contenders)
    for turn in range(WARMUP + rounds):
        tokens = torch.randint(3, VOCABULARY, (2, BATCH, TOKENS), generator=draw)
        batch = {"input_ids": tokens[0], "attention_mask": torch.ones_like(tokens[0]), "labels": tokens[1]}
        for key in order[turn % len(order) :] + order[: turn % len(order)]:
            contenders[key].step(batch, turn)
    rows = []
    for (name, way), contender in contenders.items():
        kinds = {kind: 1e3 * median(seconds) for kind, seconds in contender.seconds.items()}
        whole = [x for seconds in contender.seconds.values() for x in seconds]
        rows.append({"optimizer": name, "compiled": way, **{k: round(v, 2) for k, v in kinds.items()}})
        rows[-1] |= {"mean": round(1e3 * sum(whole) / len(whole), 2), "first_seconds": round(contender.first, 2)}
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=80, help="counted rounds, whole tens (default: %(default)s)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write")
    args = parser.parse_args(arguments)
    if args.rounds < INTERVAL:
        raise ValueError(f"--rounds: got {args.rounds}, accepted: at least {INTERVAL}, an interval of factors")
    torch.set_num_threads(1)
    rows = measure(args.rounds, args.backend)
    result = {"hardware": "CPU, 1 thread", "torch": torch.__version__, "rounds": args.rounds, "rows": rows}
    result["graphs"] = counters["stats"]["unique_graphs"]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    body = [[str(row[key]) for key in COLUMNS] for row in rows]
    print(table(list(COLUMNS.values()), body), f"\ngraphs: {result['graphs']}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
