"""Predicts what a step costs and checks it against measured steps; then applies it to models that do not fit here.

    python -m benchmarks.cost.check               # micro-benchmarks, measured steps, predictions: about ten minutes
    python -m benchmarks.cost.check --large-only  # keep the measured part of the file

Measured is the optimizer's part of a step, one thread: `optimizer.step()` over a whole interval (every kind of step
once or more, medians over rounds), plus what a factor step adds to the forward pass, with caches emptied in between.
No constant is fitted: operations as written in `model.py`, seconds as in `calibration.py`. Products of LNGD are taken
to be in bfloat16, so measure on a machine that has instructions for it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.cost import cases
from benchmarks.cost import model as cost_model
from benchmarks.cost.calibration import Measured, flush
from benchmarks.cost.report import draw, large_rows, tables
from benchmarks.studies.rivals import Settings, Together, adamw, muon
from hf_lngd import LNGD, LNGDConfig

RESULTS = Path(__file__).resolve().parents[1] / "results" / "cost_model.json"
INTERVAL = 10  # short, so that seldom work is a large part of what is checked
SETTLED: dict[str, Any] = {"factor_interval": INTERVAL, "inverse_interval": INTERVAL}
CONFIGS: dict[str, dict[str, Any]] = {
    "lngd fast": SETTLED,
    "lngd natural": {**SETTLED, "direction": "natural"},
    "lngd paper": {**SETTLED, "preset": "paper"},
}
Batch = dict[str, torch.Tensor]


class Mlp(nn.Module):
    """A classifier that returns its loss as transformers' models do."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for d, m in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(d, m), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> Any:
        """The mean cross entropy, as `.loss`."""
        from types import SimpleNamespace

        logits = self.layers(pixel_values)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def text_batch(rows: int, tokens: int, vocabulary: int) -> Batch:
    """Random tokens, nothing padded."""
    ids = torch.randint(3, vocabulary, (2, rows, tokens))
    return {"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0]), "labels": ids[1]}


def image_batch(rows: int, *shape: int) -> Batch:
    """Random images."""
    return {"pixel_values": torch.randn(rows, *shape), "labels": torch.randint(0, 10, (rows,))}


def _vit(width: int, layers: int, patch: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * width,
                  image_size=32, patch_size=patch, num_labels=10)
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "Marian d=128, 2+2": (lambda: cases.marian(128, 512, 4, 2, 4_000), lambda: text_batch(64, 16, 4_000)),
    "ViT d=128, 3": (lambda: _vit(128, 3, 8), lambda: image_batch(128, 3, 32, 32)),
    "ViT d=256, 4": (lambda: _vit(256, 4, 8), lambda: image_batch(64, 3, 32, 32)),
    "ResNet 32-64-128": (lambda: cases.make_resnet(0), lambda: image_batch(64, 3, 32, 32)),
    "MLP 784-512-512-10": (lambda: Mlp((784, 512, 512, 10)), lambda: image_batch(256, 784)),
    "MLP 256-1024-1024-10": (lambda: Mlp((256, 1024, 1024, 10)), lambda: image_batch(256, 256)),
    "Marian d=256, 3+3": (cases.small, lambda: text_batch(16, 32, 8_000)),
}


def make(name: str, model: nn.Module) -> Together:
    """A contender's optimizer."""
    rates = Settings(1e-4, 1e-4)
    if name in CONFIGS:
        return Together([LNGD(model, LNGDConfig(**CONFIGS[name]), lr=1e-4)])
    return {"adamw": adamw, "muon": muon}[name](model, rates)


