"""What a step of LNGD costs beside AdamW's and Muon's in the batches that people fine-tune with.

    python -m benchmarks.cost.small_batches
    python -m benchmarks.cost.small_batches --models marian vit --rounds 40

Each model is trained by AdamW, by torch.optim.Muon with AdamW, and by LNGD with one rate, each on a copy of its own and
on the same random batches; they take turns, another one first each round. Counted are the process's own seconds on one
thread, of whole steps and of `optimizer.step()` alone, over whole intervals of LNGD's factors (20 steps), so that the
seldom work counts. Where a CPU has no instructions for bfloat16, in which torch's Muon multiplies, its iteration is run
in float32: emulated, it would be forty times as slow.

Kernel calls of a settled step, views left out, are those that torch's dispatcher sees.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn
from torch.optim import _muon
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.cost import cases
from benchmarks.cost.cases import Case, images, text, timed_step
from benchmarks.report.tables import table
from benchmarks.studies.rivals import Settings, Together, adamw, muon
from benchmarks.studies.runs import hardware
from hf_lngd import LNGD
from hf_lngd.linalg import fast_bfloat16
from hf_lngd.work import MOST_INTERVAL

RESULTS = Path(__file__).resolve().parents[1] / "results" / "small_batches.json"
RATES = Settings(1e-3, 1e-3)
INTERVAL = 20


def vit() -> nn.Module:
    sizes = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=64, patch_size=8, num_labels=10))


def convnext() -> nn.Module:
    sizes = {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 6, 2]}
    return ConvNextForImageClassification(ConvNextConfig(**sizes, num_labels=10, image_size=64))


def distilbert() -> nn.Module:
    return DistilBertForSequenceClassification(DistilBertConfig(num_labels=2))


def resnet50() -> nn.Module:
    """A ResNet-50 of an eighth of the width."""
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64, 128, 256], "depths": [3, 4, 6, 3]}
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type="bottleneck", num_labels=10))


# name → (model and batches, the ratio of whole steps to stay below)
CASES: dict[str, tuple[Case, float]] = {
    "marian, 64 × 32": (text(cases.small, 64, 32, 8_000), 1.06),
    "marian, 16 × 24": (text(cases.small, 16, 24, 8_000), 1.35),
    "resnet, 128": (images(lambda: cases.make_resnet(0), 128, 32), 1.06),
    "vit, 8": (images(vit, 8, 64), 1.35),
    "convnext, 16": (images(convnext, 16, 64), 1.35),
    "distilbert, 16 × 64": (text(distilbert, 16, 64, 30_000, classes=2), 1.5),
}
# Models whose kernel calls are counted, and how many there may be.
COUNTED: dict[str, tuple[Case, int]] = {
    "marian, 6 + 6 layers": (text(lambda: cases.marian(64, 256, 4, 6, 1_000), 4, 8, 1_000), 250),
    "resnet-50": (images(resnet50, 4, 32), 600),
}


def _newton_schulz(
    grad: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """torch's `_zeropower_via_newtonschulz` in the gradient's own precision."""
    a, b, c = coefficients
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if grad.shape[0] > grad.shape[1] else x


@contextmanager
def muon_in_float32() -> Iterator[None]:
    """torch's Muon in float32, where bfloat16 is emulated."""
    name = "_zeropower_via_newtonschulz"
    own = getattr(_muon, name)
    if not fast_bfloat16(torch.device("cpu")):
        setattr(_muon, name, _newton_schulz)
    try:
        yield
    finally:
        setattr(_muon, name, own)


