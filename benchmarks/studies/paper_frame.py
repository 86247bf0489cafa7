"""The paper's rivals and LNGD in the paper's own frame, on CIFAR-10: one search for all.

    python -m benchmarks.studies.paper_frame --data DIR [--methods kfac lngd] [--table]

and other readings of what the paper's text leaves open (`paper_readings`), by the same search.

The frame: momentum 0.9 of the updates, decoupled weight decay 0.004, no clipping, no rescaling of the direction but
LNGD's Eq. 12-13, whole factors with the bias in them, intervals of 20 in 200 steps (two epochs), and each method's
best rate of the paper's grid in runs of half that length on a tuning seed. Parameters that are no matrices learn by
AdamW at 3e-3 for all. Rows go to `results/paper_frame.json`; runs that are there are not run again. The other frame,
ours, is that of `specs/cifar10-resnet.toml` in 400 steps: momentum of the gradient, and every direction rescaled.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.report import paper_tables
from benchmarks.report.pictures import draw
from benchmarks.report.tables import spread, table
from benchmarks.studies import paper_readings as readings
from benchmarks.studies.rivals import RIVALS, Settings
from benchmarks.studies.runs import Results, Row, clock_here, train
from benchmarks.studies.spec import named
from benchmarks.tasks import cifar10
from benchmarks.tasks.registry import load_task
from benchmarks.tasks.task import Task

RESULTS = Path(__file__).resolve().parents[1] / "results"
OURS = "cifar10-resnet"  # the study in our frame
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
TUNING_SEED, SEEDS = 101, (1, 2)
WARMUP = 0.1
OTHER_LR, DECAY, FRESH = 3e-3, 0.004, 0.1
INTERVAL = 20
PAPER = f"preset=paper,factor_interval={INTERVAL},inverse_interval={INTERVAL}"
RELATIVE_MOMENTUM = f"{PAPER},damping=1.0,momentum_on=gradient"


@dataclass(frozen=True)
class Study:
    """A task, the steps of its reported runs and of those that search, and how often the former are evaluated."""

    task: str
    steps: int
    search: int
    evaluations: int = 4


STUDIES = {
    "short": Study("cifar10-resnet", 200, 100),
    "translation": Study("multi30k", 300, 150),
    "long": Study("cifar10-resnet18", 632, 79, evaluations=8),  # 8 epochs of 10,000 images, and one
}


@dataclass(frozen=True)
class Method:
    """One of the paper's, or a reading of its text: whose optimizer it is (`rivals.RIVALS`), LNGD's fields, where the
    search starts, the rows of `results/cifar10-resnet.json` that are its own in our frame, changes of the code."""

    label: str
    rival: str
    start: float
    fields: str = ""
    ours: str = ""
    reading: readings.Reading = readings.text

    def settings(self, lr: float) -> Settings:
        """In the paper's frame at this rate."""
        return Settings(lr, OTHER_LR, FRESH, DECAY, self.fields)


def _family(name: str, label: str, fisher: str = "empirical", ours: str = "") -> Method:
    return Method(label, "lngd", 1e-3, f"{PAPER},family={name},fisher={fisher},rate=none", ours)


METHODS = {
    "sgd": Method("SGD", "sgd", 0.1, ours="sgd"),
    "adamw": Method("Adam", "adamw", 3e-3, ours="adamw"),
    "kfac": _family("kfac", "KFAC", "true"),
    "ekfac": _family("ekfac", "EKFAC", "true"),
    "tkfac": _family("tkfac", "TKFAC", "true"),
    "ng+": _family("ng+", "NG+", ours="ng+"),
    "kfac-empirical": _family("kfac", "KFAC, empirical", ours="kfac"),
    "ekfac-empirical": _family("ekfac", "EKFAC, empirical", ours="ekfac"),
    "tkfac-empirical": _family("tkfac", "TKFAC, empirical", ours="tkfac"),
    "lngd-sample": Method("LNGD-sample", "lngd", 0.03, f"{PAPER},rate=none", "lngd-natural"),
    "lngd-lr": Method("LNGD-lr", "lngd", 0.03, f"{PAPER},fisher=true"),
    "lngd": Method("LNGD", "lngd", 0.03, PAPER),
}
READINGS = {
    "lngd": METHODS["lngd"],
    "per-image": Method("Φ a sum over an image's locations", "lngd", 0.03, PAPER, reading=readings.per_image),
    "activation": Method("φ' of the activation alone", "lngd", 0.03, PAPER, reading=readings.activation_alone),
    "identity": Method("φ' = 1", "lngd", 0.03, PAPER, reading=readings.no_activation),
    "expected": Method("the mean over samples, not one draw", "lngd", 0.03, f"{PAPER},fisher=expected"),
    "relative": Method("λ = tr/d without bounds", "lngd", 0.03, f"{PAPER},damping=1.0"),
    "mu-1e-3": Method("μ = 1e-3", "lngd", 0.03, PAPER, reading=readings.mu(1e-3)),
    "mu-1": Method("μ = 1", "lngd", 0.03, PAPER, reading=readings.mu(1.0)),
    "momentum": Method("momentum inside the rate", "lngd", 0.03, f"{PAPER},momentum_on=gradient"),
    "relative-momentum": Method("λ = tr/d without bounds, momentum inside the rate", "lngd", 0.1, RELATIVE_MOMENTUM),
    "batch": Method("Eq. 13 with the batch's gradient, μ = 1e-3", "lngd", 0.03, PAPER, reading=readings.of_batch),
    "unofficial": Method(
        "the unofficial version's", "lngd", 0.03, f"{PAPER},fisher=empirical", reading=readings.unofficial
    ),
    "held": Method("Eq. 12-13 in factor steps, held between", "lngd", 0.03, PAPER, reading=readings.held),
    "eighth": Method("Eq. 12-13 of every eighth image", "lngd", 0.03, PAPER, reading=readings.eighth),
    "part": Method("Eq. 12-13 of 16 images and every eighth other", "lngd", 0.03, PAPER, reading=readings.as_built),
    "relative-momentum-part": Method(
        "λ without bounds, momentum inside the rate, 16 images and every eighth other",
        "lngd",
        0.1,
        RELATIVE_MOMENTUM,
        reading=readings.as_built,
    ),
}
ALL = METHODS | READINGS
# Whose curves are drawn, and in whose colours (`pictures.STYLES`).
DRAWN = {"sgd": "sgd", "adamw": "adamw", "kfac": "kfac", "part": "lngd-paper", "relative-momentum-part": "lngd-lr"}
PUBLISHED = paper_tables.STUDIES[1].published


