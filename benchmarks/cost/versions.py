"""Steps of two checkouts of LNGD in turn, each in a process of its own, on one thread: A B, B A, A B …

What is measured are the processes' own seconds, so other work on the machine counts in neither. Both train the same
model on the same batches, LNGD at the defaults of its checkout. `benchmarks.cost.step_time --against PATH` runs this.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost.cases import make, timed_step

LR = 1e-3
OWN = Path(__file__).resolve().parents[2]


def time_versions(name: str, checkouts: dict[str, Path], rounds: int, warmup: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of whole steps ("step") and of `optimizer.step()` ("optimizer") of each checkout, step by step.

    Args:
        name: of the case, see `cases`.
        checkouts: label → folder that holds `hf_lngd`.
        warmup: steps before the counted ones.

    Raises:
        ValueError: a folder without `hf_lngd`.
    """
    for path in checkouts.values():
        if not (path / "hf_lngd").is_dir():
            raise ValueError(f"--against: got {path}, accepted: a checkout, a folder that holds hf_lngd")
    children = {label: _start(name, path) for label, path in checkouts.items()}
    found: dict[str, dict[str, list[float]]] = {label: {"step": [], "optimizer": []} for label in children}
    try:
        for turn in range(warmup + rounds):
            labels = list(children) if turn % 2 == 0 else list(children)[::-1]
            for label in labels:
                whole, own = _one_step(children[label])
                if turn >= warmup:
                    found[label]["step"].append(whole)
                    found[label]["optimizer"].append(own)
    finally:
        for child in children.values():
            child.kill()
            child.communicate()
    return found


def _start(name: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.cost.versions", str(path.resolve()), name]
    return subprocess.Popen(command, cwd=OWN, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _one_step(child: subprocess.Popen[str]) -> tuple[float, float]:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    line = child.stdout.readline().split()
    if len(line) != 2:
        raise RuntimeError(f"a process of {child.args!r} ended; see above")
    return float(line[0]), float(line[1])


def import_from(checkout: str) -> Any:
    """The `hf_lngd` of a checkout; all else stays this one's."""
    sys.path.insert(0, checkout)
    import hf_lngd

    sys.path.remove(checkout)
    if not Path(str(hf_lngd.__file__)).is_relative_to(checkout):
        raise RuntimeError(f"got {hf_lngd.__file__}, accepted: hf_lngd of {checkout}")
    return hf_lngd


def main(checkout: str, name: str) -> None:
    """A step for each line that is read, its seconds and those of `optimizer.step()` in a line that is written."""
    lngd = import_from(checkout)
    torch.set_num_threads(1)
    model, feed = make(name)
    optimizer, generator = lngd.LNGD(model, lr=LR), torch.Generator().manual_seed(0)
    for _ in sys.stdin:
        print(*timed_step(model, optimizer, feed(generator), time.process_time), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
