"""What the patches of a convolution's input take in a factor step: memory and time, beside a step without factors.

    python -m benchmarks.cost.patch_memory

One 3 × 3 convolution with 64 channels on 32 images of 56 × 56 (a layer of a ResNet-50): the largest tensor that the
forward pass makes, and its seconds, while LNGD collects statistics and while it does not. LNGD makes patches of a part
of the images at a time. Results: `benchmarks/results/patch_memory.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report.tables import table
from hf_lngd import LNGD

RESULTS = Path(__file__).resolve().parents[1] / "results"
IMAGES, CHANNELS, SIDE = 32, 64, 56


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest storage that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and looks at what it gives."""
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(item, Tensor):
                self.bytes = max(self.bytes, item.untyped_storage().nbytes())
        return result


def measure(collects: bool, rounds: int) -> dict[str, Any]:
    """MiB of the largest tensor, and seconds of a forward pass in which the layer's statistics are collected or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False))
    optimizer = LNGD(model, lr=0.0, preset="paper", fisher="expected")  # of all images
    if not collects:
        optimizer.eval()
    x = torch.randn(IMAGES, CHANNELS, SIDE, SIDE)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        model(x)
        seconds.append(time.perf_counter() - start)
    with LargestTensor() as largest:
        model(x)
    optimizer.close()
    size = round(largest.bytes / 2**20, 1)
    return {"statistics": collects, "largest_mib": size, "seconds": round(median(seconds), 4)}


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes the file and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "patch_memory.json", help="file to write")
    args = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: got {getattr(args, name)}, accepted: at least 1")
    torch.set_num_threads(args.threads)
    rows = [measure(collects, args.rounds) for collects in (False, True)]
    whole = IMAGES * SIDE * SIDE * CHANNELS * 9 * 4 / 2**20
    result = {"patches_mib": round(whole, 1), "hardware": f"CPU, {args.threads} threads", "rows": rows}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"all patches at once: {whole:.0f} MiB\n")
    body = [["yes" if r["statistics"] else "no", f"{r['largest_mib']:.1f} MiB", f"{r['seconds']:.2f}"] for r in rows]
    print(table(["collects statistics", "largest tensor", "seconds"], body))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
