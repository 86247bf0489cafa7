"""On whose clock seconds are: rows of several machines and days are brought onto one through AdamW's own runs there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.studies.runs import Results, Row

Clock = tuple[str, str, str]
REFERENCE = "adamw"
# Whose steps are AdamW's, whatever its rates.
REFERENCES = (REFERENCE, "adamw-one")
# Of a row, curves of (step, seconds, value): of the training loss, and of each metric.
CURVES = {"loss": "validation_curve", "accuracy": "accuracy_curve"}


def on_one_clock(results: Results, rows: Sequence[Row]) -> list[Row]:
    """The rows with all seconds in those of the clock (:func:`clock_of`) on which AdamW ran most: rows of another clock
    are scaled by what a step of AdamW took here and there. Where AdamW did not run, seconds are left as they are."""
    seconds: dict[Clock, list[float]] = {}
    for row in references(results):
        seconds.setdefault(clock_of(row), []).append(row["seconds"] / row["steps"])
    if len(seconds) < 2:
        return list(rows)
    most = max(seconds, key=lambda clock: len(seconds[clock]))
    scales = {clock: mean(seconds[most]) / mean(found) for clock, found in seconds.items()}
    return [_scaled(row, scales.get(clock_of(row), 1.0)) for row in rows]


def clock_of(row: Row) -> Clock:
    """What rows have in common whose seconds compare: hardware, day (rows without one count as one day's), and whether
    seconds are those on the wall or the process's own."""
    return row.get("hardware", ""), row.get("day", ""), row.get("clock", "wall")


def references(results: Results) -> list[Row]:
    """AdamW's runs, with two rates and with one, those included that were made for nothing but their seconds (phase
    `clock`)."""
    found = [row for phase in ("report", "clock") for name in REFERENCES for row in results.find(phase, name)]
    return [row for row in found if not row["diverged"]]


def _scaled(row: Row, scale: float) -> Row:
    curves = [key for key in (*CURVES.values(), "train_curve") if key in row]
    changed = {key: [(step, seconds * scale, value) for step, seconds, value in row[key]] for key in curves}
    return {**row, "seconds": row["seconds"] * scale, **changed}


def time_to(curve: Iterable[tuple[float, float]], target: float) -> float | None:
    """Seconds at which a curve of (seconds, loss) reaches a loss, on straight lines between its points; none: never."""
    before: tuple[float, float] | None = None
    for seconds, loss in curve:
        if loss <= target:
            if before is None or before[1] == loss:
                return seconds
            return before[0] + (before[1] - target) / (before[1] - loss) * (seconds - before[0])
        before = (seconds, loss)
    return None
