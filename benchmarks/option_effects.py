"""The measured effect of each of LNGD's options: one changed at a time on a task.

    python -m benchmarks.option_effects --task multi30k --data DIR

Each variant runs on the same seed or seeds as the default does with one flag, at AdamW's best rate
(`benchmarks/results/TASK.json`); directions and rates of another size have a rate of their own for LNGD's layers, given
in the table, which changes neither their weight decay nor the rate of all else. Rows go to `results/options-TASK.json`;
what is there is not run again. `--table` alone prints the table and needs no data.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.rivals import Settings
from benchmarks.runs import Results, train
from benchmarks.spec import checked_steps, named
from benchmarks.tables import table
from benchmarks.tasks import check_task, load_task
from hf_lngd import LNGDConfig

HERE = Path(__file__).resolve().parent

# Whose settings are the default's: a user's with one flag.
DEFAULT = "lngd-same"
PAPER = "preset=paper,factor_interval=20,inverse_interval=20,momentum=0.9"
# fields → factor on the layers' rate: natural and adaptive updates have a size of their own, the paper's is where it is
# best on Multi30k.
TRANSLATION: dict[str, float] = {
    "": 1.0,
    "direction=gram": 1.0,
    "direction=natural,damping_rho=0.3": 0.25,
    "direction=natural,damping_rho=0.3,rate=adaptive": 5.0,
    PAPER: 33.0,
    "fisher=sampled": 1.0,
    "damping_rho=0.1": 1.0,
    "damping_rho=1000": 1.0,
    "momentum=0.9": 1.0,
    "nesterov=false": 1.0,
    "momentum_on=update": 0.2,  # which is 1 / (1 - momentum) longer
    "factor_interval=100,inverse_interval=100": 1.0,
    "early_factors=false": 1.0,
    "matrix_dtype=full": 1.0,
    "row_decay=0": 1.0,
    "weight_decay=0": 1.0,
    "bias=factor": 1.0,
    "embedding=fallback": 1.0,
    "embedding=exact": 1.0,
    "chain=full": 1.0,
}
IMAGES: dict[str, float] = {
    "": 1.0,
    "chain=full": 1.0,
    "head=categorical": 1.0,
    "conv_rows=1": 1.0,
    "conv_rows=32": 1.0,
    "max_factor_dim=1152": 1.0,
    "damping_rho=10": 1.0,
    "damping_rho=1000": 1.0,
    "direction=gram": 1.0,
    "direction=natural,damping_rho=0.3": 0.25,
    PAPER: 33.0,
    "row_decay=0": 1.0,
    "bias=factor": 1.0,
    "factor_interval=100,inverse_interval=100": 1.0,
}
VARIANTS = TRANSLATION | IMAGES
VARIANTS_OF = {"multi30k": TRANSLATION, "cifar10-resnet": IMAGES, "cifar10-vit": IMAGES}


def variant(fields: str, base: Settings) -> Settings:
    """The settings of a variant: `weight_decay` is the harness's own setting, all else are LNGD's fields."""
    if fields.startswith("weight_decay="):
        return replace(base, weight_decay=float(fields.partition("=")[2]), fields="")
    factor, default = VARIANTS[fields], LNGDConfig()
    if factor != 1:
        others = {
            "fallback_lr": base.lr * default.fallback_lr_scale,
            "weight_decay_scale": default.weight_decay_scale / factor,
        }
        fields += "".join(f",{name}={value:.4g}" for name, value in others.items())
    return replace(base, lr=float(f"{base.lr * factor:.3g}"), fields=fields)


def effects(results: Results, base: Settings, seeds: list[int], variants: Iterable[str], steps: int) -> str:
    """Markdown: variant, rate, mean loss, difference from the default paired by seed; of runs of this many steps."""

    def losses(fields: str) -> list[float]:
        rows = [results.find("option", "lngd", variant(fields, base), seed=seed, steps=steps) for seed in seeds]
        return [math.inf if row[0]["diverged"] else row[0]["loss"] for row in rows if row]

    default = losses("")
    body = []
    for fields in variants:
        found = losses(fields)
        if len(found) < len(seeds) or len(default) < len(seeds):
            continue
        mean = sum(found) / len(found)
        name = f"`{fields}`" if fields else "nothing (the default)"
        gap = mean - sum(default) / len(default)
        difference = "" if not fields else f"{gap:+.3f}" if math.isfinite(gap) else "diverged"
        loss = f"{mean:.3f}" if math.isfinite(mean) else "-"
        body.append([name, f"{variant(fields, base).lr:g}", loss, difference])
    return table(["changed", "lr", "loss", "against the default"], body)


def base_of(results: Results, tuned: Path) -> Settings:
    """The default's settings: those of its own row, so that rows go on comparing with one another when the study is
    tuned anew; without one the best of the study. Raises ValueError for a file with rows of others alone."""
    if not results.rows:
        return replace(Results(tuned).best(DEFAULT), fields="")
    for row in results.rows:
        settings = Settings(**row["settings"])
        if not settings.fields and settings.weight_decay:
            return settings
    raise ValueError(f"{results.path}: has no row of the default; accepted: --part 0 N first, or a new --results")


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--task", default="multi30k", metavar="TASK", help=f"of {', '.join(VARIANTS_OF)} (default: %(default)s)")
    add("--data", type=Path, help="folder of the task's data")
    add("--table", action="store_true", help="only print the table of what is there")
    add("--seeds", type=int, nargs="+", default=[11], help="default: 11")
    add("--steps", type=int, help="default: the task's")
    add("--part", type=int, nargs=2, default=[0, 1], metavar=("I", "N"), help="only every Nth variant, from the Ith")
    add("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    add("--tuned", type=Path, help="where the default's rates are from (default: results/TASK.json)")
    add("--results", type=Path, help="file of results (default: results/options-TASK.json)")
    args = parser.parse_args(arguments)
    check_task(args.task, VARIANTS_OF)
    if not 0 <= args.part[0] < args.part[1]:
        raise ValueError(f"--part: got {args.part[0]} {args.part[1]}, accepted: I N with I from 0 to N - 1")
    spec = named(args.task)
    steps = checked_steps(args.steps, spec)
    results = Results(args.results or HERE / "results" / f"options-{args.task}.json")
    base = base_of(results, args.tuned or HERE / "results" / f"{args.task}.json")
    variants = VARIANTS_OF[args.task]
    if not args.table:
        if args.data is None:
            raise ValueError("--data: needed to run anything; only --table does without")
        if args.threads < 1:
            raise ValueError(f"--threads: got {args.threads}, accepted: at least 1")
        torch.set_num_threads(args.threads)
        task = load_task(args.task, args.data)
        for seed in args.seeds:
            for fields in tqdm(list(variants)[args.part[0] :: args.part[1]], desc=f"seed {seed}"):
                settings = variant(fields, base)
                if not results.find("option", "lngd", settings, seed=seed, steps=steps):
                    row = train("lngd", settings, seed, steps, spec.warmup_of(steps), task, lambda step, loss: None)
                    results.add({"phase": "option", **row})
    print(effects(results, base, args.seeds, variants, steps))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
