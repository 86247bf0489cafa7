"""The paper's tables beside what the same rivals do here: does the order come out the same?

    python -m benchmarks.report.paper_tables

Reads `benchmarks/results/TASK.json`, runs nothing. Writes the tables to `paper.md` there, and draws the ablation. The
tasks are smaller than the paper's by orders of magnitude, so only places can be compared: a row says whether the
optimizer's place among the compared ones is the published one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from benchmarks.report.pictures import draw
from benchmarks.report.tables import metric_of, quality, reported, table, time_to_quality
from benchmarks.studies.runs import Results
from benchmarks.studies.spec import Spec, named

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Study:
    """One published column.

    Attributes:
        title: what was measured there, and on what it is remade here.
        task: whose results are read.
        unit: of the published numbers.
        published: the paper's name of an optimizer, of `OURS` → its number; infinite: never.
        kind: of `UNITS`; of all but ``best`` the least is the best.
    """

    title: str
    task: str
    unit: str
    published: dict[str, float]
    kind: str


# What a study compares: its kind → our unit.
UNITS = {
    "seconds": "seconds to AdamW's quality",
    "steps": "steps to AdamW's quality",
    "cost": "milliseconds a step",
    "best": "final metric",
}
HEAD = """# The paper's tables beside ours

Written by `python -m benchmarks.report.paper_tables` from the files of results in this folder. Published numbers: Liu
et al., NeurIPS 2024. Our tasks are smaller by orders of magnitude and other ones, so only places are compared, among
those run here.
"LNGD" is the paper's own (`preset=paper`, intervals of 20); rivals are tuned by the same search; "never": AdamW's final
quality is not reached.
"""
# What figure 7 compares, beside AdamW.
ABLATION = ("adamw", "lngd-lr", "lngd-sample", "lngd-paper")
# The paper's names → our rivals.
OURS = {
    "SGD": "sgd",
    "Adam": "adamw",
    "KFAC": "kfac",
    "EKFAC": "ekfac",
    "TKFAC": "tkfac",
    "NG+": "ng+",
    "LNGD": "lngd-paper",
    "LNGD-lr": "lngd-lr",
    "LNGD-sample": "lngd-sample",
}
# Liu et al., NeurIPS 2024: tables 1 and 6 (CIFAR-10), 2 (ImageNet) and 3 (WMT), and the ablation on ImageNet.
STUDIES = (
    Study(
        "Table 1, CIFAR-10, ResNet-18: seconds to 91 %",
        "cifar10-resnet",
        "s",
        {"SGD": 268.7, "Adam": 248.8, "KFAC": 241.9, "EKFAC": 247.6, "TKFAC": 239.2, "NG+": 204.5, "LNGD": 189.7},
        "seconds",
    ),
    Study(
        "Table 1, CIFAR-10, ResNet-18: epochs to 91 %",
        "cifar10-resnet",
        "epochs",
        {"SGD": 79, "Adam": 72, "KFAC": 45, "EKFAC": 41, "TKFAC": 39, "NG+": 40, "LNGD": 36},
        "steps",
    ),
    Study(
        "Table 1, CIFAR-10, ResNet-18: seconds an epoch",
        "cifar10-resnet",
        "s",
        {"SGD": 3.4, "Adam": 3.77, "KFAC": 5.87, "LNGD": 5.08},
        "cost",
    ),
    Study(
        "Table 6, CIFAR-10, ResNet-18: best accuracy",
        "cifar10-resnet",
        "%",
        {"SGD": 91.88, "Adam": 92.62, "KFAC": 93.34, "LNGD": 93.61},
        "best",
    ),
    Study(
        "Table 2, ImageNet, ResNet-50: hours to 75.9 % (here: CIFAR-10, there is no ImageNet)",
        "cifar10-resnet",
        "h",
        {"SGD": 11.28, "Adam": math.inf, "KFAC": 8.02, "LNGD": 6.46},
        "seconds",
    ),
    Study(
        "Table 2, ImageNet, ResNet-50: epochs to 75.9 % (here: CIFAR-10)",
        "cifar10-resnet",
        "epochs",
        {"SGD": 78, "Adam": math.inf, "KFAC": 39, "LNGD": 36},
        "steps",
    ),
    Study(
        "Table 2, ImageNet, ResNet-50: seconds an epoch (here: CIFAR-10)",
        "cifar10-resnet",
        "s",
        {"SGD": 521, "KFAC": 740, "LNGD": 646},
        "cost",
    ),
    Study(
        "Table 3, WMT en-de, Transformer-big: hours to BLEU 32 (here: Multi30k from scratch)",
        "multi30k",
        "h",
        {"Adam": 3.39, "KFAC": 3.75, "LNGD": 2.85},
        "seconds",
    ),
    Study(
        "Table 3, WMT en-de, Transformer-big: thousands of steps to BLEU 32 (here: Multi30k from scratch)",
        "multi30k",
        "k",
        {"Adam": 25, "KFAC": 22, "LNGD": 19},
        "steps",
    ),
    Study(
        "Table 3, WMT en-de, Transformer-big: seconds a thousand steps (here: Multi30k from scratch)",
        "multi30k",
        "s",
        {"Adam": 488, "KFAC": 614, "LNGD": 540},
        "cost",
    ),
    Study(
        "Table 3, WMT en-de, Transformer-big: best BLEU (here: validation loss on Multi30k from scratch)",
        "multi30k",
        "BLEU",
        {"SGD": 31.87, "Adam": 33.05, "KFAC": 33.45, "LNGD": 33.55},
        "best",
    ),
    Study(
        "Ablation, ImageNet: hours (here: CIFAR-10)",
        "cifar10-resnet",
        "h",
        {"LNGD-lr": 7.43, "LNGD-sample": 7.06, "LNGD": 6.46},
        "seconds",
    ),
    Study(
        "Ablation, ImageNet: hours (here: Multi30k from scratch)",
        "multi30k",
        "h",
        {"LNGD-lr": 7.43, "LNGD-sample": 7.06, "LNGD": 6.46},
        "seconds",
    ),
    Study(
        "Ablation, ImageNet: epochs (here: CIFAR-10)",
        "cifar10-resnet",
        "epochs",
        {"LNGD-lr": 35, "LNGD-sample": 41, "LNGD": 36},
        "steps",
    ),
    Study(
        "Ablation, ImageNet: epochs (here: Multi30k from scratch)",
        "multi30k",
        "epochs",
        {"LNGD-lr": 35, "LNGD-sample": 41, "LNGD": 36},
        "steps",
    ),
)


def measured(study: Study, results: Results) -> dict[str, float]:
    """Our number of each rival that was reported: infinite where AdamW's quality is never reached."""
    metric = metric_of(results, ["adamw"])
    reference = reported(results, "adamw")
    found: dict[str, float] = {}
    for name in map(OURS.__getitem__, study.published):
        rows = reported(results, name)
        if not rows or not reference:
            continue
        if study.kind == "best":
            found[name] = mean(100 * row["accuracy"] if metric == "accuracy" else row["loss"] for row in rows)
        elif study.kind == "cost":
            found[name] = mean(1e3 * row["seconds"] / row["steps"] for row in rows)
        else:
            axis = 1 if study.kind == "seconds" else 0
            time = time_to_quality(rows, quality(reference, metric), metric, axis)
            found[name] = math.inf if time is None else time
    return found


