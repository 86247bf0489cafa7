"""LNGD on 1, 2 and 4 processes, under DDP and FSDP2: state of a rank, what it sends, matmuls and seconds of a step.

    python -m benchmarks.cost.parallel --layout ddp
    python -m benchmarks.cost.parallel --layout fsdp2

Counted: bytes of state; bytes of the buffers that a rank hands to collectives within `optimizer.step()`, so beside
DDP's gradients; floating-point operations of its matmuls. Timed: a settled step, on the cores that this process may
use. The results are `benchmarks/results/traffic.json` (DDP), `sharding.json` (FSDP2) and a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from transformers import MarianConfig, MarianMTModel

from benchmarks.cost.processes import on_ranks
from benchmarks.report.tables import table
from hf_lngd import LNGD

RESULTS = Path(__file__).resolve().parents[1] / "results"
FILES = {"ddp": "traffic.json", "fsdp2": "sharding.json"}
ROWS, TOKENS, STEPS, INTERVAL = 16, 32, 40, 20
# Of each collective the argument that holds what a rank hands over.
SENT = {
    "all_reduce": 0,
    "broadcast": 0,
    "all_gather_into_tensor": 1,
    "all_gather_single": 1,
    "all_to_all_single": 1,
    "reduce_scatter_tensor": 1,
    "reduce_scatter_single": 1,
}


def marian() -> MarianMTModel:
    """Of width 128, two layers on each side."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 4000, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    return MarianMTModel(MarianConfig(**sizes, **heads, **tokens, max_position_embeddings=64)).train()


@contextlib.contextmanager
def counted(clock: Callable[[], float] = time.perf_counter) -> Iterator[dict[str, float]]:
    """Within it, ``bytes`` that this rank hands to collectives and ``seconds`` of this clock in them."""
    spent = {"bytes": 0.0, "seconds": 0.0}

    def counting(name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            spent["bytes"] += args[SENT[name]].numel() * args[SENT[name]].element_size()
            start = clock()
            result = function(*args, **kwargs)
            spent["seconds"] += clock() - start
            return result

        return run

    with contextlib.ExitStack() as stack:
        for name in SENT:
            if hasattr(dist, name):
                stack.enter_context(patch.object(dist, name, counting(name, getattr(dist, name))))
        yield spent


def measure(layout: str, steps: int) -> dict[str, Any]:
    """On each rank: bytes of state by kind; bytes sent and matmul operations in a step with factors and in one without;
    median seconds of a step, of `optimizer.step()` in it, and of its collectives."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model = marian()
    optimizer = LNGD(model, factor_interval=INTERVAL, inverse_interval=INTERVAL)
    wrapped: Any = DistributedDataParallel(model) if layout == "ddp" and ranks > 1 else model
    if layout == "fsdp2" and ranks > 1:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    draw = torch.Generator().manual_seed(dist.get_rank() if ranks > 1 else 0)
    sent, flops, seconds = [], [], []
    for step in range(steps):
        ids = torch.randint(2, 4000, (ROWS, TOKENS), generator=draw)
        start = time.perf_counter()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        middle = time.perf_counter()
        # the counter makes a step slower: the first interval is counted, what comes then is timed
        counter = FlopCounterMode(display=False) if step < INTERVAL else contextlib.nullcontext()
        with counted() as spent, counter:
            optimizer.step()
        end = time.perf_counter()
        optimizer.zero_grad()
        sent.append(int(spent["bytes"]))
        if isinstance(counter, FlopCounterMode):
            flops.append(counter.get_total_flops())
        else:
            seconds.append((time.perf_counter() - start, end - middle, spent["seconds"]))
    return {
        "state": optimizer.memory_usage(),
        "factor_step": sent[0],
        "step": min(sent[1:]),
        "flops": {"factor_step": flops[0], "step": min(flops[1:])},
        "seconds": dict(zip(("step", "optimizer", "collectives"), map(median, zip(*seconds, strict=True)), strict=True))
        if seconds
        else {},
    }


def tables(ranks_of: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row for each number of ranks, of the rank that has or does most."""
    head = ["ranks", "largest state of a rank, bytes", "all ranks", "sent in a step", "with factors", "matmuls, GFLOP"]
    head += ["step, ms", "optimizer.step(), ms", "its collectives, ms"]
    rows = []
    for ranks, found in ranks_of.items():
        totals = [own["state"]["total"] for own in found]
        sent = [str(max(own[kind] for own in found)) for kind in ("step", "factor_step")]
        flops = max(own["flops"]["step"] for own in found) / 1e9
        times = [f"{1e3 * max(own['seconds'][kind] for own in found):.1f}" for kind in found[0]["seconds"]]
        rows.append([ranks, str(max(totals)), str(sum(totals)), *sent, f"{flops:.3f}", *(times or ["-"] * 3)])
    return table(head, rows)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layout", choices=list(FILES), default="ddp", help="default: %(default)s")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    text = f"the first {INTERVAL} are counted, the others timed (default: %(default)s)"
    parser.add_argument("--steps", type=int, default=STEPS, help=text)
    parser.add_argument("--results", type=Path, help="file to write (default: of the layout)")
    args = parser.parse_args(arguments)
    if args.steps < 2:
        raise ValueError(f"--steps: got {args.steps}, accepted: at least 2")
    if min(args.ranks) < 1:
        raise ValueError(f"--ranks: got {min(args.ranks)}, accepted: at least 1")
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {}
    for ranks in args.ranks:
        case = (args.layout, args.steps)
        found[str(ranks)] = [measure(*case)] if ranks == 1 else on_ranks(ranks, measure, *case)
    result = {"layout": args.layout, "cores": len(os.sched_getaffinity(0)), "ranks": found}
    path = args.results or RESULTS / FILES[args.layout]
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(found))


if __name__ == "__main__":
    main()
