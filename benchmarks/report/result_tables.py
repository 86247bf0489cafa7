"""Writes the tables of results into README.md and the pages of docs/ from the files of results; runs nothing.

    python -m benchmarks.report.result_tables

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`: NAME is a study of
`benchmarks/studies/specs/`, `goals` (what of the goal in time is met), `one-flag` (AdamW and LNGD, each with one
rate), `now` (the default as it is now), `rates` (AdamW and LNGD over rates) or `small-batches` (what a step costs). A
test asks whether the pages have them as they are.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from benchmarks.report.tables import metric_of, ratio, reported, results_rows, spread, table
from benchmarks.studies.runs import Results
from benchmarks.studies.spec import Spec, named
from benchmarks.studies.sweep_lr import sweep_table

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(ROOT / name for name in ("README.md", "docs/results.md", "docs/cost.md"))
MARKED = re.compile(r"(?<=<!-- table: )([\w-]+)( -->\n).*?(?=<!-- end of table -->)", re.DOTALL)
STUDIES = ("multi30k", "cifar10-resnet", "cifar10-vit", "marian-multi30k", "marian-wmt", "cifar10-efficientnet")
# Of `results_rows`, what does not fit a page; diverged runs have their column where there are any.
LEFT_OUT = ("ms a step", "peak, MiB")
DIVERGED = "diverged"
OURS = ("lngd", "lngd-same")
# The models of `small_batches.json`: what they are, and a step of theirs.
SMALL_BATCHES = {
    "marian, 64 × 32": ("Marian, width 256", "64 × 32 tokens"),
    "marian, 16 × 24": ("Marian, width 256", "16 × 24 tokens"),
    "distilbert, 16 × 64": ("DistilBERT, width 768", "16 × 64 tokens"),
    "resnet, 128": ("ResNet, 32 to 128 channels", "128 images, 32 × 32"),
    "vit, 8": ("ViT, width 192", "8 images, 64 × 64"),
    "convnext, 16": ("ConvNeXt, 40 to 320 channels", "16 images, 64 × 64"),
}
# Whose quality, in what part of its time at most.
GOALS = {"adamw": 0.5, "adamw-one": 0.5, "muon": 0.9, "soap": 0.9}


def results_of(name: str) -> tuple[Spec, Results]:
    """A study and the rows that it has."""
    spec = named(name)
    return spec, Results(ROOT / "benchmarks" / "results" / f"{spec.task}.json")


def study(name: str) -> str:
    """`results_rows` of a study, LNGD's in bold, with the number of tuning runs."""
    spec, results = results_of(name)
    (first, *titles), rows = results_rows(results, list(spec.rivals))
    some = any(cells[titles.index(DIVERGED)] != "0" for cells in rows.values())
    kept = [i for i, title in enumerate(titles) if title not in LEFT_OUT and (some or title != DIVERGED)]
    body = []
    for rival, cells in rows.items():
        name = f"**{spec.label(rival)}**" if rival in OURS else spec.label(rival)
        body.append([name, *(cells[i] for i in kept), str(len(results.find("tune", rival)))])
    return table([first, *(titles[i] for i in kept), "tuning runs"], body)


def goals() -> str:
    """The time that LNGD takes to a rival's final quality over the rival's own: on schedules of their own where there
    are such runs, else within runs of full length (in brackets); bold: the goal is met, on more than one seed."""
    body = []
    for name in STUDIES:
        spec, results = results_of(name)
        for ours in OURS:
            if not results.find("report", ours):
                continue
            metric = metric_of(results, list(spec.rivals))
            cells = [_goal(results, ours, other, metric, most) for other, most in GOALS.items()]
            body.append([spec.title, spec.label(ours), *cells])
    heads = {"adamw": "AdamW (two rates)", "adamw-one": "AdamW (one rate)", "muon": "Muon", "soap": "SOAP"}
    return table(["task", "LNGD", *(f"{heads[other]}, ≤ {most}" for other, most in GOALS.items())], body)


def _goal(results: Results, ours: str, other: str, metric: str, most: float) -> str:
    if not results.find("report", other):
        return "–"
    if any(row[DIVERGED] for name in (ours, other) for row in results.find("report", name)):
        return DIVERGED  # quality of the runs that are left would be that of the lucky ones
    found = ratio(results, ours, other, metric)
    value = found.own if found.seeds else found.within
    within, own = found.texts(3 if value is not None and round(value, 2) <= most < value else 2)  # 0.902 is above 0.9
    shown = own if found.seeds else within if found.within is None else f"({within})"
    met = value is not None and value <= most and found.seeds != 1
    return f"**{shown}**" if met else shown


