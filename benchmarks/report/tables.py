"""Markdown tables of `benchmarks.studies.compare_optimizers`, from the file of results alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING

from benchmarks.report.clocks import CURVES, REFERENCE, on_one_clock, time_to

if TYPE_CHECKING:
    from benchmarks.studies.runs import Results, Row

Curve = list[tuple[float, float]]
Label = Callable[[str], str]
# Whose final quality times are measured to.
TARGETS = ("adamw", "adamw-one", "muon", "soap")


def reported(results: Results, name: str) -> list[Row]:
    """The reported runs of a rival that are of full length and did not diverge, on one clock."""
    rows = results.find("report", name)
    longest = max((row["steps"] for row in rows), default=0)
    return on_one_clock(results, [row for row in rows if row["steps"] == longest and not row["diverged"]])


def end_points(results: Results, name: str, metric: str, seeds: Collection[int] = ()) -> Curve:
    """(mean seconds, quality) of the runs of each length, each on a schedule to its own end; of these seeds, or all."""
    rows = on_one_clock(results, [row for row in results.find("report", name) if not row["diverged"]])
    rows = [row for row in rows if not seeds or row["seed"] in seeds]
    lengths = sorted({row["steps"] for row in rows})
    groups = [[row for row in rows if row["steps"] == length] for length in lengths]
    return [(mean(r["seconds"] for r in group), quality(group, metric)) for group in groups]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "–"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def tuning_table(results: Results, names: Sequence[str], label: Label) -> str:
    """Every tuning run: the rates tried and the loss; bold: the settings that are reported."""
    from benchmarks.studies.rivals import Settings

    body = []
    for name in names:
        rows = results.find("tune", name)
        best = results.best(name).to_dict() if rows else None
        tried = []
        for row in rows:
            text = Settings(**row["settings"]).text()
            entry = f"{text}: diverged" if row["diverged"] else f"{text}: {row['loss']:.3f}"
            tried.append(f"**{entry}**" if row["settings"] == best else entry)
        if tried:
            body.append([label(name), str(len(tried)), ", ".join(tried)])
    return table(["tuning", "runs", "matrices' rate / other rate / momentum: validation loss"], body) if body else ""


def metric_of(results: Results, names: Sequence[str]) -> str:
    """What decides: ``accuracy`` where there is one, else ``loss``."""
    return "accuracy" if any("accuracy" in row for name in names for row in reported(results, name)) else "loss"


def quality_curve(rows: Sequence[Row], metric: str) -> list[tuple[float, float, float]]:
    """(steps, mean seconds, what falls as quality rises: mean loss or minus mean accuracy) at each recorded step."""
    points = []
    for same_step in zip(*(row[CURVES[metric]] for row in rows), strict=True):
        value = mean(p[2] for p in same_step)
        points.append((same_step[0][0], mean(p[1] for p in same_step), -value if metric == "accuracy" else value))
    return points


def quality(rows: Sequence[Row], metric: str) -> float:
    """The mean of the final metric, as in :func:`quality_curve`."""
    value = mean(row[metric] for row in rows)
    return -value if metric == "accuracy" else value


def time_to_quality(rows: Sequence[Row], target: float, metric: str, axis: int = 1) -> float | None:
    """Seconds (axis 1) or steps (axis 0) at which the mean run is as good as `target`; none: never."""
    return time_to([(point[axis], point[2]) for point in quality_curve(rows, metric)], target) if rows else None


def results_table(results: Results, names: Sequence[str], label: Label) -> str:
    """:func:`results_rows` as a table."""
    head, rows = results_rows(results, names)
    return table(head, [[label(name), *cells] for name, cells in rows.items()]) if rows else "no reported runs yet"


def results_rows(results: Results, names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Final figures, seconds, and seconds and steps to AdamW's; a diverged run is counted, not hidden.

    Returns:
        titles, that of the rival first, and the cells of each rival that was reported, without its name.
    """
    reference = reported(results, REFERENCE)
    metric = metric_of(results, names)
    target = quality(reference, metric) if reference else None
    has_bleu = any("bleu" in row for name in names for row in reported(results, name))
    body: dict[str, list[str]] = {}
    for name in names:
        everything = results.find("report", name)
        rows = reported(results, name)
        if not everything:
            continue
        cells = [spread([row["loss"] for row in rows], 3)]
        if metric == "accuracy":
            cells.append(spread([100 * row["accuracy"] for row in rows], 1))
        if has_bleu:
            cells.append(spread([row["bleu"] for row in rows], 1))
        seconds, steps = (
            None if target is None else time_to_quality(rows, target, metric, axis=axis) for axis in (1, 0)
        )
        cells += [spread([row["seconds"] for row in rows], 1), _number(seconds, "never"), _number(steps, "never", 0)]
        cells.append(f"{mean(row['seconds'] / row['steps'] for row in rows) * 1e3:.0f}" if rows else "–")
        cells.append(f"{mean(row['state_mib'] for row in rows):.1f}" if rows else "–")
        peaks = [row["peak_mib"] for row in rows if row.get("peak_mib")]
        cells.append(f"{mean(peaks):.0f}" if peaks else "–")
        diverged = sum(row["diverged"] for row in everything)
        body[name] = [*cells, f"{len(rows)}", f"{diverged}"]
    head = ["optimizer", "loss", *(["accuracy, %"] if metric == "accuracy" else [])]
    head += [*(["BLEU"] if has_bleu else []), "seconds"]
    head += [f"seconds to AdamW's {metric}", "steps to it", "ms a step", "state, MiB", "peak, MiB", "seeds", "diverged"]
    return head, body


