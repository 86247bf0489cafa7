"""What LNGD sends between processes beside DDP's gradients: a cost model, and what a step's time goes to.

    python -m benchmarks.traffic

Bytes are those of the buffers that are handed to collectives, of one rank. Times are of one and of two processes on the
cores that this process may use. The results are `benchmarks/results/traffic.json` and a table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import MarianConfig, MarianMTModel

from benchmarks.tables import table
from hf_lngd import LNGD
from hf_lngd.checks import FACTOR_DTYPES
from hf_lngd.curvature.inverses import packed_shape
from hf_lngd.curvature.layers import factor_blocks
from hf_lngd.curvature.precision import kept_dtype

HERE = Path(__file__).resolve().parent
ROWS, TOKENS, STEPS = 16, 32, 40


def traffic(optimizer: LNGD) -> dict[str, int]:
    """Bytes of one rank after the first step: ``gradients`` (DDP's, each step), ``factors`` (each factor step),
    ``counts`` and ``rates`` (each step), ``inverses`` (of all groups, where they are spread)."""
    made, config = optimizer._preconditioner, optimizer.config
    assert made is not None
    layers, groups = optimizer._capture.layers, optimizer._capture.topology.groups
    matrices, numbers = 0, 2.0  # terms, and drawn terms
    for group in groups:
        members = [layers[name] for name in group.members]
        first, (k, b) = members[0], factor_blocks(members, config.max_factor_dim)
        estimated = group.estimates_psi(config.fisher)
        matrices += first.units * k * math.prod(packed_shape(b))
        numbers += first.units * first.out_features * estimated + 1 + 2
    dtype = torch.promote_types(next(iter(layers.values())).weight.dtype, torch.float32)
    size = dtype.itemsize
    adaptive = sum(4 * len(bank.layers) + 1 for bank in made.layer_banks) if config.rate == "adaptive" else 0
    tables = [modules[0] for _, modules in optimizer._routing.embeddings] if config.embedding == "exact" else []
    return {
        "gradients": sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"]),
        "factors": matrices * kept_dtype(config, dtype).itemsize + int(numbers) * size,
        "counts": sum(4 * module.num_embeddings for module in tables),
        "rates": adaptive * size,
        "inverses": sum(t.numel() * t.element_size() for bank in made.factor_banks for t in bank.results().values()),
    }


def marian() -> MarianMTModel:
    """Of width 128, two layers on each side."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 4000, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    return MarianMTModel(MarianConfig(**sizes, **heads, **tokens, max_position_embeddings=64)).train()


def measure(ranks: int) -> dict[str, float]:
    """Seconds of a settled step, of `optimizer.step()` in it, and of the collectives of that."""
    model = marian()
    optimizer = LNGD(model, early_factors=False)
    wrapped: Any = DistributedDataParallel(model) if ranks > 1 else model
    spent = {"step": 0.0, "optimizer": 0.0, "collectives": 0.0}
    pool = optimizer._ranks
    sums, gathers = pool.sum, pool.gather

    def timed(function: Any) -> Any:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            spent["collectives"] += time.perf_counter() - start
            return result

        return run

    pool.sum, pool.gather = timed(sums), timed(gathers)  # type: ignore[method-assign]
    draw = torch.Generator().manual_seed(dist.get_rank() if ranks > 1 else 0)
    for step in range(STEPS + 1):
        if step == 1:  # the first makes the state
            spent.update(dict.fromkeys(spent, 0.0))
        ids = torch.randint(2, 4000, (ROWS, TOKENS), generator=draw)
        start = time.perf_counter()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        spent["optimizer"] += time.perf_counter() - middle
        optimizer.zero_grad()
        spent["step"] += time.perf_counter() - start
    return {name: seconds / STEPS for name, seconds in spent.items()}


def main() -> None:
    """Measure and write."""
    from tests.dist_pool import DistPool

    torch.set_num_threads(1)
    found, state = {}, {}
    for kept in FACTOR_DTYPES:
        model = marian()
        optimizer = LNGD(model, factor_dtype=kept)
        ids = torch.randint(2, 4000, (2, TOKENS))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        found[kept], state[kept] = traffic(optimizer), optimizer.memory_usage()
    times = {"1": measure(1)}
    with tempfile.TemporaryDirectory() as folder:
        pool = DistPool(2, Path(folder), "benchmarks.traffic")
        both = pool.run(measure, ranks=2)
        times["2"] = {name: max(one[name] for one in both) for name in both[0]}
        pool.close()
    cores = len(os.sched_getaffinity(0))
    result = {"bytes": found, "state": state, "factor_interval": optimizer.config.factor_interval}
    result |= {"seconds": times, "cores": cores}
    path = HERE / "results" / "traffic.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    rows = [[name, *(str(sizes[name]) for sizes in found.values())] for name in found["full"]]
    rows += [[f"state: {name}", *(str(sizes[name]) for sizes in state.values())] for name in state["full"]]
    print(table(["what, bytes", *(f"factor_dtype={kept}" for kept in found)], rows))
    head = ["processes", "step, s", "optimizer.step(), s", "its collectives, s"]
    print(table(head, [[w, *(f"{v:.4f}" for v in t.values())] for w, t in times.items()]))


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()  # a wrong argument is named
    main()
