"""`make demo`: a small Marian learns English-German from nothing, with `--optim lngd` and then with AdamW.

    python scripts/demo.py                # both runs, BLEU of each, ten translations, a picture: minutes on two cores
    python scripts/demo.py --tune         # how rates were found, and AdamW's weight decay, which LNGD has of itself

Each run is `scripts/run_translation.py` with the arguments that are printed, on the bundled Tatoeba sample. All that
differs between the runs is `--optim`, `--learning_rate` and `--weight_decay`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "examples" / "data" / "tatoeba-en-de"
TUNING = ROOT / "benchmarks" / "results" / "demo_tuning.json"
TUNING_SEED = 7
SHOWN = 10

Curve = list[tuple[int, float, float]]


@dataclass(frozen=True)
class Run:
    """One of the two runs: what it is called, its optimizer, the rates that `--tune` tries, and at the best of them the
    weight decays. A decay of 0 is not given: LNGD has a rule of its own."""

    label: str
    optim: str
    learning_rate: float
    rates: tuple[float, ...]
    colour: str
    weight_decay: float = 0.0
    decays: tuple[float, ...] = ()

    def trials(self) -> list[Run]:
        """The runs of `--tune`."""
        rates = [dataclasses.replace(self, learning_rate=rate, weight_decay=0.0) for rate in self.rates]
        return rates + [dataclasses.replace(self, weight_decay=decay) for decay in self.decays]


RUNS = {
    "lngd": Run("LNGD", "lngd", 2e-3, (5e-4, 1e-3, 2e-3, 4e-3), "#0f766e"),
    "adamw": Run(
        "AdamW",
        "adamw_torch_fused",
        2e-3,
        (5e-4, 1e-3, 2e-3, 4e-3),
        "#d97706",
        weight_decay=0.5,
        decays=(0.1, 0.5, 1.5),
    ),
}


def command(run: Run, output: Path, seed: int, extra: list[str]) -> list[str]:
    """The arguments of `run_translation.py`, paths relative to the repository."""
    sample = SAMPLE.relative_to(ROOT)
    options: dict[str, Any] = {
        "config_name": sample / "model",
        "tokenizer_name": sample / "tokenizer",
        "source_lang": "en",
        "target_lang": "de",
        "train_file": sample / "train.json.gz",
        "validation_file": sample / "validation.json.gz",
        "test_file": sample / "test.json.gz",
        "max_source_length": 64,
        "max_target_length": 64,
        "num_beams": 4,
        "optim": run.optim,
        "learning_rate": run.learning_rate,
        **({"weight_decay": run.weight_decay} if run.weight_decay else {}),
        "num_train_epochs": 4,
        "warmup_steps": 100,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "group_by_length",
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 100,
        "logging_steps": 50,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "data_license": "cc-by-2.0",
        "seed": seed,
        "output_dir": output,
        "overwrite_output_dir": True,
    }
    flags = ["--do_train", "--do_eval", "--do_predict", "--predict_with_generate"]
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return ["scripts/run_translation.py", *flags, *arguments, *extra]


def train(run: Run, output: Path, seed: int, extra: list[str]) -> dict[str, Any]:
    """Trains once; see `execute`."""
    return execute(run.label, command(run, output, seed, extra), output)


def execute(label: str, arguments: list[str], output: Path) -> dict[str, Any]:
    """Runs a script, its progress bar in sight; returns the results that it wrote, and the curves with seconds.

    Raises:
        SystemExit: the run failed, its own message stands above; or it logged no loss.
    """
    print(f"\n$ python {shlex.join(arguments)}\n", flush=True)
    curve = output / "loss_curve.json"
    watched = [sys.executable, "scripts/stopwatch.py", str(curve), *arguments]
    if subprocess.run(watched, cwd=ROOT, check=False).returncode:
        sys.exit(f"error: {label}: the run failed, see above")
    results = json.loads((ROOT / output / "all_results.json").read_text(encoding="utf-8"))
    curves = json.loads((ROOT / curve).read_text(encoding="utf-8"))
    if not curves["train"]:
        sys.exit(f"error: {label}: no loss was logged, accepted: --logging_steps of at most the number of steps")
    return {**results, "curves": curves}


def write_results(results: dict[str, dict[str, Any]], output: Path) -> None:
    """`results.json`: what both runs wrote, and their curves; a copy of it is committed with the benchmarks."""
    (ROOT / output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def read_test() -> list[dict[str, str]]:
    """The held-out sentences and their references."""
    with gzip.open(SAMPLE / "test.json.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["translation"] for line in file]


def show_translations(folders: dict[str, Path]) -> None:
    """Prints ten held-out sentences, evenly spread over the test set, with the reference and what each model says."""
    test = read_test()
    said = {
        name: (ROOT / folder / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
        for name, folder in folders.items()
    }
    count = min(len(test), *(len(lines) for lines in said.values()))
    print(f"\n{SHOWN} of {count} held-out sentences\n")
    for index in range(0, count, max(1, count // SHOWN))[:SHOWN]:
        print(f"  English    {test[index]['en']}")
        print(f"  reference  {test[index]['de']}")
        for name, lines in said.items():
            print(f"  {RUNS[name].label:9}  {lines[index]}")
        print()


def show_scores(results: dict[str, dict[str, Any]]) -> None:
    """Prints BLEU, loss and seconds of both runs."""
    print(f"\n{'':8}{'BLEU, test':>12}{'chrF, test':>12}{'validation loss':>18}{'seconds':>10}{'learning rate':>16}")
    for name, result in results.items():
        seconds = result["curves"]["train"][-1][1]
        chrf = result.get("predict_chrf", float("nan"))
        print(
            f"{RUNS[name].label:8}{result['predict_bleu']:>12.1f}{chrf:>12.1f}{result['eval_loss']:>18.3f}"
            f"{seconds:>10.0f}{RUNS[name].learning_rate:>16g}"
        )
    signature = next(iter(results.values())).get("eval_bleu_signature")
    if signature:
        print(f"\nBLEU's signature: {signature}")
    reached = seconds_to(results, "lngd", "adamw")
    if reached is not None:
        whole = results["adamw"]["curves"]["validation"][-1][1]
        print(f"LNGD is at AdamW's final validation loss after {reached:.0f} s; AdamW took {whole:.0f} s.")


def seconds_to(results: dict[str, dict[str, Any]], name: str, other: str) -> float | None:
    """Seconds that one run takes to another's final validation loss, on straight lines between evaluations; none: it
    never gets there."""
    ours, theirs = (results[one]["curves"]["validation"] for one in (name, other))
    target, before = theirs[-1][2], None
    for _, seconds, loss in ours:
        if loss <= target:
            if before is None:
                return seconds
            return before[0] + (before[1] - target) / (before[1] - loss) * (seconds - before[0])
        before = seconds, loss
    return None


def smooth(values: list[float], weight: float = 0.3) -> list[float]:
    """A running average that starts at the first value."""
    smoothed = values[:1]
    for value in values[1:]:
        smoothed.append(weight * smoothed[-1] + (1 - weight) * value)
    return smoothed


@dataclass(frozen=True)
class Labels:
    """The words of the picture: its title, the loss, and what a run's results say at its end."""

    title: str
    loss: str
    score: Callable[[dict[str, Any]], str]
    ticks: tuple[float, ...]