@dataclass(frozen=True)
class Ratio:
    """Seconds of a rival to another one's final quality, over the other one's seconds; none: never.

    Attributes:
        within: in its runs of full length.
        own: over its runs of several lengths, each with its schedule to its own end; quality and seconds of both sides
            are those of the same seeds, on which it ran at each of its lengths.
        bound: `own` is that of the shortest, and an upper bound.
        seeds: how many these are; 0: it has no shorter runs.
    """

    within: float | None
    own: float | None
    bound: bool
    seeds: int

    def texts(self, digits: int = 2) -> tuple[str, str]:
        """Both, for a table; a single seed is told."""
        first, alone = "≤ " if self.bound else "", " (one seed)" if self.seeds == 1 else ""
        own = first + _number(self.own, "never", digits) + alone if self.seeds else "–"
        return _number(self.within, "never", digits), own


def ratio(results: Results, name: str, other: str, metric: str) -> Ratio:
    """Of a rival's time to another one's quality."""

    def parts(seconds: float | None, of: Sequence[Row]) -> float | None:
        return seconds and seconds / mean(row["seconds"] for row in of)

    rows, theirs = reported(results, name), reported(results, other)
    within = parts(time_to_quality(rows, quality(theirs, metric), metric), theirs)
    seeds = seeds_of_all_lengths(results, name) & {row["seed"] for row in theirs}
    if not seeds:
        return Ratio(within, None, False, 0)
    theirs = [row for row in theirs if row["seed"] in seeds]
    ends = end_points(results, name, metric, seeds)
    seconds = time_to(ends, quality(theirs, metric))
    return Ratio(within, parts(seconds, theirs), seconds == ends[0][0], len(seeds))


def seeds_of_all_lengths(results: Results, name: str) -> set[int]:
    """The seeds on which a rival was reported at each of its lengths; none if there is but one length."""
    rows = [row for row in results.find("report", name) if not row["diverged"]]
    lengths = {row["steps"] for row in rows}
    if len(lengths) < 2:
        return set()
    return set.intersection(*({row["seed"] for row in rows if row["steps"] == length} for length in lengths))


def ratio_table(results: Results, names: Sequence[str], label: Label) -> str:
    """:func:`ratio` of every rival to AdamW, Muon and SOAP."""
    metric = metric_of(results, names)
    targets = [name for name in names if name in TARGETS and reported(results, name)]
    shown = [name for name in names if reported(results, name)]
    if not shown or not targets:
        return ""
    body = [
        [label(name), *(c for other in targets for c in ratio(results, name, other, metric).texts())] for name in shown
    ]
    head = ["seconds to a rival's quality / its seconds"]
    for other in targets:
        head += [f"{label(other)}, within runs", "own schedules"]
    return table(head, body)


def effort(results: Results) -> str:
    """What the study took: hours of training, evaluation left out."""
    seconds = [row["seconds"] for row in results.rows]
    hours, longest = sum(seconds) / 3600, max(seconds, default=0)
    return f"{len(seconds)} runs, {hours:.1f} hours of training, the longest of {longest:.0f} s\n"


def _number(value: float | None, otherwise: str, digits: int = 1) -> str:
    return otherwise if value is None else f"{value:.{digits}f}"
