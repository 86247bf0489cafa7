"""Markdown tables and the picture of `scripts/compare_optimizers.py`, from the file of results alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from scripts import demo

if TYPE_CHECKING:
    from benchmarks.runs import Results, Row

Curve = list[tuple[float, float]]
Label = Callable[[str], str]
Clock = tuple[str, str, str]
REFERENCE = "adamw"
# Whose final quality times are measured to.
TARGETS = ("adamw", "adamw-one", "muon", "soap")
CURVES = {"loss": "validation_curve", "accuracy": "accuracy_curve"}
# Colour, line and marker of each rival, the same in every picture: variants share their family's colour.
STYLES = {
    "adamw": ("#6b7280", "-", "o"),
    "adamw-one": ("#6b7280", "--", "o"),
    "sgd": ("#60a5fa", "-", "o"),
    "muon": ("#d97706", "-", "o"),
    "soap": ("#7c3aed", "-", "o"),
    "shampoo": ("#c026d3", "-", "o"),
    "lngd": ("#0f766e", "-", "o"),
    "lngd-same": ("#0f766e", "--", "o"),
    "lngd-gram": ("#0f766e", ":", "o"),
    "lngd-paper": ("#be123c", "-", "s"),
    "lngd-lr": ("#be123c", "--", "^"),
    "lngd-sample": ("#be123c", ":", "v"),
    "kfac": ("#1e3a8a", "-", "s"),
    "ekfac": ("#1e3a8a", "--", "^"),
    "tkfac": ("#1e3a8a", ":", "v"),
    "ng+": ("#65a30d", "-", "D"),
}
UNKNOWN = ("#000000", "-", "x")
# Drawn thicker, and with the range over seeds; with few rivals all have it.
MAIN = ("adamw", "muon", "soap", "lngd")
FEW = 6


def reported(results: Results, name: str) -> list[Row]:
    """The reported runs of a rival that are of full length and did not diverge, on one clock."""
    rows = results.find("report", name)
    longest = max((row["steps"] for row in rows), default=0)
    return on_one_clock(results, [row for row in rows if row["steps"] == longest and not row["diverged"]])


def on_one_clock(results: Results, rows: Sequence[Row]) -> list[Row]:
    """The rows with all seconds in those of the clock (:func:`clock_of`) on which AdamW ran most: rows of another clock
    are scaled by what AdamW took here and there. Where AdamW did not run, seconds are left as they are."""
    seconds: dict[Clock, list[float]] = {}
    for row in references(results):
        seconds.setdefault(clock_of(row), []).append(row["seconds"])
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
    """AdamW's runs of full length, those included that were made for nothing but their seconds (phase `clock`)."""
    rows = [row for phase in ("report", "clock") for row in results.find(phase, REFERENCE) if not row["diverged"]]
    longest = max((row["steps"] for row in rows), default=0)
    return [row for row in rows if row["steps"] == longest]


def _scaled(row: Row, scale: float) -> Row:
    curves = [key for key in (*CURVES.values(), "train_curve") if key in row]
    changed = {key: [(step, seconds * scale, value) for step, seconds, value in row[key]] for key in curves}
    return {**row, "seconds": row["seconds"] * scale, **changed}


def end_points(results: Results, name: str, metric: str) -> Curve:
    """(mean seconds, quality) of the runs of each length, each on a schedule to its own end."""
    rows = on_one_clock(results, [row for row in results.find("report", name) if not row["diverged"]])
    lengths = sorted({row["steps"] for row in rows})
    groups = [[row for row in rows if row["steps"] == length] for length in lengths]
    return [(mean(r["seconds"] for r in group), quality(group, metric)) for group in groups]


