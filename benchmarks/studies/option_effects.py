"""The measured effect of LNGD's options: each variant beside the default, paired by seed, on any task.

    python -m benchmarks.studies.option_effects --task multi30k --data DIR --seeds 11 12 13
    python -m benchmarks.studies.option_effects --task marian-wmt --data DIR --model FOLDER --variants damping=0.1

Each variant runs on the same seeds as the default does with one flag, at AdamW's best rate
(`benchmarks/results/TASK.json`; a task that was not tuned: where its search starts). Without `--variants` these are the
task's own; directions and rates of another size then have a rate of their own for LNGD's layers, given in the table,
which changes neither their weight decay nor the rate of all other parameters. Other variants that are given, fields as
in `--optim_args`, keep the default's rate. Rows go to `results/options-TASK.json`; what is there is not run again.
`--table` alone prints the table and needs no data.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from benchmarks.report.tables import spread, table
from benchmarks.studies.rivals import Settings
from benchmarks.studies.runs import Results, Row, train
from benchmarks.studies.spec import Spec, checked_steps, named
from benchmarks.tasks.registry import TASKS, check_task, load_task
from hf_lngd import LNGDConfig

RESULTS = Path(__file__).resolve().parents[1] / "results"
# Whose settings are the default's: a user's with one flag.
DEFAULT = "lngd-same"
PAPER = "preset=paper,factor_interval=20,inverse_interval=20,momentum=0.9"
Variants = Mapping[str, float]
# fields → factor on the layers' rate: natural and adaptive updates have a size of their own, the paper's is where it is
# best on Multi30k.
COMMON: Variants = {
    "": 1.0,
    "whiten=inputs": 1.0,
    "whiten=none": 1.0,
    "direction=natural,damping=0.3": 0.25,
    "direction=natural,damping=0.3,fisher=sampled": 0.25,
    "family=kfac,damping=0.3": 0.25,
    PAPER: 33.0,
    "damping=1000": 1.0,
    "bias=factor": 1.0,
    "factor_interval=100,inverse_interval=100": 1.0,
}
TRANSLATION: Variants = {
    **COMMON,
    "direction=natural,damping=0.3,rate=adaptive": 5.0,
    "fisher=sampled": 1.0,
    "damping=0.1": 1.0,
    "momentum=0.9": 1.0,
    "momentum_on=update": 0.2,  # which is 1 / (1 - momentum) longer
    "weight_decay=0": 1.0,
    "embedding=fallback": 1.0,
    "embedding=exact": 1.0,
}
IMAGES: Variants = {**COMMON, "damping=10": 1.0, "max_factor_dim=1152": 1.0}


def variants_of(task: str) -> Variants:
    """What is tried on a task if nothing is given."""
    return IMAGES if task.startswith("cifar10") else TRANSLATION


def given_variants(texts: list[str], own: Variants) -> Variants:
    """Variants from the command line, after the default: at its rate where they are not the task's `own`.

    Raises:
        ValueError: an unknown field, or a value that it does not take.
    """
    for text in texts:
        variant(text, 1.0, Settings(1e-3, None))
    return {text: own.get(text, 1.0) for text in ["", *texts]}


def variant(fields: str, factor: float, base: Settings) -> Settings:
    """The settings of a variant: `weight_decay` is the harness's own setting, all else are LNGD's fields.

    Args:
        factor: on the rate of LNGD's layers alone, whose weight decay stays.

    Raises:
        ValueError: an unknown field, or a value that it does not take.
    """
    LNGDConfig.from_optim_args(fields)
    decay, others = base.weight_decay, []
    for item in filter(None, re.split(r"(?<!\\),", fields)):
        name, _, value = item.partition("=")
        if name == "weight_decay":
            decay = float(value)
        else:
            others.append(item)
    if factor != 1:
        others.append(f"fallback_lr_scale={LNGDConfig().fallback_lr_scale / factor:.4g}")
    lr = float(f"{base.lr * factor:.3g}")
    return replace(base, lr=lr, weight_decay=decay, fields=",".join(others))


def effects(results: Results, base: Settings, seeds: list[int], variants: Variants, steps: int) -> str:
    """Markdown: variant, rate, loss (and accuracy) over seeds, difference from the default paired by seed; of runs of
    this many steps. A variant that lacks a seed is left out, one with a diverged run is called so."""

    def rows_of(fields: str) -> list[Row]:
        settings = variant(fields, variants[fields], base)
        return [row for seed in seeds for row in results.find("option", "lngd", settings, seed=seed, steps=steps)[:1]]

    default = rows_of("")
    has_accuracy = any("accuracy" in row for row in default)
    body = []
    for fields in variants:
        found = rows_of(fields)
        if len(found) < len(seeds) or len(default) < len(seeds):
            continue
        name = f"`{fields}`" if fields else "nothing (the default)"
        cells = [name, f"{variant(fields, variants[fields], base).lr:g}"]
        if any(row["diverged"] for row in [*found, *default]):
            body.append([*cells, "-", *(["-"] if has_accuracy else []), "diverged"])
            continue
        cells.append(spread([row["loss"] for row in found], 3))
        if has_accuracy:
            cells.append(spread([100 * row["accuracy"] for row in found], 1))
        gaps = [own["loss"] - its["loss"] for own, its in zip(found, default, strict=True)]
        sign = "+" if mean(gaps) >= 0 else ""
        body.append([*cells, f"{sign}{spread(gaps, 3)}" if fields else ""])
    head = ["changed", "lr", "loss", *(["accuracy, %"] if has_accuracy else []), "against the default"]
    return table(head, body)


def base_of(results: Results, tuned: Path, spec: Spec) -> Settings:
    """The default's settings: those of its own row, so that rows go on comparing with one another when the study is
    tuned anew; without one the best of the study, or where its search starts.

    Raises:
        ValueError: the file has rows of others alone.
    """
    study = Results(tuned)
    best = replace(study.best(DEFAULT) if study.find("tune", DEFAULT) else spec.rivals[DEFAULT].start, fields="")
    for row in results.rows:
        settings = Settings(**row["settings"])
        if not settings.fields and settings.weight_decay == best.weight_decay:
            return settings
    if results.rows:
        raise ValueError(f"{results.path}: has no row of the default; accepted: --part 0 N first, or a new --results")
    return best


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line. Raises ValueError for what does not fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--task", default="multi30k", metavar="TASK", help=f"of {', '.join(TASKS)} (default: %(default)s)")
    add("--data", type=Path, help="folder of the task's data")
    add("--model", type=Path, help="folder of the pretrained model, for a task that fine-tunes one")
    add("--variants", nargs="+", metavar="FIELDS", help="as in --optim_args (default: those of the task)")
    add("--table", action="store_true", help="only print the table of what is there")
    add("--seeds", type=int, nargs="+", default=[11], help="default: 11")
    add("--steps", type=int, help="default: the task's")
    add("--lr", type=float, help="the default's rate (default: that of its rows, else of the study)")
    add("--part", type=int, nargs=2, default=[0, 1], metavar=("I", "N"), help="only every Nth variant, from the Ith")
    add("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    add("--tuned", type=Path, help="where the default's rates are from (default: results/TASK.json)")
    add("--results", type=Path, help="file of results (default: results/options-TASK.json)")
    args = parser.parse_args(arguments)
    check_task(args.task)
    if not 0 <= args.part[0] < args.part[1]:
        raise ValueError(f"--part: got {args.part[0]} {args.part[1]}, accepted: I N with I from 0 to N - 1")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise ValueError(f"--lr: got {args.lr}, accepted: a rate above 0")
    if args.data is None and not args.table:
        raise ValueError("--data: needed to run anything; only --table does without")
    if args.threads < 1:
        raise ValueError(f"--threads: got {args.threads}, accepted: at least 1")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, then prints the table."""
    args = parse(arguments)
    spec = named(args.task)
    steps = checked_steps(args.steps, spec)
    variants = variants_of(args.task)
    if args.variants:
        variants = given_variants(args.variants, variants)
    results = Results(args.results or RESULTS / f"options-{args.task}.json")
    if args.lr is None:
        base = base_of(results, args.tuned or RESULTS / f"{args.task}.json", spec)
    else:
        base = replace(spec.rivals[DEFAULT].start, lr=args.lr, fields="")
    if not args.table:
        torch.set_num_threads(args.threads)
        task = load_task(args.task, args.data, args.model)
        for seed in args.seeds:
            for fields in tqdm(list(variants)[args.part[0] :: args.part[1]], desc=f"seed {seed}"):
                settings = variant(fields, variants[fields], base)
                if not results.find("option", "lngd", settings, seed=seed, steps=steps):
                    row = train("lngd", settings, seed, steps, spec.warmup_of(steps), task, lambda step, loss: None)
                    results.add({"phase": "option", **row})
    print(effects(results, base, args.seeds, variants, steps))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
