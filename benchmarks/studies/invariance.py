"""How far apart one process and many end: the figures of the README's part on many processes.

    python -m benchmarks.studies.invariance

Two tiny models train for 20 steps on the same batches, whatever the number of processes and of micro-batches, some of
them uneven. The tests of `tests/distributed/` bound the same distance. The results are
`benchmarks/results/invariance.json` and a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.cost.processes import on_ranks
from benchmarks.report.tables import table
from benchmarks.studies import tiny
from benchmarks.studies.runs import hardware
from hf_lngd import LNGD

RESULTS = Path(__file__).resolve().parents[1] / "results"
LAYOUTS = [(ranks, accumulation) for ranks in (1, 2, 4) for accumulation in (1, 2, 4)][1:]
STEPS, ROWS = 20, 16
PAPER: dict[str, Any] = {"preset": "paper", "fisher": "expected", "factor_interval": 5, "inverse_interval": 5}
# (model, settings' name, settings, dtype); in float32 the matmuls of a step are in what the machine is good at
CASES: list[tuple[str, str, dict[str, Any], str]] = [
    (kind, name, fields, dtype)
    for kind in ("marian", "images")
    for name, fields in (("fast", {}), ("paper, expected", PAPER))
    for dtype in ("float64", "float32")
]
# Marian's own 0.02 leaves attention all but even: the gradients of queries and keys are then differences of near
# equals, and their rounding, which every optimizer that scales its steps blows up, a thousand times as large.
MARIAN: dict[str, Any] = {"init_std": 0.25, "encoder_layers": 1, "decoder_layers": 1}
Weights = dict[str, Tensor]


def make(kind: str, dtype: torch.dtype) -> nn.Module:
    """A model. Keys' biases, whose gradient is zero but for rounding, are frozen."""
    model = tiny.marian(**MARIAN) if kind == "marian" else tiny.Convolutions()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not name.endswith("k_proj.bias"))
    return model.to(dtype)


def sizes_of(ranks: int, accumulation: int) -> list[list[int]]:
    """Rows of the micro-batches by rank; with two micro-batches uneven ones."""
    if accumulation != 2:
        return [[ROWS // (ranks * accumulation)] * accumulation for _ in range(ranks)]
    sizes = [[1 + (rank + part) % 2 for part in range(accumulation)] for rank in range(ranks)]
    sizes[-1][-1] += ROWS - sum(map(sum, sizes))
    return sizes


def micro_batches(batch: tiny.Batch, sizes: list[int]) -> list[tiny.Batch]:
    """Rows as they come, cut into these sizes; a part loses what is padding in all of its rows."""
    pieces = zip(*(value.split(sizes) for value in batch.values()), strict=True)
    parts = [dict(zip(batch, piece, strict=True)) for piece in pieces]
    for part in parts:
        if "attention_mask" in part:
            length = int(part["attention_mask"].sum(1).max())
            target = int((part["labels"] != tiny.IGNORED).sum(1).max())
            part |= {name: part[name][:, :length] for name in ("input_ids", "attention_mask")}
            part["labels"] = part["labels"][:, :target].contiguous()
    return parts


def train(
    kind: str, fields: dict[str, Any], dtype: str, ranks: int, accumulation: int, steps: int = STEPS
) -> tuple[Weights, Weights]:
    """Train on the same batches whatever the layout: trained weights at the start and at the end."""
    precision = getattr(torch, dtype)
    rank = dist.get_rank() if ranks > 1 else 0
    model = make(kind, precision)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = LNGD(model, lr=1e-3, **fields)
    wrapped: Any = DistributedDataParallel(model) if ranks > 1 else model
    sizes = sizes_of(ranks, accumulation)
    for step in range(steps):
        # lengths differ from step to step
        batch = tiny.sentences(step, ROWS, 7 + step % 3, 6 + step % 2) if kind == "marian" else tiny.images(step, ROWS)
        batch = tiny.to(batch, precision)
        terms = (batch["labels"] != tiny.IGNORED).sum()
        parts = micro_batches(batch, [size for own in sizes for size in own])
        mine = parts[rank * accumulation : (rank + 1) * accumulation]
        for number, part in enumerate(mine):
            last = number == len(mine) - 1
            with contextlib.nullcontext() if last or ranks == 1 else wrapped.no_sync():
                output = wrapped(**part)
                logits = output if isinstance(output, Tensor) else output.logits
                loss = F.cross_entropy(
                    logits.flatten(0, -2), part["labels"].flatten(), ignore_index=tiny.IGNORED, reduction="sum"
                )
                (loss * ranks / terms).backward()  # DDP divides gradients by the number of ranks
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    return start, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def distance(found: Weights, expected: Weights, start: Weights) -> float:
    """‖θ − θ₁‖ / ‖θ₁ − θ₀‖ over all trained parameters; θ₀ is where both began."""
    gap = sum(float((found[name] - value).double().square().sum()) for name, value in expected.items())
    way = sum(float((value - start[name]).double().square().sum()) for name, value in expected.items())
    return (gap / way) ** 0.5


def worst(kind: str, fields: dict[str, Any], dtype: str, steps: int = STEPS) -> float:
    """The greatest distance to one process over all layouts."""
    start, one = train(kind, fields, dtype, 1, 1, steps)
    found = []
    for ranks, accumulation in LAYOUTS:
        case = (kind, fields, dtype, ranks, accumulation, steps)
        _, many = train(*case) if ranks == 1 else on_ranks(ranks, train, *case)[0]
        found.append(distance(many, one, start))
    return max(found)


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = [
        {"model": kind, "settings": name, "dtype": dtype, "distance": worst(kind, fields, dtype)}
        for kind, name, fields, dtype in CASES
    ]
    result = {"steps": STEPS, "layouts": LAYOUTS, "hardware": hardware(), "rows": rows}
    (RESULTS / "invariance.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    head = ["model", "settings", "dtype", "greatest distance"]
    print(table(head, [[r["model"], r["settings"], r["dtype"], f"{r['distance']:.1e}"] for r in rows]))


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()  # a wrong argument is named
    main()