def time_to(curve: Curve, target: float) -> float | None:
    """Seconds at which a falling curve reaches a loss, between its points on a straight line; none: never."""
    return demo.time_to([(0, seconds, loss) for seconds, loss in curve], target)


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
    """Every tuning run: the rates tried and the loss."""
    from benchmarks.rivals import Settings

    body = []
    for name in names:
        rows = results.find("tune", name)
        best = min((row["loss"] for row in rows if not row["diverged"]), default=None)
        tried = []
        for row in rows:
            text = Settings(**row["settings"]).text()
            entry = f"{text}: diverged" if row["diverged"] else f"{text}: {row['loss']:.3f}"
            tried.append(f"**{entry}**" if row["loss"] is not None and row["loss"] == best else entry)
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
        own: over its runs of several lengths, each with its schedule to its own end.
        bound: `own` is that of the shortest, and an upper bound.
        shorter: it has such runs.
    """

    within: float | None
    own: float | None
    bound: bool
    shorter: bool

    def texts(self) -> tuple[str, str]:
        """Both, for a table."""
        first = "≤ " if self.bound else ""
        own = first + _number(self.own, "never", 2) if self.shorter else "–"
        return _number(self.within, "never", 2), own


def ratio(results: Results, name: str, other: str, metric: str) -> Ratio:
    """Of a rival's time to another one's quality."""
    rows, theirs = reported(results, name), reported(results, other)
    target, seconds = quality(theirs, metric), mean(row["seconds"] for row in theirs)
    within = time_to_quality(rows, target, metric)
    ends = end_points(results, name, metric)
    own = time_to(ends, target) if len(ends) > 1 else None
    bound = own is not None and own == ends[0][0]
    return Ratio(within and within / seconds, own and own / seconds, bound, len(ends) > 1)


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


def draw(results: Results, names: Sequence[str], label: Label, path: Path, title: str) -> None:
    """Quality (validation loss, or test accuracy) against steps and against seconds, the range over seeds as a band;
    in the right panel also the ends of shorter runs, each with its schedule to its own end.

    Raises:
        ValueError: there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [name for name in names if reported(results, name)]
    if not shown:
        raise ValueError(f"{results.path}: no reported runs to draw; run the phase report first")
    metric = metric_of(results, shown)
    sign = -100 if metric == "accuracy" else 1
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 4.6), layout="constrained", sharey=True)
    finals: dict[str, float] = {}
    for name in sorted(shown, key=lambda name: name in MAIN):  # those that matter most on top
        rows = reported(results, name)
        curve = quality_curve(rows, metric)
        finals[name] = sign * curve[-1][2]
        strong = name in MAIN
        colour, line, marker = STYLES.get(name, UNKNOWN)
        width = 2.4 if name == "lngd" else 1.6 if strong or len(shown) <= FEW else 1.1
        style = {"color": colour, "linestyle": line, "marker": marker, "linewidth": width}
        values = [[abs(sign) * point[2] for point in row[CURVES[metric]]] for row in rows]
        low, high = ([pick(column) for column in zip(*values, strict=True)] for pick in (min, max))
        for axis, where in zip(axes, (0, 1), strict=True):
            x = [point[where] for point in curve]
            if strong or len(shown) <= FEW:
                axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(x, [sign * p[2] for p in curve], markersize=3.5, label=label(name), **style)
        ends = end_points(results, name, metric)
        if len(ends) > 1:
            seconds, ended = zip(*((seconds, sign * value) for seconds, value in ends), strict=True)
            axes[1].plot(seconds, ended, "o", markersize=6, markerfacecolor="none", color=colour)
    reference = finals.get(REFERENCE)
    for axis, name in zip(axes, ("steps", "seconds of training"), strict=True):
        if reference is not None:
            axis.axhline(reference, color=STYLES[REFERENCE][0], linewidth=0.8, linestyle=":")
        axis.set_xlabel(name)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
    axes[0].set_ylabel("test accuracy, %" if metric == "accuracy" else "validation loss, nats")
    _frame(axes[0], [sign * p[2] for name in shown for p in quality_curve(reported(results, name), metric)], metric)
    digits = 1 if metric == "accuracy" else 3
    handles = dict(zip(*reversed(axes[1].get_legend_handles_labels()), strict=True))
    order = sorted(finals, key=lambda name: finals[name], reverse=metric == "accuracy")
    entries = {f"{label(name)}: {finals[name]:.{digits}f}": handles[label(name)] for name in order}
    shorter = any(len(end_points(results, name, metric)) > 1 for name in shown)
    title_of = "final (rings: ends of shorter runs)" if shorter else "final"
    figure.legend(  # beside the panels: with every rival in it, it would cover the curves
        entries.values(), entries.keys(), loc="outside right upper", frameon=False, fontsize=8.5, title=title_of,
        title_fontsize=8.5, alignment="left",
    )  # fmt: skip
    rows = reported(results, shown[0])
    seeds = sorted({len(reported(results, name)) for name in shown})
    of_seeds = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seed" + "s" * (seeds[0] > 1)
    figure.suptitle(f"{title}, {rows[0]['steps']} steps, mean of {of_seeds}", fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _frame(axis: Any, values: list[float], metric: str) -> None:
    """Leave out the start of training and rivals that hardly learn: the better two thirds of all points are shown."""
    ranked = sorted(values, reverse=metric == "accuracy")
    best, worst = ranked[0], ranked[min(len(ranked) - 1, 2 * len(ranked) // 3)]
    low, high = sorted((best, worst))
    pad = 0.08 * (high - low) or 1.0
    axis.set_ylim(low - pad, high + pad)
