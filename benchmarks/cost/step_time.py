"""What a step of LNGD costs beside AdamW's and Muon's, in time and in memory.

    python -m benchmarks.cost.step_time
    python -m benchmarks.cost.step_time --model resnet

Time: a Marian (d=256, 3+3 layers) on batches of 64 × 32 random tokens, or the ResNet of the CIFAR-10 task on batches of
128 random images. Every contender has a model of its own; each round takes one step of every contender, the first one
another each round, and costs are compared within rounds, so that what else the machine does meets all of them. Whole
intervals are measured, so the seldom work (factors, inverses) counts.

Memory: optimizer state beside AdamW's, for that model and for a Transformer-big, the latter on the meta device.
The results are `benchmarks/results/step_time.json`, `step_time_resnet.json` and tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import MarianConfig, MarianMTModel

from benchmarks.report.tables import table
from benchmarks.studies.rivals import Settings, Together, adamw, muon, split
from benchmarks.tasks.cifar10 import make_resnet as small_resnet
from hf_lngd import LNGD

RESULTS = Path(__file__).resolve().parents[1] / "results"
BATCH, TOKENS, IMAGES = 64, 32, 128
RATES = Settings(1e-3, 1e-3)
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "adamw": None,
    "muon": None,
    "natural, interval 20": {"direction": "natural", "factor_interval": 20, "inverse_interval": 20},
    "natural, interval 100": {"direction": "natural", "factor_interval": 100, "inverse_interval": 100},
    "fast": {},
}
IMAGE_CONTENDERS = {name: CONTENDERS[name] for name in ("adamw", "muon", "fast")}
# (contender, what it is compared with, whole step or optimizer.step(), the ratio to stay below)
Target = tuple[str, str, str, float | None]
TARGETS: list[Target] = [
    ("natural, interval 20", "adamw", "step", 1.08),
    ("natural, interval 100", "adamw", "step", 1.05),
    ("fast", "adamw", "step", None),
    ("fast", "muon", "step", None),
    ("fast", "muon", "optimizer", None),
]
IMAGE_TARGETS: list[Target] = [
    ("fast", "adamw", "step", 1.10),
    ("fast", "muon", "step", None),
    ("fast", "muon", "optimizer", None),
]
MEMORY_TARGET = 1.1


def marian(width: int, ffn: int, heads: int, layers: int, vocabulary: int) -> nn.Module:
    """A Marian with its weights; eager attention, which the meta device can run too."""
    config = MarianConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        activation_function="relu",
        dropout=0.1,
        init_std=width**-0.5,
        scale_embedding=True,
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_id=1,
        forced_eos_token_id=None,
    )
    return MarianMTModel._from_config(config, attn_implementation="eager" if torch.empty(0).is_meta else "sdpa")


def small() -> nn.Module:
    """The model whose steps are timed (7.6 million parameters)."""
    return marian(256, 1024, 4, 3, 8_000)


def transformer_big() -> nn.Module:
    """Transformer-big (209 million parameters)."""
    return marian(1024, 4096, 16, 6, 32_000)


def make(name: str, model: nn.Module) -> Together:
    """A contender's optimizer."""
    fields = CONTENDERS[name]
    if fields is None:
        return {"adamw": adamw, "muon": muon}[name](model, RATES)
    return Together([LNGD(model, lr=RATES.lr, **fields)])


@dataclass
class Contender:
    """A model, its optimizer and the seconds of its steps."""

    model: nn.Module
    optimizer: Together
    step: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    def run(self, batch: dict[str, Tensor]) -> None:
        """One training step: whole seconds to `step`, those of `optimizer.step()` to `update`."""
        start = time.perf_counter()
        self.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        middle = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        self.optimizer.zero_grad()
        self.update.append(end - middle)
        self.step.append(time.perf_counter() - start)

    def seconds(self, which: str) -> list[float]:
        """Of the whole steps ("step") or of the optimizer alone ("optimizer")."""
        return self.step if which == "step" else self.update


def sentences(generator: torch.Generator) -> dict[str, Tensor]:
    """A batch for the Marian."""
    tokens = torch.randint(3, 8_000, (2, BATCH, TOKENS), generator=generator)
    return {"input_ids": tokens[0], "attention_mask": torch.ones_like(tokens[0]), "labels": tokens[1]}


def images(generator: torch.Generator) -> dict[str, Tensor]:
    """A batch for the ResNet."""
    labels = torch.randint(0, 10, (IMAGES,), generator=generator)
    return {"pixel_values": torch.randn(IMAGES, 3, 32, 32, generator=generator), "labels": labels}


def time_steps(rounds: int, warmup: int, model_name: str) -> dict[str, Contender]:
    """Rounds of one step each of every contender; the warm-up rounds are not counted."""
    generator = torch.Generator().manual_seed(0)
    contenders = {}
    for name in CONTENDERS if model_name == "marian" else IMAGE_CONTENDERS:
        torch.manual_seed(0)
        model = (small() if model_name == "marian" else small_resnet(0)).train()
        contenders[name] = Contender(model, make(name, model))
    names = list(contenders)
    for turn in tqdm(range(warmup + rounds), unit="round"):
        batch = (sentences if model_name == "marian" else images)(generator)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            contenders[name].run(batch)
        if turn == warmup - 1:
            for contender in contenders.values():
                contender.step.clear()
                contender.update.clear()
    for contender in contenders.values():
        contender.optimizer.close()
    return contenders


