"""LNGD under FSDP2: what a rank keeps of the optimizer's state, and what it sends in a step, on 1, 2 and 4 ranks.

    python -m benchmarks.sharding

Counted, not timed: bytes of state, and of the buffers that a rank hands to collectives within `optimizer.step()`. The
result is `benchmarks/results/sharding.json` and a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from benchmarks.tables import table
from benchmarks.traffic import TOKENS, marian
from hf_lngd import LNGD

HERE = Path(__file__).resolve().parent
# Of each collective the argument that holds what a rank hands over.
_SENT = {"all_to_all_single": 1, "reduce_scatter_single": 1, "all_reduce": 0, "all_gather_single": 1}


def measure() -> dict[str, Any]:
    """On each rank: bytes of state by kind, and sent in a step with factors and in one without."""
    from torch.distributed.fsdp import fully_shard

    model = marian()
    optimizer = LNGD(model, early_factors=False)
    fully_shard(model)
    sent: list[int] = []

    def counting(name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            buffer = args[_SENT[name]]
            sent[-1] += buffer.numel() * buffer.element_size()
            return function(*args, **kwargs)

        return run

    for step in range(2):
        ids = torch.randint(2, 4000, (2, TOKENS), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        sent.append(0)
        with contextlib.ExitStack() as stack:
            for name in _SENT:
                stack.enter_context(patch.object(dist, name, counting(name, getattr(dist, name))))
            optimizer.step()
        optimizer.zero_grad()
    return {"state": optimizer.memory_usage(), "factor_step": sent[0], "step": sent[1]}


def main() -> None:
    """Measure and write."""
    from tests.dist_pool import DistPool

    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for ranks in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            pool = DistPool(ranks, Path(folder), "benchmarks.sharding")
            result[str(ranks)] = pool.run(measure)
            pool.close()
    path = HERE / "results" / "sharding.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    head = ["ranks", "largest state of a rank, bytes", "all ranks", "sent in a step", "with factors"]
    rows = []
    for ranks_, found in result.items():
        totals = [own["state"]["total"] for own in found]
        sent = [str(max(own[kind] for own in found)) for kind in ("step", "factor_step")]
        rows.append([ranks_, str(max(totals)), str(sum(totals)), *sent])
    print(table(head, rows))


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()  # a wrong argument is named
    main()