def loss_of(row: Row) -> float:
    """Its final loss; infinite where it diverged."""
    return math.inf if row["diverged"] else float(row["loss"])


def climb(start: float, loss_at: dict[float, float]) -> float | None:
    """The next rate of the grid to try, or None: the best has a worse one, or the grid's end, on either side."""
    if not loss_at:
        return start
    at = GRID.index(min(loss_at, key=lambda rate: (loss_at[rate], rate)))  # where all diverged, the lowest
    for rate in GRID[max(0, at - 1) : at + 2]:
        if rate not in loss_at:
            return rate
    return None


def runs_of(results: Results, study: Study, phase: str, name: str) -> dict[float, list[Row]]:
    """A method's rows by rate."""
    steps = study.search if phase == "tune" else study.steps
    found: dict[float, list[Row]] = {}
    for row in results.find(phase, ALL[name].rival, method=name, task=study.task, steps=steps):
        found.setdefault(row["settings"]["lr"], []).append(row)
    return found


def best_rate(results: Results, study: Study, name: str) -> float | None:
    """That of the searching runs with the lowest loss; None: there is none that ended."""
    losses = {rate: loss_of(rows[0]) for rate, rows in runs_of(results, study, "tune", name).items()}
    best = min(losses, key=lambda rate: losses[rate], default=None)
    return None if best is None or math.isinf(losses[best]) else best


def run_study(results: Results, study: Study, task: Task, names: list[str]) -> None:
    """Runs what the file of results lacks: each method's search, then its best rate on the reported seeds."""

    def run(phase: str, name: str, rate: float, seed: int) -> Row:
        rows = runs_of(results, study, phase, name).get(rate, [])
        found = next((row for row in rows if row["seed"] == seed), None)
        if found is None:
            method, tuning = ALL[name], phase == "tune"
            steps, settings = study.search if tuning else study.steps, method.settings(rate)
            options: dict[str, Any] = {"tuning": tuning, "clip": None, "evaluations": study.evaluations}
            with method.reading():
                row = train(method.rival, settings, seed, steps, round(WARMUP * steps), task, _silent, **options)
            found = {"phase": phase, "method": name, **row}
            results.add(found)
        return found

    for name in tqdm(names):
        losses: dict[float, float] = {}
        while (rate := climb(ALL[name].start, losses)) is not None:
            losses[rate] = loss_of(run("tune", name, rate, TUNING_SEED))
        best = best_rate(results, study, name)
        if best is not None:
            for seed in SEEDS:
                run("report", name, best, seed)


def time_steps(results: Results, study: Study, task: Task, names: list[str], intervals: int = 2) -> None:
    """A row (phase ``time``) of each method: seconds of a step in the mean over an interval, methods taking turns step
    by step, after one interval of warm-up. Methods that change the code are changed for their own steps alone."""
    runs: dict[str, tuple[Any, Any, Any, list[float]]] = {}
    for name in names:
        model, method = task.make_model(SEEDS[0]).train(), ALL[name]
        with method.reading():
            optimizer = RIVALS[method.rival](model, method.settings(method.start))
        runs[name] = (model, optimizer, task.batches(SEEDS[0]), [])
    for _ in tqdm(range(INTERVAL * (intervals + 1))):
        for name, (model, optimizer, stream, seconds) in runs.items():
            with ALL[name].reading():
                start = time.process_time()
                batch = next(stream)
                outputs = model(**batch)
                optimizer.fisher_pass(outputs.logits, batch["labels"])
                outputs.loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(time.process_time() - start)
    for name, (_, optimizer, _, seconds) in runs.items():
        optimizer.close()
        plain = [value for i, value in enumerate(seconds) if i >= INTERVAL and i % INTERVAL]
        factor = [value for i, value in enumerate(seconds) if i >= INTERVAL and not i % INTERVAL]
        value = (median(plain) * (INTERVAL - 1) + median(factor)) / INTERVAL
        row = {"phase": "time", "method": name, "optimizer": ALL[name].rival, "task": study.task, "steps": INTERVAL}
        results.add({**row, "seconds": round(value, 4), **clock_here()})