def places(values: dict[str, float], best_is_most: bool) -> dict[str, str]:
    """1 for the best; equal values share a place, but several that are never there have none."""
    sign = -1 if best_is_most else 1
    ranked = sorted({sign * value for value in values.values()})
    nowhere = sum(map(math.isinf, values.values())) > 1
    found = {name: str(1 + ranked.index(sign * value)) for name, value in values.items()}
    return {name: "–" if nowhere and math.isinf(values[name]) else place for name, place in found.items()}


def study_table(study: Study, results: Results, name_of: Callable[[str], str]) -> str:
    """Markdown: published number and place, ours, whether the place is the same; rivals not run here are named."""
    ours = measured(study, results)
    compared = {paper: OURS[paper] for paper in study.published if OURS[paper] in ours}
    final = study.kind == "best"
    theirs = places({paper: study.published[paper] for paper in compared}, final)
    most = final and metric_of(results, ["adamw"]) == "accuracy"  # else a loss
    here = places({paper: ours[name] for paper, name in compared.items()}, most)
    digits = 3 if final and not most else 1
    body = []
    for paper, number in study.published.items():
        name, published = OURS[paper], "never" if math.isinf(number) else f"{number:g} {study.unit}"
        if paper not in compared:
            body.append([paper, published, "–", f"{name_of(name)}: not run", "–", "–"])
            continue
        value = ours[name]
        text = "never" if math.isinf(value) else f"{value:.{digits}f}"
        same = "yes" if theirs[paper] == here[paper] else "no"
        body.append([paper, published, theirs[paper], f"{name_of(name)}: {text}", here[paper], same])
    head = ["paper", "published", "place", f"here ({UNITS[study.kind]})", "place", "same"]
    return f"**{study.title}**\n\n{table(head, body)}"


def draw_ablation(results: Results, spec: Spec, folder: Path) -> Path | None:
    """The paper's figure 7, on what is here, of a task that has the three variants; returns its path."""
    shown = [name for name in ABLATION if reported(results, name)]
    if len(shown) < len(ABLATION):
        return None
    path = folder / f"ablation-{results.path.stem}.png"
    draw(results, shown, spec.label, path, f"{spec.title}: ablation of the paper's LNGD")
    return path


def page(folder: Path) -> str:
    """All tables, from the files of results in a folder."""
    made = [study_table(s, Results(folder / f"{s.task}.json"), named(s.task).label) for s in STUDIES]
    return f"{HEAD}\n" + "\n".join(made)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and writes every table, draws what there are runs of."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args(arguments)
    text = page(args.results)
    print(text)
    (args.results / "paper.md").write_text(text, encoding="utf-8")
    for task in dict.fromkeys(study.task for study in STUDIES):
        picture = draw_ablation(Results(args.results / f"{task}.json"), named(task), args.results)
        if picture is not None:
            print(f"drawn: {picture}")


if __name__ == "__main__":
    main()
