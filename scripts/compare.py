"""Runs your own command with two optimizers and prints loss against seconds of both.

    python scripts/compare.py adamw_torch_fused lngd -- scripts/run_translation.py --do_train --output_dir out ...
    python scripts/compare.py "adamw_torch --learning_rate 3e-4" "muon --learning_rate 1e-3" -- run_clm.py ...

An optimizer is a value of `--optim` (those of transformers, lngd, muon, soap) and, in quotes, any arguments of its own.
The script is any with a Trainer; it needs no change. Each run writes into a folder of its own below `--output_dir`.
Seconds are those of training alone, evaluation left out; both runs have the machine to themselves.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from bisect import bisect_right
from pathlib import Path

STOPWATCH = Path(__file__).with_name("stopwatch.py")
TIMES = 8
Curve = list[tuple[int, float, float]]


def run(optimizer: str, command: list[str], output: Path) -> dict[str, Curve]:
    """Curves of one run, see `stopwatch`. SystemExit: it failed, its own message stands above, or logged no loss."""
    folder, (name, *own) = output / optimizer.replace(" ", "").replace("--", "-"), shlex.split(optimizer)
    curve = folder.with_name(f"{folder.name}.json")
    given = [*command, "--optim", name, *own, "--output_dir", str(folder)]
    print(f"\n$ python -m hf_lngd {shlex.join(given)}\n", flush=True)
    watched = [sys.executable, "-m", "hf_lngd", str(STOPWATCH), str(curve), *given]
    if subprocess.run(watched, check=False).returncode:
        sys.exit(f"error: {optimizer}: the run failed, see above")
    curves: dict[str, Curve] = json.loads(curve.read_text(encoding="utf-8"))
    if not curves["train"]:
        sys.exit(f"error: {optimizer}: no loss was logged, accepted: --logging_steps of at most the number of steps")
    return curves


def loss_at(curve: Curve, seconds: float) -> str:
    """The loss that was logged last by then."""
    known = bisect_right([entry[1] for entry in curve], seconds)
    return f"{curve[known - 1][2]:.4f}" if known else ""


def tables(found: dict[str, dict[str, Curve]]) -> str:
    """Training loss (and validation loss, where there is one) at the same seconds of both runs, until each ends."""
    width = max(8, *map(len, found)) + 2
    ends = {one: max(curve[-1][1] for curve in curves.values() if curve) for one, curves in found.items()}
    stride = max(ends.values()) / TIMES
    lines = []
    for part in ("train", "validation"):
        if any(curves[part] for curves in found.values()):
            lines += ["", f"{part} loss after"] + [f"{'seconds':>10}" + "".join(f"{one:>{width}}" for one in found)]
            for i in range(1, TIMES + 1):
                running = {one: curves[part] if ends[one] > (i - 1) * stride else [] for one, curves in found.items()}
                cells = (f"{loss_at(curve, i * stride):>{width}}" for curve in running.values())
                lines.append(f"{i * stride:>10.1f}" + "".join(cells))
    lines += ["", f"{'':{width}}{'steps':>10}{'seconds':>10}{'s a step':>10}{'train':>10}{'validation':>12}"]
    for name, curves in found.items():
        step, seconds, loss = curves["train"][-1]
        last = f"{curves['validation'][-1][2]:.4f}" if curves["validation"] else ""
        lines.append(f"{name:{width}}{step:>10}{seconds:>10.1f}{seconds / step:>10.3f}{loss:>10.4f}{last:>12}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Both runs, one after the other, and the tables."""
    given = sys.argv[1:] if arguments is None else arguments
    middle = given.index("--") if "--" in given else len(given)
    optimizers, command = given[:middle], given[middle + 1 :]
    if len(set(optimizers)) != 2 or not command:
        sys.exit("error: compare: needs two optimizers, -- and a command: compare.py adamw_torch lngd -- SCRIPT ...")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"))
    output = parser.parse_known_args(command)[0].output_dir
    print(tables({optimizer: run(optimizer, command, output) for optimizer in optimizers}))


if __name__ == "__main__":
    main()