def times_table(results: Results, study: Study) -> str:
    """Markdown: milliseconds of a step of the methods that were timed beside one another, and KFAC's steps in it."""
    found = {
        row["method"]: row["seconds"] for row in results.rows if (row["phase"], row["task"]) == ("time", study.task)
    }
    kfac = found.get("kfac", math.nan)
    body = [[ALL[name].label, f"{1000 * found[name]:.0f}", f"{found[name] / kfac:.2f}"] for name in found]
    return table(["a step", "ms", "in KFAC's"], body)


def _silent(step: int, loss: float) -> None:
    pass


def frames_table(results: Results, study: Study, ours: Results) -> str:
    """Markdown: of each method its rate, loss and accuracy in the paper's frame; on the task of the study in `ours`
    also what the paper has it take, and loss and accuracy in our frame."""
    body = []
    for name, method in METHODS.items():
        cells = _cells(results, study, name)
        if cells:
            published = PUBLISHED.get(method.label)
            epochs = "–" if published is None else f"{published:g}"
            beside = [epochs, *_quality(_report(ours, method.ours))] if study.task == OURS else []
            body.append([method.label, *cells, *beside])
    more = ["published: epochs to 91 %", "loss in our frame", "accuracy, %"] if study.task == OURS else []
    return table(["method", "rate", "loss", "accuracy, %", *more], body)


def readings_table(results: Results, study: Study) -> str:
    """Markdown: of each reading its rate, loss and accuracy."""
    body = [[READINGS[name].label, *cells] for name in READINGS if (cells := _cells(results, study, name))]
    return table(["reading", "rate", "loss", "accuracy, %"], body)


def draw_curves(results: Results, study: Study, path: Path) -> None:
    """Accuracy against steps and seconds: the paper's figures 2 and 3. Raises ValueError: there is nothing to draw."""
    shown = Results(results.path)
    shown.rows = []
    for name, drawn in DRAWN.items():
        rate = best_rate(results, study, name)
        rows = [] if rate is None else runs_of(results, study, "report", name).get(rate, [])
        shown.rows += [{**row, "optimizer": drawn} for row in rows]
    label_of = {drawn: ALL[name].label for name, drawn in DRAWN.items()}
    draw(shown, list(label_of), label_of.__getitem__, path, f"{study.task}, the paper's frame")


def _cells(results: Results, study: Study, name: str) -> list[str]:
    rate = best_rate(results, study, name)
    if rate is None:
        return []
    rows = runs_of(results, study, "report", name).get(rate, [])
    if not rows:
        return []
    return [f"{rate:g}", *_quality(rows)]


def _quality(rows: list[Row]) -> list[str]:
    ended = [row for row in rows if not row["diverged"]]
    accuracy = [100 * row["accuracy"] for row in ended if "accuracy" in row]
    return [spread([row["loss"] for row in ended], 3), spread(accuracy, 1)]


def _report(ours: Results, name: str) -> list[Row]:
    found = ours.find("report", name, steps=named(OURS).steps) if name else []
    return [row for row in found if row["seed"] in SEEDS]


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, help="folder of the task's data")
    add("--study", default="short", choices=list(STUDIES), help="default: %(default)s")
    add("--methods", nargs="+", default=list(ALL), choices=list(ALL), help="default: all")
    add("--table", action="store_true", help="only print the tables of what is there")
    add("--time", action="store_true", help="time steps beside one another, in the place of training")
    add("--plot", action="store_true", help="also draw the curves of what is there, beside the file of results")
    add("--results", type=Path, default=RESULTS / "paper_frame.json", help="file of results")
    args = parser.parse_args(arguments)
    results, study = Results(args.results), STUDIES[args.study]
    if not args.table:
        if args.data is None:
            raise ValueError("--data: got none, accepted: a folder; only --table does without")
        torch.set_num_threads(1)
        task = cifar10.resnet18(args.data) if args.study == "long" else load_task(study.task, args.data)
        (time_steps if args.time else run_study)(results, study, task, args.methods)
    print(frames_table(results, study, Results(RESULTS / f"{OURS}.json")))
    print(readings_table(results, study))
    print(times_table(results, study))
    if args.plot:
        draw_curves(results, study, args.results.with_name(f"{args.results.stem}-{args.study}.png"))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
