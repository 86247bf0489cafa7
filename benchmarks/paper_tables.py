"""The paper's tables beside what the same rivals do here: does the order come out the same?

    python -m benchmarks.paper_tables

Reads `benchmarks/results/TASK.json`, runs nothing. The tasks are smaller than the paper's by orders of magnitude, so
only places can be compared: a row says whether the optimizer's place among the compared ones is the published one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from benchmarks.rivals import label
from benchmarks.runs import Results
from benchmarks.spec import named
from benchmarks.tables import quality, reported, table, time_to_quality

HERE = Path(__file__).resolve().parent
Names = dict[str, tuple[str, float]]


@dataclass(frozen=True)
class Study:
    """One published column.

    Attributes:
        title: what was measured there, and on what it is remade here.
        task: whose results are read.
        unit: of the published numbers.
        published: the paper's name → (our rival, its number).
        kind: ``seconds``, ``steps`` (to AdamW's quality; fewer are better) or ``best`` (final metric).
    """

    title: str
    task: str
    unit: str
    published: Names
    kind: str


# Liu et al., NeurIPS 2024: tables 1 and 6 (CIFAR-10), 2 (ImageNet) and 3 (WMT), and the ablation on ImageNet.
_CIFAR_SECONDS: Names = {
    "SGD": ("sgd", 268.7),
    "Adam": ("adamw", 248.8),
    "KFAC": ("kfac", 241.9),
    "EKFAC": ("ekfac", 247.6),
    "TKFAC": ("tkfac", 239.2),
    "NG+": ("ng+", 204.5),
    "LNGD": ("lngd-paper", 189.7),
}
_CIFAR_EPOCHS: Names = {
    "SGD": ("sgd", 79),
    "Adam": ("adamw", 72),
    "KFAC": ("kfac", 45),
    "EKFAC": ("ekfac", 41),
    "TKFAC": ("tkfac", 39),
    "NG+": ("ng+", 40),
    "LNGD": ("lngd-paper", 36),
}
STUDIES = (
    Study("Table 1, CIFAR-10, ResNet-18: seconds to 91 %", "cifar10-resnet", "s", _CIFAR_SECONDS, "seconds"),
    Study("Table 1, CIFAR-10, ResNet-18: epochs to 91 %", "cifar10-resnet", "epochs", _CIFAR_EPOCHS, "steps"),
    Study(
        "Table 6, CIFAR-10, ResNet-18: best accuracy",
        "cifar10-resnet",
        "%",
        {"SGD": ("sgd", 91.88), "Adam": ("adamw", 92.62), "KFAC": ("kfac", 93.34), "LNGD": ("lngd-paper", 93.61)},
        "best",
    ),
    Study(
        "Table 2, ImageNet, ResNet-50: hours to 75.9 % (here: CIFAR-10, there is no ImageNet)",
        "cifar10-resnet",
        "h",
        {"SGD": ("sgd", 11.28), "KFAC": ("kfac", 8.02), "LNGD": ("lngd-paper", 6.46)},
        "seconds",
    ),
    Study(
        "Table 3, WMT en-de, Transformer-big: hours to BLEU 32 (here: Multi30k from scratch)",
        "multi30k",
        "h",
        {"Adam": ("adamw", 3.39), "KFAC": ("kfac", 3.75), "LNGD": ("lngd-paper", 2.85)},
        "seconds",
    ),
    Study(
        "Ablation, ImageNet: hours (here: CIFAR-10)",
        "cifar10-resnet",
        "h",
        {"LNGD-lr": ("lngd-lr", 7.43), "LNGD-sample": ("lngd-sample", 7.06), "LNGD": ("lngd-paper", 6.46)},
        "seconds",
    ),
)


def measured(study: Study, results: Results) -> dict[str, float]:
    """Our number of each rival that was reported: infinite where AdamW's quality is never reached."""
    metric = "loss" if study.task == "multi30k" else "accuracy"
    reference = reported(results, "adamw")
    found: dict[str, float] = {}
    for name, _ in study.published.values():
        rows = reported(results, name)
        if not rows or not reference:
            continue
        if study.kind == "best":
            found[name] = mean(100 * row["accuracy"] if metric == "accuracy" else row["loss"] for row in rows)
        else:
            axis = 1 if study.kind == "seconds" else 0
            time = time_to_quality(rows, quality(reference, metric), metric, axis)
            found[name] = math.inf if time is None else time
    return found


def places(values: dict[str, float], best_is_most: bool) -> dict[str, int]:
    """1 for the best; equal values share a place."""
    sign = -1 if best_is_most else 1
    ranked = sorted({sign * value for value in values.values()})
    return {name: 1 + ranked.index(sign * value) for name, value in values.items()}


def study_table(study: Study, results: Results, name_of: Callable[[str], str]) -> str:
    """Markdown: published number and place, ours, whether the place is the same; rivals not run here are named."""
    ours = measured(study, results)
    compared = {paper: name for paper, (name, _) in study.published.items() if name in ours}
    most = study.kind == "best"
    theirs = places({paper: study.published[paper][1] for paper in compared}, most)
    here = places({paper: ours[name] for paper, name in compared.items()}, most)
    body = []
    for paper, (name, number) in study.published.items():
        if paper not in compared:
            body.append([paper, f"{number:g} {study.unit}", "–", f"{name_of(name)}: not run", "–", "–"])
            continue
        value = ours[name]
        text = "never" if math.isinf(value) else f"{value:.1f}"
        same = "yes" if theirs[paper] == here[paper] else "no"
        body.append(
            [paper, f"{number:g} {study.unit}", str(theirs[paper]), f"{name_of(name)}: {text}", str(here[paper]), same]
        )
    unit = {"seconds": "seconds to AdamW's quality", "steps": "steps to AdamW's quality", "best": "final metric"}
    head = ["paper", "published", "place", f"here ({unit[study.kind]})", "place", "same"]
    return f"**{study.title}**\n\n{table(head, body)}"


def label_of(task: str) -> Callable[[str], str]:
    """Names for people: those of the task's spec, where it has the rival."""
    spec = named(task)
    return lambda name: spec.label(name) if name in spec.rivals else label(name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints every table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the result files")
    args = parser.parse_args(arguments)
    for study in STUDIES:
        print(study_table(study, Results(args.results / f"{study.task}.json"), label_of(study.task)))


if __name__ == "__main__":
    main()
