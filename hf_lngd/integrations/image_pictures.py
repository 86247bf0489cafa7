"""Pictures of a classifier's mistakes: the confusion matrix, and the images that it is most wrong about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .card_pictures import pyplot

# Above, names of classes could not be read beside the matrix: the most confused pairs are listed instead.
NAMED_CLASSES = 30
COUNTED_CLASSES = 15
LISTED_PAIRS = 15
SHOWN_MISTAKES = 16


def confusion(labels: Any, predicted: Any, classes: int) -> NDArray[np.int64]:
    """How often class i was taken for class j [K, K]."""
    flat = np.asarray(labels) * classes + np.asarray(predicted)
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def confused_pairs(counts: NDArray[np.int64], most: int = LISTED_PAIRS) -> list[tuple[int, int, int]]:
    """(true, predicted, how often) of the most frequent mistakes, the first the most frequent."""
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [(int(i), int(j), int(wrong[i, j])) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    return [pair for pair in pairs if pair[2]]


def _short(name: str, length: int) -> str:
    """A name cut in its middle: many differ at their ends alone."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def draw_confusion(path: Path, labels: Any, predicted: Any, classes: Sequence[str]) -> None:
    """The share of each true class (row) that was taken for each class (column), on a scale that shows few mistakes.

    Args:
        path: a PNG file.
        labels: class numbers [N].
        predicted: class numbers [N].
        classes: names of the K classes.
    """
    plt = pyplot()
    if plt is None:
        return
    count = len(classes)
    counts = confusion(labels, predicted, count)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    named = count <= NAMED_CLASSES
    side = min(9.0, max(4.5, 1.5 + 0.32 * count))
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    # The square root keeps 1 % visible beside 90 %.
    drawn = axis.imshow(shares, cmap="viridis", norm="linear" if count <= 2 else _root(), interpolation="nearest")
    figure.colorbar(drawn, ax=axis, shrink=0.8, label="share of the true class")
    if named:
        names = [_short(name, 18) for name in classes]
        axis.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axis.set_yticks(range(count), names)
    else:
        axis.set_xticks([])
        axis.set_yticks([])
        lines = [
            f"{_short(classes[i], 27)} → {_short(classes[j], 27)}: {times}" for i, j, times in confused_pairs(counts)
        ]
        text = "\n".join(["most confused (true → predicted)", "", *(lines or ["none"])])
        figure.text(1.0, 0.5, text, fontsize=9, va="center", ha="left")
    if count <= COUNTED_CLASSES:
        for (i, j), times in np.ndenumerate(counts):
            if times:
                colour = "black" if shares[i, j] > 0.4 else "white"
                axis.text(j, i, str(times), ha="center", va="center", color=colour, fontsize=8)
    right = np.trace(counts) / max(1, counts.sum())
    axis.set_title(f"{counts.sum():,} images, {right:.1%} right", loc="left", fontsize=11)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _root() -> Any:
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=1)


def worst(probabilities: NDArray[Any], labels: Any, most: int = SHOWN_MISTAKES) -> NDArray[np.int64]:
    """Numbers of the images that are classified wrongly, those with the highest loss first, at most `most`."""
    wanted = np.asarray(labels)
    wrong = np.flatnonzero(probabilities.argmax(1) != wanted)
    return wrong[np.argsort(probabilities[wrong, wanted[wrong]], kind="stable")][:most]


def draw_mistakes(
    path: Path, pixels: NDArray[np.uint8], probabilities: NDArray[Any], labels: Any, classes: Sequence[str]
) -> None:
    """The worst mistakes, each with the true class, the predicted one and the probability of both.

    Args:
        path: a PNG file; removed where nothing is wrong.
        pixels: [N, C, H, W].
        probabilities: [N, K].
        labels: [N].
        classes: names of the K classes.
    """
    plt = pyplot()
    chosen = worst(probabilities, labels)
    if plt is None or not len(chosen):
        path.unlink(missing_ok=True)
        return
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.3 * columns, 2.6 * rows), layout="constrained", squeeze=False)
    figure.get_layout_engine().set(h_pad=0.12)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, index in zip(axes.flat, chosen, strict=False):
        image = pixels[index].transpose(1, 2, 0)
        axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
        true, said = int(labels[index]), int(probabilities[index].argmax())
        lines = ((said, "predicted", "#b91c1c"), (true, "true", "#0f766e"))
        for line, (number, what, colour) in enumerate(lines):
            text = f"{what}: {_short(classes[number], 14)}, {probabilities[index, number]:.1%}"
            axis.text(0.5, 1.03 + 0.1 * line, text, color=colour, fontsize=9, ha="center", transform=axis.transAxes)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
