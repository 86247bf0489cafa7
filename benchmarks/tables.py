"""Markdown tables and the picture of `compare.py`, from the file of results alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from scripts import demo

if TYPE_CHECKING:
    from benchmarks.runs import Results, Row

Curve = list[tuple[float, float]]
Label = Callable[[str], str]
REFERENCE = "adamw"
COLOURS = {"adamw": "#6b7280", "muon": "#d97706", "soap": "#7c3aed", "lngd": "#0f766e"}
VARIANTS = ("#be123c", "#2563eb", "#65a30d", "#c026d3")


def reported(results: Results, name: str) -> list[Row]:
    """The reported runs of a rival that are of full length and did not diverge."""
    rows = results.find("report", name)
    longest = max((row["steps"] for row in rows), default=0)
    return [row for row in rows if row["steps"] == longest and not row["diverged"]]


def mean_curve(rows: Sequence[Row], which: str) -> Curve:
    """(mean seconds, mean loss) over seeds at each recorded step."""
    points = []
    for same_step in zip(*(row[which] for row in rows), strict=True):
        points.append((mean(p[1] for p in same_step), mean(p[2] for p in same_step)))
    return points


def end_points(results: Results, name: str) -> Curve:
    """(mean seconds, mean final validation loss) of the runs of each length, each on a schedule to its own end."""
    rows = [row for row in results.find("report", name) if not row["diverged"]]
    lengths = sorted({row["steps"] for row in rows})
    groups = [[row for row in rows if row["steps"] == length] for length in lengths]
    return [(mean(r["seconds"] for r in group), mean(r["loss"] for r in group)) for group in groups]


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


def results_table(results: Results, names: Sequence[str], label: Label) -> str:
    """Final figures, seconds, and seconds to AdamW's final loss and accuracy; a diverged run is counted, not hidden."""
    reference = reported(results, REFERENCE)
    target = mean(row["loss"] for row in reference) if reference else None
    images = any("accuracy" in row for name in names for row in reported(results, name))
    body = []
    for name in names:
        everything = results.find("report", name)
        rows = reported(results, name)
        if not everything:
            continue
        diverged = sum(row["diverged"] for row in everything)
        cells = [label(name), spread([row["loss"] for row in rows], 3)]
        if images:
            cells.append(spread([100 * row["accuracy"] for row in rows], 1))
        within, own_end = None, None
        if rows and target is not None:
            within = time_to(mean_curve(rows, "validation_curve"), target)
            ends = end_points(results, name)
            own_end = time_to(ends, target) if len(ends) > 1 else None
        cells += [spread([row["seconds"] for row in rows], 1), _seconds(within, "never")]
        if images:
            cells.append(_seconds(_time_to_accuracy(rows, reference), "never"))
        cells += [_seconds(own_end, "–")]
        cells += [f"{mean(row['seconds'] / row['steps'] for row in rows) * 1e3:.0f}" if rows else "–"]
        cells += [f"{mean(row['state_mib'] for row in rows):.1f}" if rows else "–", f"{len(rows)}", f"{diverged}"]
        body.append(cells)
    if not body:
        return "no reported runs yet"
    head = ["optimizer", "loss", *(["accuracy, %"] if images else []), "seconds", "seconds to AdamW's loss"]
    head += [*(["to AdamW's accuracy"] if images else []), "to its loss, own schedules"]
    return table([*head, "ms a step", "state, MiB", "seeds", "diverged"], body)


def _seconds(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.1f}"


def _time_to_accuracy(rows: Sequence[Row], reference: Sequence[Row]) -> float | None:
    if not rows or not reference:
        return None
    falling = [(seconds, -accuracy) for seconds, accuracy in mean_curve(rows, "accuracy_curve")]
    return time_to(falling, -mean(row["accuracy"] for row in reference))


def draw(results: Results, names: Sequence[str], label: Label, path: Path, title: str) -> None:
    """Loss against seconds: training (mean over seeds) and evaluation (marked, its range over seeds); of images, the
    accuracy.

    Raises:
        ValueError: there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [name for name in names if reported(results, name)]
    if not shown:
        raise ValueError(f"{results.path}: no reported runs to draw; run with --report first")
    extra = iter(VARIANTS)
    images = any("accuracy" in row for name in shown for row in reported(results, name))
    which, digits = ("accuracy_curve", 3) if images else ("validation_curve", 2)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for name in shown:
        rows = reported(results, name)
        colour = COLOURS.get(name) or next(extra, "#000000")
        width = 2.4 if name.startswith("lngd") else 1.6
        seconds, losses = zip(*mean_curve(rows, "train_curve"), strict=True)
        left.plot(seconds, losses, color=colour, linewidth=width, label=label(name))
        curve = mean_curve(rows, which)
        seconds, losses = zip(*curve, strict=True)
        low = [min(p[2] for p in points) for points in zip(*(r[which] for r in rows), strict=True)]
        high = [max(p[2] for p in points) for points in zip(*(r[which] for r in rows), strict=True)]
        right.fill_between(seconds, low, high, color=colour, alpha=0.15, linewidth=0)
        right.plot(seconds, losses, color=colour, linewidth=width, marker="o", markersize=4, label=label(name))
        right.annotate(
            f"{losses[-1]:.{digits}f}",
            (seconds[-1], losses[-1]),
            xytext=(5, -3),
            textcoords="offset points",
            color=colour,
            fontsize=8,
        )
    reference = reported(results, REFERENCE)
    if reference:
        final = mean(r["accuracy" if images else "loss"] for r in reference)
        right.axhline(final, color=COLOURS[REFERENCE], linewidth=0.8, linestyle=":")
    left.set_title("Training loss", loc="left", fontsize=11)
    right.set_title(
        f"{'Test accuracy' if images else 'Validation loss'} (band: range over seeds)", loc="left", fontsize=11
    )
    for axis in (left, right):
        axis.set_xlabel("seconds of training")
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
    left.set_ylabel("cross entropy (nats)")
    right.legend(frameon=False, fontsize=9)
    steps = reported(results, shown[0])[0]["steps"]
    seeds = max(len(reported(results, name)) for name in shown)
    figure.suptitle(
        f"{title}, {steps} steps, mean of {seeds} seeds"[: None if seeds > 1 else -1],
        fontsize=12,
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
