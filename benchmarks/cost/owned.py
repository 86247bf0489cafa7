"""What a rank keeps and does under DDP in the layouts *whole* and *owned*, on 1, 2 and 4 processes.

    python -m benchmarks.cost.owned

Of a Marian (d=256, 3+3 layers), in the rank that has or does most: bytes of the layers' state (momentum, factors,
inverses), operations of the matmuls of `optimizer.step()` as torch counts them, bytes that it hands to collectives
there (beside DDP's gradients), and the process's own seconds, of the step and of its collectives. The batch is small,
which changes nothing in `optimizer.step()`. The results are `benchmarks/results/owned.json` and a table, with what
`layout="auto"` chooses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost import cases
from benchmarks.cost.parallel import counted
from benchmarks.cost.processes import on_ranks
from benchmarks.report.tables import table
from benchmarks.studies.runs import hardware
from hf_lngd import LNGD
from hf_lngd.parallel.layout import owned_pays

RESULTS = Path(__file__).resolve().parents[1] / "results" / "owned.json"
LAYOUTS = ("whole", "owned")
ROWS, TOKENS = 2, 8
COUNTED = 2  # a step with factors and one without; those that come then are timed: counting slows a step down


def measure(layout: str, steps: int) -> dict[str, Any]:
    """On each rank; `steps` are timed."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model, _ = cases.make("marian")
    optimizer = LNGD(model, layout=layout)
    wrapped: Any = DistributedDataParallel(model) if ranks > 1 else model
    draw = torch.Generator().manual_seed(dist.get_rank() if ranks > 1 else 0)
    flops, sent, seconds = [], [], []
    for step in range(COUNTED + steps):
        ids = torch.randint(3, 8_000, (ROWS, TOKENS), generator=draw)
        wrapped(input_ids=ids, labels=ids).loss.backward()
        counter = FlopCounterMode(display=False) if step < COUNTED else contextlib.nullcontext()
        with counted(time.process_time) as spent, counter:
            start = time.process_time()
            optimizer.step()
            own = time.process_time() - start
        optimizer.zero_grad()
        sent.append(int(spent["bytes"]))
        if isinstance(counter, FlopCounterMode):
            flops.append(counter.get_total_flops())
        else:
            seconds.append((own, spent["seconds"]))
    usage = optimizer.memory_usage()
    optimizer.close()
    step_seconds, collectives = map(median, zip(*seconds, strict=True))
    return {
        "state": sum(usage[kind] for kind in ("momentum", "factors", "inverses")),
        "flops": min(flops),
        "sent": min(sent),
        "sent_with_factors": sent[0],
        "seconds": round(step_seconds, 4),
        "collective_seconds": round(collectives, 4),
    }


def row_of(layout: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """The greatest of each over ranks."""
    return {"ranks": len(found), "layout": layout} | {key: max(own[key] for own in found) for key in found[0]}


def rows_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["processes", "layout", "state of layers, MB", "matmuls, GFLOP", "sent, MB", "with factors, MB"]
    head += ["optimizer.step(), s", "its collectives, s"]
    body = [
        [str(row["ranks"]), row["layout"], f"{row['state'] / 1e6:.1f}", f"{row['flops'] / 1e9:.1f}"]
        + [f"{row[key] / 1e6:.1f}" for key in ("sent", "sent_with_factors")]
        + [f"{row[key]:.3f}" for key in ("seconds", "collective_seconds")]
        for row in rows
    ]
    return table(head, body)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.steps < 1 or min(args.ranks) < 1:
        raise ValueError("--steps, --ranks: accepted: at least 1")
    torch.set_num_threads(1)
    rows = []
    for ranks in args.ranks:
        for layout in LAYOUTS:
            case = (layout, args.steps)
            rows.append(row_of(layout, [measure(*case)] if ranks == 1 else on_ranks(ranks, measure, *case)))
    optimizer = LNGD(cases.small())
    layers = optimizer.core.routing.layers
    auto = {str(ranks): "owned" if owned_pays(layers, ranks) else "whole" for ranks in args.ranks}
    optimizer.close()
    result = {"hardware": hardware(), "clock": "cpu", "torch": torch.__version__, "auto": auto, "rows": rows}
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(rows_table(rows))
    print("auto:", ", ".join(f"{layout} on {ranks}" for ranks, layout in auto.items()))


if __name__ == "__main__":
    main()
