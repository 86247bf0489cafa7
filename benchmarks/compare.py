"""Compares optimizers on a task: tunes each alike, then paired runs, a table and a picture.

    python -m benchmarks.compare --task multi30k --data DIR --tune --report --plot

Every run becomes a row of `benchmarks/results/TASK.json`; runs that are there are not run again, so interrupted work
goes on where it stopped. `--table` and `--plot` alone need no data. What DIR holds is said in `benchmarks/README.md`.

`--trial "lr=8e-3,other_lr=1e-2,chain=full"` runs LNGD once on a tuning seed with fields of its own: for finding
defaults.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.rivals import RIVALS, Settings, label, rival
from benchmarks.runs import Results, Row, search, train, tuning_starts
from benchmarks.tables import draw, results_table, tuning_table
from benchmarks.tasks import TASKS, Task, check_task, load_task

HERE = Path(__file__).resolve().parent


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--task", default=next(iter(TASKS)), metavar="TASK", help=f"of {', '.join(TASKS)} (default: %(default)s)")
    add("--data", type=Path, help="folder of the task's data")
    add("--model", type=Path, help="folder of the pretrained model, for a task that fine-tunes one")
    add("--tune", action="store_true", help="tune each rival over --trials runs a tuning seed")
    add("--report", action="store_true", help="run each rival at its best settings on the reporting seeds, interleaved")
    add("--table", action="store_true", help="print the results as Markdown")
    add("--plot", action="store_true", help="print the table and draw loss against seconds")
    add("--trial", action="append", default=[], metavar="a=b,c=d", help="one run of LNGD on the first tuning seed")
    add("--rivals", nargs="+", default=list(RIVALS), metavar="NAME", help=f"of {', '.join(RIVALS)}, lngd-NAME")
    add("--fields", action="append", default=[], metavar="lngd-NAME:a=b,c=d", help="the fields of a variant of LNGD")
    add("--trials", type=int, default=8, help="tuning runs a rival and tuning seed (default: %(default)s)")
    add("--tuning-seeds", type=int, nargs="+", default=[101], help="default: 101")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="reporting seeds, not those of tuning (default: 1 2 3)")
    add(
        "--steps",
        type=int,
        nargs="+",
        help="lengths of the reported runs; tuning takes the longest (default: the task's)",
    )
    add("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    add("--results", type=Path, help="file of results (default: results/TASK.json)")
    add(
        "--forget",
        nargs="+",
        default=[],
        metavar="NAME",
        help="first drop the rows of rivals whose code changed",
    )
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> dict[str, str]:
    """Checks the arguments and returns the fields of LNGD's variants.

    Raises:
        ValueError: names the argument, the value and what is accepted.
    """
    for name in args.rivals:
        rival(name)
    common = set(args.seeds) & set(args.tuning_seeds)
    if args.report and common:
        raise ValueError(f"--seeds: {sorted(common)} are tuning seeds too; report on others")
    if (args.tune or args.report or args.trial) and args.data is None:
        raise ValueError("--data: needed to run anything; only --table and --plot do without")
    for name, least in (("trials", 1), ("threads", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}: got {getattr(args, name)}, accepted: at least {least}")
    check_task(args.task)
    if args.steps and min(args.steps) < 8:
        raise ValueError(f"--steps: got {min(args.steps)}, accepted: at least 8")
    fields = {}
    for item in args.fields:
        name, separator, text = item.partition(":")
        if not separator or not name.startswith("lngd-"):
            raise ValueError(f"--fields: got {item!r}, accepted: lngd-NAME:a=b,c=d")
        fields[name] = text
    return fields


class Runner:
    """Runs what the file of results lacks, behind one progress bar."""

    def __init__(self, results: Results, task: Task, steps: int, runs: int) -> None:
        self.results = results
        self.task = task
        self.bar = tqdm(total=runs * steps, unit="step", smoothing=0.02, dynamic_ncols=True)

    def run(self, phase: str, name: str, settings: Settings, seed: int, steps: int) -> Row:
        """The row of a run, from the file or made now."""
        known = self.results.find(phase, name, settings, seed=seed, steps=steps)
        if known:
            self.bar.total -= steps
            self.bar.refresh()
            return known[0]
        self.bar.set_description(f"{phase} {name} seed {seed} lr {settings.text()}")
        done = 0

        def progress(step: int, loss: float) -> None:
            nonlocal done
            done = step
            self.bar.update(1)
            if step % 10 == 0:
                self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

        row = {"phase": phase, **train(name, settings, seed, steps, self.task, progress, phase != "report")}
        self.bar.update(steps - done)
        self.results.add(row)
        outcome = "diverged" if row["diverged"] else f"{row['loss']:.4f}"
        self.bar.write(
            f"{phase:6} {name:12} seed {seed:<4} lr {settings.text():24} {outcome:>9} {row['seconds']:7.1f} s"
        )
        return row


def tune(args: argparse.Namespace, fields: dict[str, str], results: Results, task: Task) -> None:
    """The same search for every rival, one trial of each in turn."""
    runner = Runner(results, task, max(args.steps), len(args.rivals) * args.trials * len(args.tuning_seeds))
    scores: dict[tuple[str, Settings], float] = {}

    def score(name: str, settings: Settings) -> float:
        if (name, settings) not in scores:
            rows = [runner.run("tune", name, settings, seed, max(args.steps)) for seed in args.tuning_seeds]
            losses = [math.inf if row["diverged"] else row["loss"] for row in rows]
            scores[name, settings] = sum(losses) / len(losses)
        return scores[name, settings]

    searches = {}
    for name, start in tuning_starts(args.rivals, task.starts, fields).items():
        searches[name] = search(start, args.trials, lambda settings, name=name: score(name, settings))  # type: ignore[misc]
    for _ in range(args.trials):
        for name, trials in searches.items():
            settings = next(trials, None)
            if settings is not None:
                score(name, settings)
    runner.bar.close()


def report(args: argparse.Namespace, results: Results, task: Task) -> None:
    """Paired, interleaved runs: for each seed and length every rival once, the first one another each time."""
    best = {name: results.best(name) for name in args.rivals}
    runner = Runner(results, task, max(args.steps), len(args.rivals) * len(args.seeds) * len(args.steps))
    for turn, seed in enumerate(args.seeds):
        for steps in sorted(args.steps, reverse=True):
            start = turn % len(args.rivals)
            for name in args.rivals[start:] + args.rivals[:start]:
                runner.run("report", name, best[name], seed, steps)
    runner.bar.close()


def try_fields(args: argparse.Namespace, results: Results, task: Task) -> None:
    """Single runs of LNGD; `lr`, `other_lr`, `fresh`, `weight_decay` are the settings', all else are LNGD's fields."""
    parsed = []
    for text in args.trial:
        items = dict(item.partition("=")[::2] for item in text.split(",") if item)
        own: dict[str, Any] = {
            key: float(items.pop(key)) for key in ("lr", "other_lr", "fresh", "weight_decay") if key in items
        }
        own["fields"] = ",".join(f"{key}={value}" for key, value in items.items())
        parsed.append(Settings(**{**task.starts["lngd"].to_dict(), **own}))
    runner = Runner(results, task, max(args.steps), len(parsed))
    for settings in parsed:
        runner.run("trial", "lngd", settings, args.tuning_seeds[0], max(args.steps))
    runner.bar.close()


def main(arguments: list[str] | None = None) -> None:
    """Does what the command line asks for, in the order tuning, trials, report, table, picture."""
    args = parse(arguments)
    fields = check(args)
    torch.set_num_threads(args.threads)
    results = Results(args.results or HERE / "results" / f"{args.task}.json")
    if args.forget:
        print(f"{results.drop(args.forget)} rows dropped")
    if args.tune or args.trial or args.report:
        task = load_task(args.task, args.data, args.model)
        args.steps = args.steps or [task.steps]
        if args.tune:
            tune(args, fields, results, task)
        if args.trial:
            try_fields(args, results, task)
        if args.report:
            report(args, results, task)
    if args.table or args.plot:
        print(tuning_table(results, args.rivals, label))
        print(results_table(results, args.rivals, label))
    if args.plot:
        picture = results.path.with_suffix(".png")
        draw(results, args.rivals, label, picture, TASKS[args.task])
        print(f"drawn: {picture}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
