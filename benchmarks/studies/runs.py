"""One training run, the file of results, and the search that tunes every rival alike."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.rivals import RATES, RIVALS, Settings
from benchmarks.tasks.task import Task
from hf_lngd.torch_internals import cpu_capabilities

Row = dict[str, Any]
FINAL_RATE = 0.05
CLIP = 1.0
LOG_EVERY = 25
# A loss this far above the first one, or that of guessing if it is more, will not come back within the run.
DIVERGED = 1.5
# The search ends when it would move a rate by less.
FINEST = 1.1
# Any of these makes matmuls in bfloat16 faster than in float32; else they are emulated.
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
# Weight decay is moved by the square of what the others are: a factor of two of it changes little.
COARSE = {"weight_decay": 2}


def schedule(step: int, steps: int, warmup: int) -> float:
    """The factor of both rates: linear warm-up, then linear to 5 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (1 - FINAL_RATE) * (step - warmup) / max(1, steps - warmup)


def train(
    name: str,
    settings: Settings,
    seed: int,
    steps: int,
    warmup: int,
    task: Task,
    progress: Callable[[int, float], None],
    *,
    tuning: bool = False,
    clip: float | None = CLIP,
    evaluations: int = 4,
) -> Row:
    """Trains once and returns the row of results. Seconds are those of training: evaluation is left out.

    `name` is of `RIVALS`. The seed decides weights, order of the data and dropout, so rivals of one seed are paired.
    On one thread seconds are the process's own, so that other work on the machine does not count; on several they are
    those on the wall. `clip`: the largest norm of all gradients; None: any. `evaluations`: how many, the last at the
    end.
    """
    clock = clock_here()
    now = time.process_time if clock["clock"] == "cpu" else time.perf_counter
    reset_peak()
    model = task.make_model(seed)
    optimizer = RIVALS[name](model, settings)
    scheduler = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: schedule(step, steps, warmup))
        for one in optimizer.optimizers
    ]
    checkpoints = {round(steps * part / evaluations) for part in range(1, evaluations + 1)}
    stream = task.batches(seed)
    model.train()
    seconds, window, worst = 0.0, [], math.inf
    train_curve: list[tuple[int, float, float]] = []
    curves: dict[str, list[tuple[int, float, float]]] = {"loss": []}
    diverged = False
    for step in range(1, steps + 1):
        start = now()
        batch = next(stream)
        outputs = model(**batch)
        optimizer.fisher_pass(outputs.logits, batch["labels"])
        loss = outputs.loss
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        for one in scheduler:
            one.step()
        value = loss.item()
        seconds += now() - start
        if step == 1:  # a pretrained model may meet an easy batch first
            worst = DIVERGED * max(value, math.log(outputs.logits.shape[-1]))
        window.append(value)
        diverged = not math.isfinite(value) or value > worst
        if diverged:
            break
        if step % LOG_EVERY == 0 or step == steps:
            train_curve.append((step, round(seconds, 3), round(sum(window) / len(window), 5)))
            window = []
        if step in checkpoints:
            optimizer.capture(False)
            for metric, found in task.evaluate(model, tuning).items():
                curves.setdefault(metric, []).append((step, round(seconds, 3), round(found, 5)))
            optimizer.capture(True)
        progress(step, value)
    peak = peak_mib()
    diverged = diverged or not curves["loss"] or not math.isfinite(curves["loss"][-1][2])
    optimizer.close()
    row: Row = {
        "task": task.name,
        "optimizer": name,
        "seed": seed,
        "settings": settings.to_dict(),
        "steps": steps,
        "seconds": round(seconds, 3),
        "loss": None if diverged else curves["loss"][-1][2],
        "diverged": diverged,
        "train_curve": train_curve,
        "validation_curve": curves["loss"],
    }
    if "accuracy" in curves:
        row |= {"accuracy": None if diverged else curves["accuracy"][-1][2], "accuracy_curve": curves["accuracy"]}
    if task.final is not None and not tuning and not diverged:
        row |= {name: round(value, 3) for name, value in task.final(model).items()}
    return row | {
        "state_mib": round(optimizer.state_bytes() / 2**20, 3),
        "peak_mib": peak,
        **clock,
        "torch": torch.__version__,
    }


def hardware() -> str:
    """What decides a row's seconds, without naming a machine: rows of two kinds are not on one clock."""
    capabilities = cpu_capabilities()
    emulated = "" if any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS) else ", bfloat16 emulated"
    return f"CPU, {torch.get_num_threads()} threads{emulated}"