LABELS = Labels(
    title="English to German from nothing: the bundled Tatoeba sample",
    loss="cross entropy per target token (nats, log scale)",
    score=lambda result: f"BLEU {result['predict_bleu']:.1f} on test",
    ticks=(0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8),
)


def draw(results: dict[str, dict[str, Any]], path: Path, labels: Labels = LABELS) -> None:
    """Both training losses (line) and validation losses (marks) against seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for name, result in results.items():
        run, curves = RUNS[name], result["curves"]
        _, seconds, losses = zip(*curves["train"], strict=True)
        axis.plot(seconds, losses, color=run.colour, alpha=0.25, linewidth=1)
        axis.plot(seconds, smooth(list(losses)), color=run.colour, linewidth=2.2, label=f"{run.label}, training")
        if curves["validation"]:
            _, seconds, losses = zip(*curves["validation"], strict=True)
            axis.plot(
                seconds,
                losses,
                color=run.colour,
                linestyle=":",
                marker="o",
                markersize=6,
                markeredgecolor="white",
                label=f"{run.label}, validation: {labels.score(result)}",
            )
    axis.set_yscale("log")
    ticks = [tick for tick in labels.ticks if axis.get_ylim()[0] <= tick <= axis.get_ylim()[1]]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(left=0)
    axis.set_xlabel("seconds of training (evaluation left out)")
    axis.set_ylabel(labels.loss)
    axis.set_title(labels.title, loc="left", fontsize=12)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def tune(output: Path, extra: list[str]) -> None:
    """Trains both at each of their settings on a seed of its own, in turns, and writes the validation losses.

    Runs that the file has already are not run again.
    """
    rows = json.loads(TUNING.read_text(encoding="utf-8")) if TUNING.exists() else []
    turns = zip_longest(*([(name, trial) for trial in run.trials()] for name, run in RUNS.items()))
    for name, run in (trial for turn in turns for trial in turn if trial is not None):
        what = {"optimizer": name, "learning_rate": run.learning_rate, "weight_decay": run.weight_decay}
        if any(what.items() <= row.items() for row in rows):
            continue
        brief = ["--eval_strategy", "no", "--num_beams", "1", "--max_predict_samples", "100"]
        result = train(run, output / f"tune-{name}", TUNING_SEED, [*brief, *extra])
        found = {"loss": result["eval_loss"], "seconds": result["curves"]["train"][-1][1], "bleu": result["eval_bleu"]}
        rows.append({**what, "seed": TUNING_SEED, **found})
        TUNING.parent.mkdir(parents=True, exist_ok=True)
        TUNING.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    for row in sorted(rows, key=lambda row: (row["optimizer"], row["loss"])):
        print(f"{row['optimizer']:8}{row['learning_rate']:>10g}{row['weight_decay']:>8g}{row['loss']:>10.4f}")


def main(arguments: list[str] | None = None) -> None:
    """Both runs and what came of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder, from the repository's root")
    parser.add_argument("--seed", type=int, default=1, help="of weights and data order (default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="find the rates and decays instead")
    args, extra = parser.parse_known_args(arguments)
    if args.tune:
        tune(args.output, extra)
        return
    start = time.perf_counter()
    words = (
        "A translation model learns from nothing, twice, from the same weights and on the same 28,000 sentence pairs."
    )
    print(textwrap.fill(f"{words} Other arguments go to scripts/run_translation.py.", 100))
    folders = {name: args.output / name for name in RUNS}
    results = {name: train(run, folders[name], args.seed, extra) for name, run in RUNS.items()}
    picture = ROOT / args.output / "loss.png"
    draw(results, picture)
    write_results(results, args.output)
    show_translations(folders)
    show_scores(results)
    shown = {"model": folders["lngd"], "card": folders["lngd"] / "README.md", "picture": args.output / "loss.png"}
    print("\n" + "\n".join(f"{what + ':':9} {path}" for what, path in shown.items()))
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
