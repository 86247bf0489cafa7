"""What `factor_dtype=bfloat16` does to factors and directions: errors beside full precision's, and bytes of state.

    python -m benchmarks.factor_dtype

The bundled Marian (d=128, 2+2 layers) trains on the bundled sentences with full factors. Beside it followers take over
its weights after each step, so see the same activations. Two keep their factors in bfloat16: one rounds averages at
random (what LNGD does), one to the nearest. The third makes a step's products in bfloat16, which is the default. At the
end all are asked for the direction of one gradient. The result is `benchmarks/results/factor_dtype.json` and a table.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from benchmarks.tables import table
from hf_lngd import LNGD
from hf_lngd.curvature import factor_bank

HERE = Path(__file__).resolve().parent
SAMPLE = HERE.parent / "examples" / "data" / "tatoeba-en-de"
STEPS, ROWS = 60, 32
INTERVALS: dict[str, Any] = {"factor_interval": 2, "inverse_interval": 2, "stagger": False, "matrix_dtype": "full"}
SETTINGS: dict[str, dict[str, Any]] = {
    "fast": {},
    "fast, damping_rho=0.3": {"damping_rho": 0.3},
    "direction=gram": {"direction": "gram"},
    "direction=natural": {"direction": "natural"},
    "family=kfac": {"family": "kfac"},
    "family=tkfac": {"family": "tkfac"},
    "family=ng+": {"family": "ng+"},
}
RANDOM, NEAREST, PRODUCTS = "at random", "to the nearest", "products in bfloat16, factors full"


def batches() -> Iterator[dict[str, Tensor]]:
    """The sentences in the order of the file, `ROWS` at a time."""
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "tokenizer")
    with gzip.open(SAMPLE / "train.json.gz", "rt", encoding="utf-8") as lines:
        while pairs := [json.loads(line)["translation"] for line in itertools.islice(lines, ROWS)]:
            texts, targets = [pair["en"] for pair in pairs], [pair["de"] for pair in pairs]
            batch = tokenizer(texts, text_target=targets, padding=True, return_tensors="pt")
            labels = batch["labels"].masked_fill(batch["labels"] == tokenizer.pad_token_id, -100)
            yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def make(**fields: Any) -> tuple[Any, LNGD]:
    """The bundled model without dropout, and its optimizer."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(SAMPLE / "model")
    config.dropout = 0.0
    model = AutoModelForSeq2SeqLM.from_config(config).train()
    return model, LNGD(model, lr=3e-3, **{**INTERVALS, **fields})


def directions(model: Any, optimizer: LNGD, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Φ, or what the family has in its place, and D of the batch's gradient, by layer."""
    model.zero_grad()
    optimizer.eval()
    model(**batch).loss.backward()
    made: Any = optimizer._preconditioner
    found: dict[str, Tensor] = {}
    for bank in made.layer_banks:
        everyone = list(range(len(bank.layers)))
        grad = torch.cat([layer.gradient(bank.momentum.dtype) for layer in bank.layers])
        moved = bank.direction(grad, everyone, slice(None), STEPS).detach()
        found |= {layer.name: d for layer, d in zip(bank.layers, moved.split(bank.units), strict=True)}
    factors: dict[str, Tensor] = {}
    for name in found:
        own = optimizer.factors(name)
        factors |= {f"{name}.{kind}": value for kind, value in own.items() if value.dim() > 1}
    return factors, found


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """‖x − y‖ / ‖y‖ over layers: the greatest and the median."""
    gaps = [float((found[name] - value).norm() / value.norm()) for name, value in expected.items()]
    return {"greatest": max(gaps), "median": statistics.median(gaps)}


def measure(fields: dict[str, Any]) -> dict[str, Any]:
    """Errors of one setting's followers, inverses that failed, bytes of running factors and of the whole state."""
    model, leader = make(**fields)
    halved = {**fields, "factor_dtype": "bfloat16"}
    followers = {
        RANDOM: make(**halved),
        NEAREST: make(**halved),
        PRODUCTS: make(**{**fields, "matrix_dtype": "bfloat16"}),
    }
    source = batches()
    for batch in itertools.islice(source, STEPS):
        model(**batch).loss.backward()
        leader.step()
        leader.zero_grad()
        for how, (other, optimizer) in followers.items():
            other(**batch).loss.backward()
            nearest = patch.object(factor_bank, "round_at_random", lambda value, _: value)
            with nearest if how == NEAREST else contextlib.nullcontext():
                optimizer.step()
            optimizer.zero_grad()
            other.load_state_dict(model.state_dict())
    batch = next(source)
    factors, moved = directions(model, leader, batch)
    result: dict[str, Any] = {}
    for how, (other, optimizer) in followers.items():
        own_factors, own_moved = directions(other, optimizer, batch)
        usage, numbers = optimizer.memory_usage(), optimizer.diagnostics()
        result[how] = {
            "factors": errors(own_factors, factors),
            "direction": errors(own_moved, moved),
            "failed_inverses": numbers["failed_inverses"],
            "bytes": {kind: usage[kind] for kind in ("factors", "total")},
        }
    return result


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    rows = {name: measure(fields) for name, fields in SETTINGS.items()}
    path = HERE / "results" / "factor_dtype.json"
    path.write_text(json.dumps({"steps": STEPS, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    head = ["settings", "rounded", "factors: greatest", "median", "direction: greatest", "median", "failed inverses"]
    lines = []
    for name, row in rows.items():
        for how, own in row.items():
            values = [own[kind][size] for kind in ("factors", "direction") for size in ("greatest", "median")]
            lines.append([name, how, *(f"{value:.1e}" for value in values), f"{own['failed_inverses']:.0f}"])
    print(table(head, lines))


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()  # a wrong argument is named
    main()