def clock_here() -> dict[str, str]:
    """What rows have in common whose seconds compare: the kind of hardware; the day, as another may be on a faster
    machine of that kind; and whether seconds are the process's own or those on the wall."""
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    return {"hardware": hardware(), "day": _today(), "clock": clock}


@cache
def _today() -> str:
    """The day on which the process first asked: what goes on past midnight is still on one clock."""
    return date.today().isoformat()


def reset_peak() -> None:
    """Start anew to look for the process's largest resident set (Linux; elsewhere nothing)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs left to the allocator is not this one's
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib() -> int | None:
    """MiB of the largest resident set since :func:`reset_peak`: interpreter, data, model and optimizer; or None."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:")), None)


class Results:
    """Rows in a JSON file, written after every run, so that interrupted work resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def find(self, phase: str, name: str, settings: Settings | None = None, **wanted: int | str) -> list[Row]:
        """Rows of a phase and rival, of these settings, task, seed and steps where given."""
        return [
            row
            for row in self.rows
            if (row["phase"], row["optimizer"]) == (phase, name)
            and (settings is None or row["settings"] == settings.to_dict())
            and all(row[key] == value for key, value in wanted.items())
        ]

    def add(self, row: Row) -> None:
        """Appends a row and writes the file, one row a line."""
        self.rows.append(row)
        self.save()

    def drop(self, names: Iterable[str]) -> int:
        """Forgets all rows of some rivals; returns how many."""
        gone = set(names)
        before = len(self.rows)
        self.rows = [row for row in self.rows if row["optimizer"] not in gone]
        self.save()
        return before - len(self.rows)

    def save(self) -> None:
        """Writes the file in one move: an interruption leaves the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        partial = self.path.with_suffix(".partial")
        partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        os.replace(partial, self.path)

    def best(self, name: str) -> Settings:
        """The tuned settings of a rival: those with the lowest mean loss over the tuning seeds.

        Raises:
            ValueError: it has none.
        """
        losses: dict[Settings, list[float]] = {}
        for row in self.find("tune", name):
            losses.setdefault(Settings(**row["settings"]), []).append(math.inf if row["diverged"] else row["loss"])
        if not losses:
            raise ValueError(f"{self.path}: no tuning run of {name} yet; run the phase tune first (--phases tune)")
        return min(losses, key=lambda settings: sum(losses[settings]) / len(losses[settings]))


def moved(settings: Settings, rate: str, value: float) -> Settings:
    """The settings with one rate changed, to three digits: rates that a person can read and repeat."""
    return Settings(**{**settings.to_dict(), rate: float(f"{value:.3g}")})


def place(settings: Settings) -> tuple[int, ...]:
    """Where on a fine grid of rates (eight points a doubling) settings lie: none is tried twice."""
    return tuple(round(8 * math.log2(getattr(settings, rate) or 1)) for rate in RATES)


def search(
    start: Settings, trials: int, loss_of: Callable[[Settings], float], tuned: Sequence[str] = RATES
) -> Iterator[Settings]:
    """Yields each trial before it is scored: a pattern search over logarithms of rates, alike for every rival.

    From the best settings so far, each rate of `tuned` in turn is doubled and halved (weight decay: times four, a
    quarter); when no neighbour is better, the factor becomes its root. `loss_of` scores settings (infinite for a
    diverged run) and must remember: it is asked again.
    """
    tried: set[tuple[int, ...]] = set()
    best, factor = start, 2.0

    def neighbours() -> list[Settings]:
        moves = [(field, ratio ** COARSE.get(field, 1)) for field in tuned for ratio in (factor, 1 / factor)]
        return [moved(best, field, getattr(best, field) * ratio) for field, ratio in moves]

    def is_new(settings: Settings) -> bool:
        return settings.fresh < 1 and place(settings) not in tried

    queue = [start]
    while len(tried) < trials and factor > FINEST:
        queue = [settings for settings in queue if is_new(settings)]
        if not queue:
            queue = [settings for settings in neighbours() if is_new(settings)]
            if not queue:
                factor **= 0.5
                continue
        settings = queue.pop(0)
        yield settings
        tried.add(place(settings))
        if loss_of(settings) < loss_of(best):
            # A better rate: look further along the same line before the other one.
            ahead = settings
            for field in tuned:
                if getattr(settings, field) != getattr(best, field):
                    ahead = moved(ahead, field, getattr(settings, field) ** 2 / getattr(best, field))
            best, queue = settings, [ahead]