class Calls(TorchDispatchMode):
    """Counts what is dispatched and makes a tensor of its own, or writes into one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returns) or "view" in str(func)
        self.count += not is_view
        return func(*args, **(kwargs or {}))


def lngd(model: nn.Module, settings: Settings) -> Together:
    """LNGD as users get it."""
    return Together([LNGD(model, lr=settings.lr)])


def seconds_of(case: Case, rounds: int, show: Callable[[], Any]) -> dict[str, dict[str, list[float]]]:
    """Contender → "step", "optimizer" and "first" → seconds: of whole steps and of `optimizer.step()` in so many
    rounds, and of the whole steps of one interval before these."""
    make, feed = case
    generator = torch.Generator().manual_seed(0)
    contenders = {}
    for contender in (adamw, muon, lngd):
        torch.manual_seed(0)
        model = make().train()
        contenders[contender.__name__] = (model, contender(model, RATES))
    found: dict[str, dict[str, list[float]]] = {name: {"step": [], "optimizer": [], "first": []} for name in contenders}
    names = list(contenders)
    for turn in range(INTERVAL + rounds):
        batch, first = feed(generator), turn % len(names)
        for name in names[first:] + names[:first]:
            model, optimizer = contenders[name]
            whole, own = timed_step(model, optimizer, batch, time.process_time)
            found[name]["first" if turn < INTERVAL else "step"].append(whole)
            if turn >= INTERVAL:
                found[name]["optimizer"].append(own)
        show()
    return found


def row_of(name: str, target: float, found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Milliseconds and ratios of a model."""
    own, base, other = (found[contender] for contender in ("lngd", "adamw", "muon"))
    gaps = [a - b for a, b in zip(own["step"], base["step"], strict=True)]
    return {
        "model": name,
        "adamw_ms": round(1e3 * mean(base["step"]), 2),
        "muon_ms": round(1e3 * mean(other["step"]), 2),
        "lngd_ms": round(1e3 * mean(own["step"]), 2),
        "step_to_adamw": round(mean(own["step"]) / mean(base["step"]), 3),
        "standard_error": round(stdev(gaps) / len(gaps) ** 0.5 / mean(base["step"]), 3),
        "target": target,
        "optimizer_to_muon": round(mean(own["optimizer"]) / mean(other["optimizer"]), 3),
        "first_to_settled": round(mean(own["first"]) / mean(own["step"]), 3),
    }


def calls_of(case: Case) -> int:
    """Kernel calls of a step between two updates of Φ, in the mean of as many as layers take turns in."""
    make, feed = case
    torch.manual_seed(0)
    model, generator = make().train(), torch.Generator().manual_seed(0)
    optimizer = LNGD(model, lr=1e-3)
    counts = []
    for _ in range(2 * MOST_INTERVAL):
        model(**feed(generator)).loss.backward()
        with Calls() as calls:
            optimizer.step()
        counts.append(calls.count)
        optimizer.zero_grad()
    optimizer.close()
    return round(mean(counts[MOST_INTERVAL:]))


def tables(result: dict[str, Any]) -> str:
    """Markdown: seconds, and kernel calls."""

    def verdict(value: float, target: float) -> list[str]:
        return [f"≤ {target:g}", "yes" if value <= target else "no"]

    head = ["model", "AdamW, ms", "Muon, ms", "LNGD, ms", "LNGD / AdamW", "target", "met"]
    head += ["step() / Muon's (≤ 0.6)", "first 20 steps / settled (≤ 1.5)"]
    body = [
        [
            row["model"],
            *(f"{row[key]:.0f}" for key in ("adamw_ms", "muon_ms", "lngd_ms")),
            f"{row['step_to_adamw']:.2f} ± {row['standard_error']:.2f}",
            *verdict(row["step_to_adamw"], row["target"]),
            f"{row['optimizer_to_muon']:.2f}",
            f"{row['first_to_settled']:.2f}",
        ]
        for row in result["rows"]
    ]
    calls = [[row["model"], str(row["calls"]), *verdict(row["calls"], row["target"])] for row in result["calls"]]
    return table(head, body) + "\n" + table(["model", "kernel calls of a settled step", "target", "met"], calls)


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes the JSON file and prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", help="beginnings of names; the others' rows stay (default: all)")
    parser.add_argument("--rounds", type=int, default=INTERVAL, help="whole intervals of 20 (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if args.rounds < INTERVAL or args.rounds % INTERVAL:
        raise ValueError(f"--rounds: got {args.rounds}, accepted: a multiple of {INTERVAL}")
    torch.set_num_threads(1)
    for given in args.models or ():
        if not any(name.startswith(given) for name in CASES):
            raise ValueError(f"--models: got {given!r}, accepted: beginnings of {'; '.join(CASES)}")
    chosen = [name for name in CASES if not args.models or name.startswith(tuple(args.models))]
    known = json.loads(args.results.read_text(encoding="utf-8"))["rows"] if args.results.exists() else []
    rows = {row["model"]: row for row in known}
    with muon_in_float32(), tqdm(total=len(chosen) * (INTERVAL + args.rounds), unit="round") as bar:
        for name in chosen:
            case, target = CASES[name]
            rows[name] = row_of(name, target, seconds_of(case, args.rounds, bar.update))
    calls = [{"model": name, "calls": calls_of(case), "target": most} for name, (case, most) in COUNTED.items()]
    about = {"hardware": hardware(), "clock": "cpu", "torch": torch.__version__, "rounds": args.rounds}
    result = {**about, "rows": [rows[name] for name in CASES if name in rows], "calls": calls}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
