"""Where AdamW and LNGD are best when one rate drives everything: does a user's `lr` carry over?

    python -m benchmarks.sweep_lr --data DIR

The Multi30k task of `specs/multi30k.toml` with one learning rate for all parameters, 1e-4 to 1e-2, for both optimizers
in turns. Rows go to `benchmarks/results/sweep_lr.json`; runs that are there are not run again.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.multi30k_task import make_task
from benchmarks.rivals import Settings, label
from benchmarks.runs import Results, Row, train
from benchmarks.spec import named
from benchmarks.tables import table

HERE = Path(__file__).resolve().parent
# LNGD once with updates of AdamW's settled size (the default) and once of AdamW's size in its first steps
RIVALS = {"adamw": ("adamw", ""), "lngd": ("lngd", ""), "lngd rate_scale=1": ("lngd", "rate_scale=1")}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def sweep_table(results: Results, steps: int, seed: int) -> str:
    """Validation loss at each rate, the best in bold, and the best rate of a parabola through its neighbours."""
    body = []
    for title, (name, fields) in RIVALS.items():
        losses: dict[float, float] = {}
        for row in results.find("sweep", name, steps=steps, seed=seed):
            if row["settings"]["fields"] == fields:
                losses[row["settings"]["lr"]] = math.inf if row["diverged"] else row["loss"]
        if not losses:
            continue
        best = min(losses, key=lambda rate: losses[rate])
        cells = []
        for rate in sorted(losses):
            text = "diverged" if math.isinf(losses[rate]) else f"{losses[rate]:.3f}"
            cells.append(f"**{text}**" if rate == best else text)
        body.append([title.replace(name, label(name).split(" (")[0]), *cells, f"{refine(losses, best):.2g}"])
    return table(["one rate for all", *(f"{rate:g}" for rate in sorted(RATES)), "best rate"], body)


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
    parser.add_argument("--data", type=Path, required=True, help="folder of Multi30k's train and validation.json.gz")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=101, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "sweep_lr.json", help="file of results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    results = Results(args.results)
    task, spec = make_task(args.data), named("multi30k")
    with tqdm(total=len(RATES) * len(RIVALS) * args.steps, unit="step", smoothing=0.02) as bar:
        for rate in RATES:
            for title, (name, fields) in RIVALS.items():
                settings = Settings(rate, rate, fields=fields)
                if not results.find("sweep", name, settings, steps=args.steps, seed=args.seed):
                    bar.set_description(f"{title} lr {rate:g}")
                    row: Row = train(
                        name, settings, args.seed, args.steps, spec.warmup, task, lambda step, loss: bar.update(1)
                    )
                    results.add({"phase": "sweep", **row})
    print(sweep_table(results, args.steps, args.seed))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
