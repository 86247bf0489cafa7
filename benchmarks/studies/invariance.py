"""How far apart one process and many end: the figures of docs/distributed.md.

    python -m benchmarks.studies.invariance
    python -m benchmarks.studies.invariance --model DIR --data DIR

Two tiny models train for 20 steps on the same batches, whatever the number of processes and of micro-batches, some of
them uneven. The tests of `tests/distributed/` bound the same distance. The results are
`benchmarks/results/invariance.json` and a table.

With `--model` (the folder of a pretrained translation model) and `--data` (of `train.json.gz`) it is trained for six
steps of 16 sentences, with AdamW and with LNGD, by one process and by two: few tokens a step, of which most gradients
of embeddings are zero, where rounding alone decides what an optimizer that scales its steps makes of them. LNGD's
matmuls are in float32 and in bfloat16, whatever this machine is good at. Into `invariance_pretrained.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from benchmarks.cost.processes import on_ranks
from benchmarks.report.tables import table
from benchmarks.studies import tiny
from benchmarks.studies.runs import hardware
from benchmarks.tasks.text import read_pairs
from benchmarks.tasks.translation import collate
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

# Of the pretrained model: (optimizer, LNGD's embedding, dtype of its matmuls)
PRETRAINED_CASES = [("adamw", "", "float32")]
PRETRAINED_CASES += [("lngd", e, dtype) for dtype in ("float32", "bfloat16") for e in ("exact", "fallback")]
PRETRAINED_STEPS, LR, MAX_TOKENS = 6, 1e-3, 64


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


class Bfloat16Matmuls(TorchDispatchMode):
    """Matmuls of bfloat16 in float32, rounded at the end, as the instructions for them do it; without such, torch's own
    take twenty times as long."""

    KINDS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of one operation."""
        if func in self.KINDS and args[0].dtype == torch.bfloat16:
            return func(*(arg.float() for arg in args), **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


def weights_of(model: nn.Module) -> Weights:
    """Copies of the trained parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tiny.Batch], ranks: int, accumulation: int
) -> tuple[Weights, Weights]:
    """A step a batch, cut into micro-batches of this layout: trained weights at the start and at the end."""
    start = weights_of(model)
    rank = dist.get_rank() if ranks > 1 else 0
    wrapped: Any = DistributedDataParallel(model) if ranks > 1 else model
    sizes = [size for own in sizes_of(ranks, accumulation) for size in own]
    for batch in batches:
        terms = (batch["labels"] != tiny.IGNORED).sum()
        mine = micro_batches(batch, sizes)[rank * accumulation : (rank + 1) * accumulation]
        for number, part in enumerate(mine):
            last = number == len(mine) - 1
            with nullcontext() if last or ranks == 1 else wrapped.no_sync():
                output = wrapped(**part)
                logits = output if isinstance(output, Tensor) else output.logits
                loss = F.cross_entropy(
                    logits.flatten(0, -2), part["labels"].flatten(), ignore_index=tiny.IGNORED, reduction="sum"
                )
                (loss * ranks / terms).backward()  # DDP divides gradients by the number of ranks
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(optimizer, LNGD):
        optimizer.close()
    return start, weights_of(model)


def train(
    kind: str, fields: dict[str, Any], dtype: str, ranks: int, accumulation: int, steps: int = STEPS
) -> tuple[Weights, Weights]:
    """Train a tiny model on the same batches whatever the layout."""
    precision = getattr(torch, dtype)
    model = make(kind, precision)
    optimizer = LNGD(model, lr=1e-3, **fields)
    # lengths differ from step to step
    batches = (
        tiny.sentences(step, ROWS, 7 + step % 3, 6 + step % 2) if kind == "marian" else tiny.images(step, ROWS)
        for step in range(steps)
    )
    return run(model, optimizer, (tiny.to(batch, precision) for batch in batches), ranks, accumulation)


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


def pretrained_batches(model: Path, data: Path, steps: int) -> list[tiny.Batch]:
    """The first sentences of the training text, ROWS a step."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    sources, targets = zip(*islice(read_pairs(data / "train.json.gz"), steps * ROWS), strict=True)
    limits = {"truncation": True, "max_length": MAX_TOKENS}
    encoded = zip(
        tokenizer(list(sources), **limits)["input_ids"],
        tokenizer(text_target=list(targets), **limits)["input_ids"],
        strict=True,
    )
    pairs = list(encoded)
    return [collate(pairs[start : start + ROWS]) for start in range(0, len(pairs), ROWS)]


def train_pretrained(folder: Path, data: Path, steps: int, ranks: int) -> list[tuple[Weights, Weights]]:
    """Of each of `PRETRAINED_CASES` the trained weights at the start and at the end; no dropout."""
    batches = pretrained_batches(folder, data, steps)
    found = []
    for name, embedding, dtype in PRETRAINED_CASES:
        none = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True, **none).train()
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(model.parameters(), lr=LR) if name == "adamw" else LNGD(model, lr=LR, embedding=embedding)
        )
        half = dtype == "bfloat16"
        with patch("hf_lngd.linalg.fast_bfloat16", return_value=half), Bfloat16Matmuls() if half else nullcontext():
            found.append(run(model, optimizer, batches, ranks, 1))
    return found


def pretrained_rows(folder: Path, data: Path, steps: int) -> list[dict[str, Any]]:
    """How far apart one process and two end, a row for each case."""
    one = train_pretrained(folder, data, steps, 1)
    two = on_ranks(2, train_pretrained, folder, data, steps, 2)[0]
    return [
        {"optimizer": name, "embedding": embedding, "matmuls": dtype, "distance": distance(many, end, start)}
        for (name, embedding, dtype), (start, end), (_, many) in zip(PRETRAINED_CASES, one, two, strict=True)
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a pretrained translation model, in place of tiny ones")
    parser.add_argument("--data", type=Path, help="folder of train.json.gz, for --model")
    parser.add_argument("--steps", type=int, default=PRETRAINED_STEPS, help="of --model (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="file to write (default: of what is measured)")
    args = parser.parse_args(arguments)
    if (args.model is None) != (args.data is None):
        raise ValueError("--model, --data: got one of them, accepted: both or none")
    torch.set_num_threads(1)
    if args.model is not None:
        rows = pretrained_rows(args.model, args.data, args.steps)
        head = ["optimizer", "embedding", "matmuls", "distance"]
        result: dict[str, Any] = {"steps": args.steps, "rows_a_step": ROWS, "lr": LR}
    else:
        rows = [
            {"model": kind, "settings": name, "dtype": dtype, "distance": worst(kind, fields, dtype)}
            for kind, name, fields, dtype in CASES
        ]
        head = ["model", "settings", "dtype", "greatest distance"]
        result = {"steps": STEPS, "layouts": LAYOUTS}
    path = args.results or RESULTS / ("invariance.json" if args.model is None else "invariance_pretrained.json")
    path.write_text(json.dumps(result | {"hardware": hardware(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(table(head, [[*list(map(str, row.values()))[:-1], f"{row['distance']:.1e}"] for row in rows]))


if __name__ == "__main__":
    main()
