"""What a step of LNGD costs beside AdamW's and Muon's, in time and in memory.

    python -m benchmarks.cost.step_time
    python -m benchmarks.cost.step_time --model resnet
    python -m benchmarks.cost.step_time --model vit --against PATH

Time: a Marian (d=256, 3+3 layers) on batches of 64 × 32 random tokens, or the ResNet or ViT of the CIFAR-10 tasks on
batches of 128 random images. Every contender has a model of its own; each round takes one step of every contender, the
first one another each round, and costs are compared within rounds, so that what else the machine does meets all of
them. Whole intervals are measured, so the seldom work (factors, inverses) counts.

Memory: optimizer state beside AdamW's, for that model and for a Transformer-big, the latter on the meta device.
The results are `benchmarks/results/step_time.json`, `step_time_resnet.json`, `step_time_vit.json` and tables.

With `--against` steps of LNGD of this checkout are compared with those of another one, both at their defaults, in turn,
in processes of their own, see `versions`; the rows of the models go into one file, `step_time_versions.json`.
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

from benchmarks.cost import cases
from benchmarks.cost.cases import small, transformer_big
from benchmarks.cost.versions import OWN, time_versions
from benchmarks.report.tables import table
from benchmarks.studies.rivals import Settings, Together, adamw, muon, split
from benchmarks.studies.runs import hardware
from hf_lngd import LNGD

RESULTS = Path(__file__).resolve().parents[1] / "results"
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
VERSION_TARGET = 1.0


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
        whole, update = cases.timed_step(self.model, self.optimizer, batch, time.perf_counter)
        self.step.append(whole)
        self.update.append(update)

    def seconds(self, which: str) -> list[float]:
        """Of the whole steps ("step") or of the optimizer alone ("optimizer")."""
        return self.step if which == "step" else self.update


def time_steps(rounds: int, warmup: int, model_name: str) -> dict[str, Contender]:
    """Rounds of one step each of every contender; the warm-up rounds are not counted."""
    generator = torch.Generator().manual_seed(0)
    contenders = {}
    for name in CONTENDERS if model_name == "marian" else IMAGE_CONTENDERS:
        model, feed = cases.make(model_name)
        contenders[name] = Contender(model, make(name, model))
    names = list(contenders)
    for turn in tqdm(range(warmup + rounds), unit="round"):
        batch = feed(generator)
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


def version_rows(model: str, against: Path, rounds: int, warmup: int) -> list[dict[str, Any]]:
    """Two rows: the whole step and `optimizer.step()` of this checkout beside another one's."""
    found = time_versions(model, {"before": against, "now": OWN}, rounds, warmup)
    rows = []
    for which, what in (("step", "whole step"), ("optimizer", "optimizer.step()")):
        now, before = found["now"][which], found["before"][which]
        rows.append(
            {
                "model": model,
                "what": what,
                "milliseconds": round(1e3 * mean(now), 2),
                "milliseconds_before": round(1e3 * mean(before), 2),
                **compare(now, before),
                "target": VERSION_TARGET if which == "step" else None,
                "rounds": rounds,
            }
        )
    return rows


def version_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each model and part of the step."""
    head = ["model", "what", "before, ms", "now, ms", "ratio of means", "ratio of medians", "target"]
    body = [
        [
            row["model"],
            row["what"],
            f"{row['milliseconds_before']:.1f}",
            f"{row['milliseconds']:.1f}",
            f"{row['ratio']:.3f} ± {row['standard_error']:.3f}",
            f"{row['ratio_of_medians']:.3f}",
            "–" if row["target"] is None else f"≤ {row['target']:.2f}",
        ]
        for row in rows
    ]
    return table(head, body)


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


def write_versions(args: argparse.Namespace) -> None:
    """Measure this checkout beside another one: rows of this model in the file, those of others stay."""
    torch.set_num_threads(1)  # as the two processes have
    known = json.loads(args.results.read_text(encoding="utf-8"))["rows"] if args.results.exists() else []
    fresh = version_rows(args.model, args.against, args.rounds, args.warmup)
    rows = [row for row in known if row["model"] != args.model] + fresh
    result = {"hardware": hardware(), "clock": "cpu", "torch": torch.__version__, "rows": rows}
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(version_table(rows))


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes the JSON file and prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(cases.CASES), default="marian", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=100, help="counted rounds, whole hundreds (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not counted (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument("--memory-only", action="store_true", help="leave the timings of the file as they are")
    parser.add_argument("--against", type=Path, help="another checkout, whose LNGD takes turns; one thread each")
    parser.add_argument("--results", type=Path, help="file to write (default: of the model)")
    args = parser.parse_args(arguments)
    is_marian = args.model == "marian"
    default = "step_time.json" if is_marian else f"step_time_{args.model}.json"
    args.results = args.results or RESULTS / ("step_time_versions.json" if args.against else default)
    if args.rounds < 2 or args.warmup < 1 or args.threads < 1:
        raise ValueError("--rounds, --warmup, --threads: accepted: at least 2, 1, 1")
    if args.memory_only and not is_marian:
        raise ValueError(f"--memory-only: got --model {args.model}, accepted: for marian, whose memory is measured")
    if args.against:
        write_versions(args)
        return
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