def compare(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ratio of mean seconds, its standard error from the paired differences, and the ratio of medians."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = stdev(differences) / len(differences) ** 0.5 / mean(theirs)
    return {
        "ratio": round(mean(ours) / mean(theirs), 4),
        "standard_error": round(error, 4),
        "ratio_of_medians": round(median(ours) / median(theirs), 4),
    }


def timing_rows(contenders: dict[str, Contender], targets: list[Target]) -> list[dict[str, Any]]:
    """One row a comparison."""
    rows = []
    for name, reference, which, target in targets:
        ours, theirs = contenders[name].seconds(which), contenders[reference].seconds(which)
        rows.append(
            {
                "optimizer": name,
                "reference": reference,
                "what": "whole step" if which == "step" else "optimizer.step()",
                "milliseconds": round(1e3 * mean(ours), 2),
                "reference_milliseconds": round(1e3 * mean(theirs), 2),
                **compare(ours, theirs),
                "target": target,
            }
        )
    return rows


def memory_row(name: str, model_name: str, device: str) -> dict[str, Any]:
    """Bytes of LNGD's state after five steps beside AdamW's two moments a parameter."""
    with torch.device(device):
        model = transformer_big() if model_name == "Transformer-big" else small()
        fields = CONTENDERS[name]
        assert fields is not None
        optimizer = LNGD(model, lr=RATES.lr, **fields)
        # embeddings may have a rule of their own
        own = {r.parameter for r in optimizer.routing() if r.owner == "lngd" or r.reason.startswith("embedding, ")}
        rest = [p for key, p in model.named_parameters() if p.requires_grad and key not in own]
        tokens = torch.ones(2, 8, dtype=torch.long)
        for _ in range(5):
            model(input_ids=tokens, labels=tokens).loss.backward()
            for parameter in rest:  # AdamW's arithmetic does not run on the meta device: its state is added below
                parameter.grad = None
            optimizer.step()
    moments = 2 * sum(p.numel() * p.element_size() for p in rest)
    trained = [p for group in split(model) for p in group]
    reference = 2 * sum(p.numel() * p.element_size() for p in trained)
    usage = optimizer.memory_usage()
    kinds = {key: value for key, value in usage.items() if key != "total"}
    kinds["fallback"] = kinds.get("fallback", 0) + moments
    total = sum(kinds.values())
    optimizer.close()
    return {
        "model": model_name,
        "parameters": sum(p.numel() for p in trained),
        "optimizer": name,
        "bytes": total,
        "kinds": kinds,
        "adamw_bytes": reference,
        "ratio": round(total / reference, 4),
        "target": MEMORY_TARGET,
    }


def tables(result: dict[str, Any]) -> str:
    """Both tables, in Markdown."""

    def verdict(row: dict[str, Any]) -> list[str]:
        if row["target"] is None:
            return ["–", ""]
        return [f"≤ {row['target']}", "yes" if row["ratio"] <= row["target"] else "no"]

    timings = [
        [
            row["optimizer"],
            row["reference"],
            row["what"],
            f"{row['milliseconds']:.1f}",
            f"{row['reference_milliseconds']:.1f}",
            f"{row['ratio']:.3f} ± {row['standard_error']:.3f}",
            *verdict(row),
        ]
        for row in result["timings"]
    ]
    memory = [
        [
            row["model"],
            row["optimizer"],
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['adamw_bytes'] / 2**20:.1f}",
            f"{row['ratio']:.3f}",
            *verdict(row),
        ]
        for row in result["memory"]
    ]
    timing_table = table(["optimizer", "beside", "what", "ms", "its ms", "ratio", "target", "met"], timings)
    if not memory:
        return timing_table
    return (
        timing_table
        + "\n"
        + table(["model", "optimizer", "state, MiB", "AdamW's, MiB", "ratio", "target", "met"], memory)
    )


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes the JSON file and prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["marian", "resnet"], default="marian", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=100, help="counted rounds, whole hundreds (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not counted (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument("--memory-only", action="store_true", help="leave the timings of the file as they are")
    parser.add_argument("--results", type=Path, help="file to write (default: of the model)")
    args = parser.parse_args(arguments)
    is_marian = args.model == "marian"
    args.results = args.results or RESULTS / ("step_time.json" if is_marian else "step_time_resnet.json")
    if args.rounds < 2 or args.warmup < 1 or args.threads < 1:
        raise ValueError("--rounds, --warmup, --threads: accepted: at least 2, 1, 1")
    if args.memory_only and not is_marian:
        raise ValueError("--memory-only: got --model resnet, accepted: for marian, whose memory is measured")
    if is_marian and args.rounds % 100 and not args.memory_only:
        print("note: --rounds is no whole hundred, so interval 100's seldom work is over- or undercounted", flush=True)
    torch.set_num_threads(args.threads)
    known = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    lngd = [name for name, fields in CONTENDERS.items() if fields is not None]
    if not args.memory_only:  # what is said of timings stays with them
        known = {
            "hardware": f"CPU, {args.threads} threads",
            "torch": torch.__version__,
            "rounds": args.rounds,
            "timings": timing_rows(
                time_steps(args.rounds, args.warmup, args.model), TARGETS if is_marian else IMAGE_TARGETS
            ),
        }
    elif not known.get("timings"):
        raise ValueError(f"--memory-only: {args.results} has no timings to keep; accepted: a file of an earlier run")
    result = {
        **known,
        "memory": [
            memory_row(name, model, device)
            for model, device in (("Marian d=256, 3+3", "cpu"), ("Transformer-big", "meta"))
            for name in lngd
            if is_marian
        ],
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
