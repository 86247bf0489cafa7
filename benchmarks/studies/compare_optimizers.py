"""Compares optimizers on a task: tunes each alike, then paired runs, tables and a picture.

    python -m benchmarks.studies.compare_optimizers benchmarks/studies/specs/multi30k.toml --data DIR

The spec file names task, budget, seeds and rivals. Every run becomes a row of `benchmarks/results/TASK.json`; runs that
are there are not run again, so interrupted work goes on where it stopped. What DIR holds is said in
`docs/reproducing.md`; the phases `table` and `plot` need no data.

`--trial "lr=8e-3,other_lr=1e-2,damping=0.1"` runs LNGD once on a tuning seed with fields of its own, for finding
defaults; `--trial "rival=muon,lr=8e-3"` another rival of the study.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.report.clocks import REFERENCE, REFERENCES, clock_of, references
from benchmarks.report.pictures import draw_study
from benchmarks.report.tables import effort, ratio_table, results_table, tuning_table
from benchmarks.studies.rivals import RATES, Settings
from benchmarks.studies.runs import Results, Row, clock_here, search, train
from benchmarks.studies.spec import Spec, check_settings, read
from benchmarks.tasks.registry import load_task
from benchmarks.tasks.task import Task
from hf_lngd import LNGDConfig

RESULTS = Path(__file__).resolve().parents[1] / "results"
PHASES = ("tune", "report", "table", "plot")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("spec", type=Path, help="the study, a TOML file such as benchmarks/studies/specs/multi30k.toml")
    add("--data", type=Path, help="folder of the task's data")
    add("--model", type=Path, help="folder of the pretrained model, for a task that fine-tunes one")
    add("--phases", nargs="+", default=list(PHASES), choices=PHASES, help="what to do (default: all)")
    add("--rivals", nargs="+", metavar="NAME", help="only these of the spec's")
    add(
        "--trial",
        action="append",
        default=[],
        metavar="a=b,c=d",
        help="one run on a tuning seed, of LNGD or rival=NAME",
    )
    add("--results", type=Path, help="file of results (default: benchmarks/results/TASK.json)")
    add("--forget", nargs="+", default=[], metavar="NAME", help="first drop the rows of rivals whose code changed")
    return parser.parse_args(arguments)


def trains(args: argparse.Namespace) -> bool:
    """Whether anything is to be run, for which data are needed."""
    return bool(args.trial or {"tune", "report"} & set(args.phases))


def check(args: argparse.Namespace, spec: Spec, results: Results) -> None:
    """Raise ValueError for arguments that do not fit the study: names the argument, the value, what is accepted."""
    for name in args.rivals or ():
        if name not in spec.rivals:
            raise ValueError(f"--rivals: got {name!r}, accepted: {', '.join(spec.rivals)}")
    for text in args.trial:
        parse_trial(text, spec)
    known = {*spec.rivals, *(row["optimizer"] for row in results.rows)}
    for name in args.forget:
        if name not in known:
            raise ValueError(f"--forget: got {name!r}, accepted: {', '.join(sorted(known))}")
    if args.data is None and trains(args):
        raise ValueError("--data: got none, accepted: a folder; only --phases table plot do without")


class Runner:
    """Runs what the file of results lacks, behind one progress bar."""

    def __init__(self, results: Results, task: Task, spec: Spec, steps: int) -> None:
        self.results, self.task, self.spec = results, task, spec
        self.bar = tqdm(total=steps, unit="step", smoothing=0.02, dynamic_ncols=True)

    def run(self, phase: str, name: str, settings: Settings, seed: int, steps: int) -> Row:
        """The row of a run, from the file or made now."""
        known = self.results.find(phase, name, settings, seed=seed, steps=steps)
        if known and phase != "clock":
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

        rival, warmup = self.spec.rivals[name].rival, self.spec.warmup_of(steps)
        made = train(rival, settings, seed, steps, warmup, self.task, progress, tuning=phase != "report")
        row = {"phase": phase, **made, "optimizer": name}
        self.bar.update(steps - done)
        self.results.add(row)
        outcome = "diverged" if row["diverged"] else f"{row['loss']:.4f}"
        self.bar.write(
            f"{phase:6} {name:12} seed {seed:<4} lr {settings.text():24} {outcome:>9} {row['seconds']:7.1f} s"
        )
        return row


def tune(names: list[str], spec: Spec, results: Results, task: Task) -> None:
    """The same search for every rival, one trial of each in turn."""
    runner = Runner(results, task, spec, len(names) * spec.trials * len(spec.tuning_seeds) * spec.steps)
    scores: dict[tuple[str, Settings], float] = {}

    def score(name: str, settings: Settings) -> float:
        if (name, settings) not in scores:
            rows = [runner.run("tune", name, settings, seed, spec.steps) for seed in spec.tuning_seeds]
            losses = [math.inf if row["diverged"] else row["loss"] for row in rows]
            scores[name, settings] = sum(losses) / len(losses)
        return scores[name, settings]

    searches = {}
    for name in names:
        entrant = spec.rivals[name]
        searches[name] = search(entrant.start, spec.trials, lambda s, name=name: score(name, s), entrant.tuned)  # type: ignore[misc]
    for _ in range(spec.trials):
        for name, trials in searches.items():
            settings = next(trials, None)
            if settings is not None:
                score(name, settings)
    runner.bar.close()


def report(names: list[str], spec: Spec, results: Results, task: Task) -> None:
    """Paired, interleaved runs: for each seed and length every rival once, the first one another each time.

    A study that goes on another day, perhaps on another machine, runs AdamW once more (as soon as it is tuned), unless
    it is among the missing runs: seconds are compared through it.
    """
    best = {name: results.best(name) for name in names}
    runs = [(turn, seed, steps) for turn, seed in enumerate(spec.seeds) for steps in all_lengths(names, spec, seed)]
    planned = [
        (name, seed, steps)
        for turn, seed, steps in runs
        for name in names[turn % len(names) :] + names[: turn % len(names)]
        if steps in spec.lengths(name, seed)
    ]
    missing = [run for run in planned if not results.find("report", run[0], best[run[0]], seed=run[1], steps=run[2])]
    timed = clock_of(clock_here()) in map(clock_of, references(results))
    coming = any(name in REFERENCES for name, _, _ in missing)
    clock = bool(missing) and not (timed or coming) and bool(results.find("tune", REFERENCE))
    runner = Runner(results, task, spec, sum(steps for _, _, steps in planned) + clock * spec.steps)
    if clock:
        runner.run("clock", REFERENCE, results.best(REFERENCE), spec.seeds[0], spec.steps)
    for name, seed, steps in planned:
        runner.run("report", name, best[name], seed, steps)
    runner.bar.close()


def all_lengths(names: list[str], spec: Spec, seed: int) -> list[int]:
    """Every length that any of the rivals is reported at on this seed, the longest first."""
    return sorted({steps for name in names for steps in spec.lengths(name, seed)}, reverse=True)


def parse_trial(text: str, spec: Spec) -> tuple[str, Settings]:
    """(rival, settings) of ``rival=muon,lr=8e-3``: without a rival LNGD; what is no setting is a field of LNGD's.

    Raises:
        ValueError: no such rival in the study, no number or one out of range, a field of LNGD's for another one or that
            it does not have.
    """
    items = dict(item.partition("=")[::2] for item in text.split(",") if item)
    name = items.pop("rival", "lngd")
    if name not in spec.rivals:
        raise ValueError(f"--trial: rival: got {name!r}, accepted: {', '.join(spec.rivals)}")
    own: dict[str, Any] = {}
    for key in RATES:
        if key in items:
            value = items.pop(key)
            try:
                own[key] = float(value)
            except ValueError:
                raise ValueError(f"--trial: {key}: got {value!r}, accepted: a number") from None
    if items:
        if spec.rivals[name].rival != "lngd":
            raise ValueError(f"--trial: got {', '.join(items)} for {name}, accepted: {', '.join(RATES)}")
        own["fields"] = ",".join(f"{key}={value}" for key, value in items.items())
        LNGDConfig.from_optim_args(own["fields"])
    settings = {**spec.rivals[name].start.to_dict(), **own}
    check_settings("--trial", settings)
    return name, Settings(**settings)


def try_out(texts: list[str], spec: Spec, results: Results, task: Task) -> None:
    """Single runs on the first tuning seed, see :func:`parse_trial`."""
    parsed = [parse_trial(text, spec) for text in texts]
    runner = Runner(results, task, spec, len(parsed) * spec.steps)
    for name, settings in parsed:
        runner.run("trial", name, settings, spec.tuning_seeds[0], spec.steps)
    runner.bar.close()


def main(arguments: list[str] | None = None) -> None:
    """Does what the command line asks for, in the order tuning, reported runs, tables, picture."""
    args = parse(arguments)
    spec = read(args.spec)
    results = Results(args.results or RESULTS / f"{spec.task}.json")
    check(args, spec, results)
    names = args.rivals or list(spec.rivals)
    torch.set_num_threads(spec.threads)
    task = load_task(spec.task, args.data, args.model) if trains(args) else None  # may fail: before rows are dropped
    if args.forget:
        print(f"{results.drop(args.forget)} rows dropped")
    if task is not None:
        if args.trial:
            return try_out(args.trial, spec, results, task)
        if "tune" in args.phases:
            tune(names, spec, results, task)
        if "report" in args.phases:
            report(names, spec, results, task)
    if {"table", "plot"} & set(args.phases):
        print(tuning_table(results, names, spec.label))
        print(results_table(results, names, spec.label))
        print(ratio_table(results, names, spec.label))
        print(effort(results))
    if "plot" in args.phases:
        for picture in draw_study(results, names, spec.label, results.path.with_suffix(".png"), spec.title):
            print(f"drawn: {picture}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
