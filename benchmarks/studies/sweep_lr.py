"""Where AdamW and LNGD are best when one rate drives everything: does a user's `lr` carry over?

    python -m benchmarks.studies.sweep_lr --data DIR [--task TASK --model FOLDER --rates 1e-3 3e-3 --seed 102]

A task as in `specs/TASK.toml` with one learning rate for all parameters, for both optimizers in turns. Rows go to
`benchmarks/results/sweep_lr.json`; runs that are there are not run again.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from benchmarks.report.tables import table
from benchmarks.studies.rivals import Settings, label
from benchmarks.studies.runs import Results, Row, train
from benchmarks.studies.spec import checked_steps, named
from benchmarks.tasks.registry import TASKS, check_task, load_task

RESULTS = Path(__file__).resolve().parents[1] / "results"
# One minus the momentum that users get; one rate for everything.
FRESH = {"adamw": 0.1, "lngd": 0.2}
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def sweep_table(results: Results, task: str, steps: int) -> str:
    """Loss at each rate, the mean over seeds, the best in bold, and the best rate of a parabola through its
    neighbours."""
    body, tried, seeds = [], set[float](), set[int]()
    for name in FRESH:
        found: dict[float, list[float]] = {}
        for row in results.find("sweep", name, task=task, steps=steps):
            found.setdefault(row["settings"]["lr"], []).append(math.inf if row["diverged"] else row["loss"])
            seeds.add(row["seed"])
        if not found:
            continue
        tried |= set(found)
        losses = {rate: mean(each) for rate, each in found.items()}
        best = min(losses, key=lambda rate: losses[rate])
        cells = {}
        for rate, loss in losses.items():
            text = "diverged" if math.isinf(loss) else f"{loss:.3f}"
            cells[rate] = f"**{text}**" if rate == best else text
        body.append((label(name).split(" (")[0], cells, f"{refine(losses, best):.2g}"))
    rates = sorted(tried)
    rows = [[title, *(cells.get(rate, "–") for rate in rates), refined] for title, cells, refined in body]
    head = f"{task}, {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, sorted(seeds)))}"
    return table([head, *(f"{rate:g}" for rate in rates), "best rate"], rows)


def refine(losses: dict[float, float], best: float) -> float:
    """The lowest point of a parabola through the best rate and its neighbours over log(rate); at an edge, the edge."""
    rates = sorted(losses)
    at = rates.index(best)
    if not 0 < at < len(rates) - 1 or not all(math.isfinite(losses[rate]) for rate in rates[at - 1 : at + 2]):
        return best
    (x0, x1, x2), (y0, y1, y2) = zip(*((math.log(rate), losses[rate]) for rate in rates[at - 1 : at + 2]), strict=True)
    rise, fall = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    if rise == fall:
        return best
    return math.exp(x1 - 0.5 * ((x1 - x0) * rise - (x1 - x2) * fall) / (rise - fall))


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--task", default="multi30k", metavar="TASK", help=f"of {', '.join(TASKS)} (default: %(default)s)")
    add("--data", type=Path, help="folder of the task's data")
    add("--model", type=Path, help="folder of the pretrained model, for a task that fine-tunes one")
    add("--table", action="store_true", help="only print the table of what is there")
    add("--rates", type=float, nargs="+", default=list(RATES), help="default: 3e-5 to 1e-2")
    add("--steps", type=int, help="default: the task's")
    add("--seed", type=int, default=101, help="default: %(default)s")
    add("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    add("--results", type=Path, default=RESULTS / "sweep_lr.json", help="file of results")
    args = parser.parse_args(arguments)
    check_task(args.task)
    results, spec = Results(args.results), named(args.task)
    steps = checked_steps(args.steps, spec)
    if not args.table:
        if args.data is None:
            raise ValueError("--data: got none, accepted: a folder; only --table does without")
        if bad := [rate for rate in args.rates if not rate > 0]:
            raise ValueError(f"--rates: got {bad[0]}, accepted: rates above 0")
        if args.threads < 1:
            raise ValueError(f"--threads: got {args.threads}, accepted: at least 1")
        torch.set_num_threads(args.threads)
        sweep(results, args, steps, spec.warmup_of(steps))
    print(sweep_table(results, args.task, steps))


def sweep(results: Results, args: argparse.Namespace, steps: int, warmup: int) -> None:
    """Runs what the file of results lacks, one rate after the other, rivals in turns."""
    task = load_task(args.task, args.data, args.model)
    with tqdm(total=len(args.rates) * len(FRESH) * steps, unit="step", smoothing=0.02) as bar:
        for rate in args.rates:
            for name, fresh in FRESH.items():
                settings = Settings(rate, None, fresh)
                if not results.find("sweep", name, settings, task=args.task, steps=steps, seed=args.seed):
                    bar.set_description(f"{name} lr {rate:g}")
                    row: Row = train(
                        name, settings, args.seed, steps, warmup, task, lambda step, loss: bar.update(1), tuning=True
                    )
                    results.add({"phase": "sweep", **row})


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
