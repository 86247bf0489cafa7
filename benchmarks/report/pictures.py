"""The figure of `benchmarks.studies.compare_optimizers`: quality against steps and seconds, from the results alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.report.clocks import CURVES, REFERENCE
from benchmarks.report.tables import Label, end_points, metric_of, quality_curve, reported, seeds_of_all_lengths

if TYPE_CHECKING:
    from benchmarks.studies.runs import Results

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
    "lngd-paper": ("#be123c", "-", "s"),
    "lngd-lr": ("#be123c", "--", "^"),
    "lngd-sample": ("#be123c", ":", "v"),
    "kfac": ("#1e3a8a", "-", "s"),
    "ekfac": ("#1e3a8a", "--", "^"),
    "tkfac": ("#1e3a8a", ":", "v"),
    "ng+": ("#65a30d", "-", "D"),
}
UNKNOWN = ("#000000", "-", "x")
# The ends of shorter runs of rivals that share a colour.
RINGS = {"lngd-same": "s", "adamw-one": "s"}
# Drawn thicker, and with the range over seeds; with few rivals all have it.
MAIN = ("adamw", "muon", "soap", "lngd")
# Of a study with many rivals, those of the picture for readers: the rest have one of their own with everybody.
FEW = ("adamw", "adamw-one", "muon", "soap", "lngd", "lngd-same")


def pictures_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Whom a study's pictures show, by the end of the file's name: the main rivals, and where there are many more of
    them all in a second one."""
    if len(names) <= len(FEW) + 1:
        return {"": list(names)}
    return {"": [name for name in names if name in FEW], "-all": list(names)}


def draw_study(results: Results, names: Sequence[str], label: Label, path: Path, title: str) -> list[Path]:
    """:func:`draw` of each of :func:`pictures_of`, beside `path`; returns the files."""
    paths = []
    for end, shown in pictures_of(names).items():
        paths.append(path.with_name(f"{path.stem}{end}{path.suffix}"))
        draw(results, shown, label, paths[-1], title)
    return paths


def legend(results: Results, names: Sequence[str], label: Label) -> dict[str, str]:
    """What the picture says of each rival that was reported, the best first: its name and where it ended."""
    shown = [name for name in names if reported(results, name)]
    metric = metric_of(results, shown)
    scale, digits = (-100, 1) if metric == "accuracy" else (1, 3)
    finals = {name: scale * quality_curve(reported(results, name), metric)[-1][2] for name in shown}
    order = sorted(finals, key=lambda name: finals[name], reverse=metric == "accuracy")
    return {name: f"{label(name)}: {finals[name]:.{digits}f}" for name in order}


def described(results: Results, texts: Mapping[str, str]) -> str:
    """The :func:`legend` and the mean seconds of each rival's runs, in one line."""
    return "; ".join(
        f"{text}, {mean(row['seconds'] for row in reported(results, name)):.1f} s" for name, text in texts.items()
    )


def draw(results: Results, names: Sequence[str], label: Label, path: Path, title: str) -> None:
    """Quality (validation loss, or test accuracy) against steps and against seconds, the range over seeds as a band;
    in the right panel also the ends of shorter runs, each with its schedule to its own end, as hollow markers (of the
    seeds with runs of all lengths), unless there are many rivals or one alone has them.

    The file's `Description` is :func:`described`, so that a picture of older rows is noticed.

    Raises:
        ValueError: there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {name: own for name in names if (own := reported(results, name))}
    if not rows:
        raise ValueError(f"{results.path}: no reported runs to draw; run the phase report first")
    metric, texts = metric_of(results, list(rows)), legend(results, list(rows), label)
    curves = {name: quality_curve(own, metric) for name, own in rows.items()}
    sign = -100 if metric == "accuracy" else 1
    few = len(rows) <= len(FEW) + 1
    whole = {name: seeds for name in rows if few and (seeds := seeds_of_all_lengths(results, name))}
    if len(whole) < 2:  # beside rivals without shorter runs they would speak for one side
        whole = {}
    ends = {name: end_points(results, name, metric, seeds) for name, seeds in whole.items()}
    size = (9.5, 4.9) if few else (12.5, 4.6)
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    for name in sorted(rows, key=lambda name: name in MAIN):  # those that matter most on top
        strong = name in MAIN
        colour, line, marker = STYLES.get(name, UNKNOWN)
        width = 2.4 if name == "lngd" else 1.6 if strong or few else 1.1
        style = {"color": colour, "linestyle": line, "marker": marker, "linewidth": width}
        values = [[abs(sign) * point[2] for point in row[CURVES[metric]]] for row in rows[name]]
        low, high = ([pick(column) for column in zip(*values, strict=True)] for pick in (min, max))
        for axis, where in zip(axes, (0, 1), strict=True):
            x = [point[where] for point in curves[name]]
            if strong or few:
                axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(x, [sign * p[2] for p in curves[name]], markersize=3.5, label=texts[name], **style)
        if name in ends:
            seconds, ended = zip(*((seconds, sign * value) for seconds, value in ends[name]), strict=True)
            ring = {**style, "marker": RINGS.get(name, "o"), "linewidth": 0.7, "alpha": 0.8}
            axes[1].plot(seconds, ended, markersize=6, markerfacecolor="none", **ring)
    for axis, name in zip(axes, ("steps", "seconds of training"), strict=True):
        if REFERENCE in rows:
            axis.axhline(sign * curves[REFERENCE][-1][2], color=STYLES[REFERENCE][0], linewidth=0.8, linestyle=":")
        axis.set_xlabel(name)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
    points = [sign * point[2] for curve in curves.values() for point in curve]
    cut = "" if _frame(axes[0], points, metric) else " (start of training left out)"
    axes[0].set_ylabel(("test accuracy, %" if metric == "accuracy" else "validation loss, nats") + cut)
    handles = dict(zip(*reversed(axes[1].get_legend_handles_labels()), strict=True))
    title_of = "final" + (f" (hollow: ends of shorter runs, {_counted(map(len, whole.values()))})" if ends else "")
    place = {"loc": "outside lower center", "ncols": 3} if few else {"loc": "outside right upper", "alignment": "left"}
    figure.legend(  # outside the panels, where it would cover the curves
        [handles[text] for text in texts.values()],
        texts.values(),
        frameon=False,
        fontsize=9,
        title=title_of,
        title_fontsize=9,
        **place,
    )
    of_seeds = _counted(map(len, rows.values()))
    steps = next(iter(curves.values()))[-1][0]
    figure.suptitle(f"{title}, {steps} steps, mean of {of_seeds}", fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=130, metadata={"Description": described(results, texts)})
    plt.close(figure)


def _counted(numbers: Iterable[int]) -> str:
    """How many seeds."""
    found = sorted(numbers)
    least, most = found[0], found[-1]
    return f"{least} to {most} seeds" if most > least else f"{most} seed" + "s" * (most > 1)


def _frame(axis: Any, values: list[float], metric: str) -> bool:
    """Leave out the start of training and rivals that hardly learn: the better two thirds of all points are shown.
    Returns whether all of them are."""
    ranked = sorted(values, reverse=metric == "accuracy")
    best, worst = ranked[0], ranked[min(len(ranked) - 1, 2 * len(ranked) // 3)]
    low, high = sorted((best, worst))
    pad = 0.08 * (high - low) or 1.0
    axis.set_ylim(low - pad, high + pad)
    return all(low - pad <= value <= high + pad for value in values)