def measure(name: str, model: nn.Module, batch: Batch, rounds: int) -> float:
    """Mean seconds of the optimizer's part of a step, in settled training."""
    optimizer = make(name, model)
    buffer = torch.zeros(2**24)
    own = optimizer.optimizers[0]
    interval = INTERVAL if isinstance(own, LNGD) else 1
    each_step = isinstance(own, LNGD) and own.config.rate == "adaptive"  # needs the gradients of every step's forward
    forwards: dict[bool, list[float]] = {True: [], False: []}
    steps: list[list[float]] = [[] for _ in range(interval)]
    for turn in range((rounds + 1) * interval):
        armed = isinstance(own, LNGD) and turn % interval == 0
        if turn == 0 or each_step or armed or (isinstance(own, LNGD) and turn % interval in (1, 2, 3)):
            start = time.thread_time()
            loss = model(**batch).loss
            if turn >= interval:
                forwards[armed].append(time.thread_time() - start)
            if turn == 0 or each_step or armed:
                model.zero_grad()
                loss.backward()
            del loss
        flush(buffer)
        start = time.thread_time()
        optimizer.step()
        if turn >= interval:
            steps[turn % interval].append(time.thread_time() - start)
    optimizer.close()
    mean = sum(median(found) for found in steps) / interval
    if forwards[True]:
        mean += max(0.0, median(forwards[True]) - median(forwards[False])) / interval
    return mean


def predict(name: str, inventory: cost_model.Inventory) -> list[cost_model.Op]:
    """The contender's operations of a mean step."""
    if name == "adamw":
        return cost_model.adamw_ops(inventory.parameters)
    if name == "muon":
        return cost_model.muon_ops(inventory.matrices, inventory.others)
    return cost_model.lngd_ops(inventory, masked=False)


def check_rows(names: list[str], rounds: int, machine: Measured) -> list[dict[str, Any]]:
    """Measured beside predicted, a row a model and optimizer."""
    rows = []
    for model_name in names:
        build, feed = MODELS[model_name]
        for name in ("adamw", "muon", *CONFIGS):
            torch.manual_seed(0)
            config = LNGDConfig(**CONFIGS.get(name, SETTLED))
            inventory = cost_model.take_inventory(build(), feed(), config)
            ops = predict(name, inventory)
            predicted = cost_model.total_seconds(ops, machine)
            measured = measure(name, build().train(), feed(), rounds)
            parts: dict[str, float] = {}
            for op in ops:
                parts[op.kind] = parts.get(op.kind, 0.0) + machine.seconds(op) * op.times
            rows.append(
                {
                    "model": model_name,
                    "optimizer": name,
                    "parameters": sum(inventory.parameters),
                    "measured_ms": round(1e3 * measured, 3),
                    "predicted_ms": round(1e3 * predicted, 3),
                    "ratio": round(predicted / measured, 3),
                    "gflop": round(sum(op.flops for op in ops) / 1e9, 4),
                    "traffic_mb": round(sum(op.bytes for op in ops) / 1e6, 2),
                    "predicted_ms_by_kind": {kind: round(1e3 * value, 3) for kind, value in parts.items()},
                }
            )
            print(f"{model_name}, {name}: {rows[-1]['ratio']:.2f}", flush=True)
    return rows


def write(path: Path, result: dict[str, Any]) -> None:
    """The JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Calibrates, measures, predicts, writes the JSON file, the tables and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="intervals that are measured (default: %(default)s)")
    parser.add_argument("--large-only", action="store_true", help="leave the measurements of the file as they are")
    parser.add_argument("--large", nargs="*", help="which large models (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        raise ValueError(f"--rounds: got {args.rounds}, accepted: at least 1")
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    if args.large_only:
        result = json.loads(args.results.read_text(encoding="utf-8"))
    else:
        machine = Measured()
        result |= {"check": [], "large": {"rows": []}}
        for name in args.models:
            result["check"] += check_rows([name], args.rounds, machine)
            result["calibration"] = machine.to_dict()
            write(args.results, result)  # what was measured stays, whatever happens next
    result["large"] = large_rows(args.large)
    write(args.results, result)
    args.results.with_suffix(".md").write_text(tables(result), encoding="utf-8")
    draw(result, args.results.with_suffix(".png"))
    print(tables(result))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
