"""`make demo-vision`: a small ResNet learns handwritten digits, with `--optim lngd` and then with AdamW.

    python scripts/demo_vision.py         # both runs, test accuracy, pictures: under two minutes on two cores
    python scripts/demo_vision.py --tune  # how the learning rates were found: the same number of runs for both

Each run is `scripts/run_image_classification.py` with the arguments that are printed, on scikit-learn's bundled digits.
All that differs between the runs is `--optim` and `--learning_rate`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the other demo's parts, when this one runs as a command

from scripts import demo  # noqa: E402

TUNING_SEED = 7
TEST_SHARE = 0.2
ATTRIBUTION = """# Digits

1,797 handwritten digits of 8 × 8 pixels, bundled with scikit-learn: the test set of E. Alpaydin and C. Kaynak,
"Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (1998), CC BY 4.0.
"""
RUNS = {
    "lngd": demo.Run("LNGD", "lngd", 4e-3, (1e-3, 2e-3, 4e-3, 8e-3), "#0f766e"),
    "adamw": demo.Run("AdamW", "adamw_torch_fused", 4e-3, (1e-3, 2e-3, 4e-3, 8e-3), "#d97706"),
}
LABELS = demo.Labels(
    title="Handwritten digits from nothing: a small ResNet",
    loss="cross entropy (nats, log scale)",
    score=lambda result: f"{result['predict_accuracy']:.1%} right on test",
    ticks=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
)


def write_digits(folder: Path) -> None:
    """The images as PNG files, one folder a class, four fifths in ``train``, one in ``test``, of each class alike."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    numbers = train_test_split(range(len(pixels)), test_size=TEST_SHARE, stratify=digits.target, random_state=0)
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    for part, chosen in zip(("train", "test"), numbers, strict=True):
        for number in chosen:
            path = folder / part / str(digits.target[number]) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[number]).save(path)
    (folder / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="utf-8")


def write_config(folder: Path) -> None:
    """A ResNet of 177,000 parameters."""
    from transformers import ResNetConfig

    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [2, 2, 2], "layer_type": "basic"}
    ResNetConfig(**sizes).save_pretrained(folder)


def command(run: demo.Run, folder: Path, output: Path, seed: int, extra: list[str]) -> list[str]:
    """The arguments of `run_image_classification.py`, paths relative to the repository."""
    options: dict[str, Any] = {
        "config_name": folder / "model",
        "train_dir": folder / "digits" / "train",
        "test_dir": folder / "digits" / "test",
        "train_val_split": 0.15,
        "image_size": 32,
        "augment": "crop",  # a mirrored digit is none
        "cache_dir": folder / "cache",
        "optim": run.optim,
        "learning_rate": run.learning_rate,
        "num_train_epochs": 12,
        "warmup_steps": 20,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 128,
        "logging_steps": 10,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "data_license": "cc-by-4.0",
        "seed": seed,
        "output_dir": output,
        "overwrite_output_dir": True,
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return ["scripts/run_image_classification.py", "--do_train", "--do_eval", "--do_predict", *arguments, *extra]


def show_scores(results: dict[str, dict[str, Any]]) -> None:
    """Prints accuracy, loss and seconds of both runs."""
    print(
        f"\n{'':8}{'accuracy, test':>16}{'validation':>12}{'validation loss':>18}{'seconds':>10}{'learning rate':>16}"
    )
    for name, result in results.items():
        print(
            f"{RUNS[name].label:8}{result['predict_accuracy']:>16.2%}{result['eval_accuracy']:>12.2%}"
            f"{result['eval_loss']:>18.4f}{result['curves']['train'][-1][1]:>10.1f}{RUNS[name].learning_rate:>16g}"
        )
    adamw = results["adamw"]["curves"]["validation"]
    reached = demo.seconds_to(results, "lngd", "adamw")
    if reached is not None:
        print(f"LNGD is at AdamW's final validation loss after {reached:.1f} s; AdamW took {adamw[-1][1]:.1f} s.")


def tune(folder: Path, extra: list[str]) -> None:
    """Trains both at each of their rates on a seed of its own, and prints the validation losses, the best first."""
    rows = []
    for name in RUNS:
        for run in RUNS[name].trials():
            output = folder / f"tune-{name}"
            result = demo.execute(run.label, command(run, folder, output, TUNING_SEED, extra), output)
            rows.append((name, run.learning_rate, result["eval_loss"], result["eval_accuracy"]))
    for name, rate, loss, accuracy in sorted(rows, key=lambda row: (row[0], row[2])):
        print(f"{name:8}{rate:>10g}{loss:>10.4f}{accuracy:>10.2%}")


def main(arguments: list[str] | None = None) -> None:
    """Both runs and what came of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo-vision"), help="from the repository's root")
    parser.add_argument("--seed", type=int, default=1, help="of weights and data order (default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="find the learning rates instead")
    args, extra = parser.parse_known_args(arguments)
    start = time.perf_counter()
    write_digits(ROOT / args.output / "digits")
    write_config(ROOT / args.output / "model")
    if args.tune:
        tune(args.output, extra)
        return
    print("A small ResNet learns digits from nothing, twice, from the same weights and on the same 1,221 images.")
    print("Other arguments go to scripts/run_image_classification.py.")
    results = {}
    for name, run in RUNS.items():
        output = args.output / name
        arguments = command(run, args.output, output, args.seed, extra)
        results[name] = demo.execute(run.label, arguments, output)
    picture = args.output / "loss.png"
    demo.draw(results, ROOT / picture, LABELS)
    demo.write_results(results, args.output)
    show_scores(results)
    lngd = args.output / "lngd"
    shown = {"model": lngd, "card": lngd / "README.md", "mistakes": lngd / "worst_mistakes.png", "picture": picture}
    print("\n" + "\n".join(f"{what + ':':9} {path}" for what, path in shown.items()))
    print(f"{time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