def one_flag() -> str:
    """AdamW with one rate for everything and LNGD at that rate."""
    body = []
    for name in STUDIES:
        spec, results = results_of(name)
        pair = [reported(results, rival) for rival in ("adamw-one", "lngd-same")]
        if not all(pair):
            continue
        metric = metric_of(results, list(spec.rivals))
        scale, digits = (100, 1) if metric == "accuracy" else (1, 3)
        values = [spread([scale * row[metric] for row in rows], digits) for rows in pair]
        within, own = ratio(results, "lngd-same", "adamw-one", metric).texts()
        unit = "accuracy, %" if metric == "accuracy" else "loss"
        rate = f"{pair[0][0]['settings']['lr']:g}"
        body.append([f"{spec.title}, {unit}", rate, *values, within, own])
    head = ["task", "rate", "AdamW", "LNGD", "its seconds to AdamW's quality / AdamW's, within runs", "own schedules"]
    return table(head, body)


def now() -> str:
    """Quality of the default as it is now (`results/now-TASK.json`, see `option_effects`), of the version before and of
    the tuned rivals, on the same seeds."""
    rivals = {"adamw-one": "AdamW (one rate)", "adamw": "AdamW (two rates)", "muon": "Muon", "soap": "SOAP"}
    names = {**rivals, "lngd-same": "LNGD (one flag), before", "now": "**LNGD (one flag), now**"}
    body = []
    for name in STUDIES:
        spec, results = results_of(name)
        file = results.path.with_name(f"now-{spec.task}.json")
        if not file.exists():
            continue
        metric = metric_of(results, list(spec.rivals))
        scale, digits = (100, 1) if metric == "accuracy" else (1, 3)
        found = {row["seed"]: row for row in Results(file).rows}
        cells = []
        for rival in names:
            rows = list(found.values()) if rival == "now" else reported(results, rival)
            values = [scale * row[metric] for row in rows if row["seed"] in found]
            cells.append(spread(values, digits) if len(values) == len(found) else "–")
        seeds = ", ".join(map(str, sorted(found)))
        body.append([f"{spec.title}, {'accuracy, %' if metric == 'accuracy' else 'loss'}", seeds, *cells])
    return table(["task", "seeds", *names.values()], body)


def rates() -> str:
    """AdamW and LNGD, each with one rate for all, over rates; a table a task."""
    results = Results(ROOT / "benchmarks" / "results" / "sweep_lr.json")
    tasks = list(dict.fromkeys((row["task"], row["steps"]) for row in results.rows))
    return "\n".join(sweep_table(results, task, steps) for task, steps in tasks)


def small_batches() -> str:
    """What a step costs beside AdamW's, by model and batch."""
    file = ROOT / "benchmarks" / "results" / "small_batches.json"
    rows = {row["model"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    body = []
    for name, (model, batch) in SMALL_BATCHES.items():
        if name in rows:
            row = rows[name]
            muon = f"{row['muon_ms'] / row['adamw_ms']:.2f}"
            lngd = f"**{row['step_to_adamw']:.2f}** ± {row['standard_error']:.2f}"
            body.append([model, batch, f"{row['adamw_ms']:.0f} ms", muon, lngd])
    return table(["model", "a step", "AdamW", "Muon / AdamW", "**LNGD / AdamW**"], body)


def render(text: str) -> str:
    """The page with every marked table made anew. Raises ValueError for a table that there is not."""

    def made(found: re.Match[str]) -> str:
        name = found[1]
        if name in STUDIES:
            return f"{name}{found[2]}\n{study(name)}\n"
        makers = {"goals": goals, "one-flag": one_flag, "now": now, "rates": rates, "small-batches": small_batches}
        if name not in makers:
            raise ValueError(f"table: got {name!r}, accepted: {', '.join((*STUDIES, *makers))}")
        return f"{name}{found[2]}\n{makers[name]()}\n"

    return MARKED.sub(made, text)


def main() -> None:
    """Rewrites the pages."""
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()  # a wrong argument is named
    main()
