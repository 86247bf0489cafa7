"""How much memory the patches of a convolution's input take in a factor step, and what it costs to bound it.

    python -m benchmarks.patch_memory

One 3 × 3 convolution with 64 channels on 32 images of 56 × 56 (a layer of a ResNet-50). For each bound `conv_memory`:
the largest tensor that the factor step makes, and its seconds beside those without a bound. Results:
`benchmarks/results/patch_memory.json`.
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

from benchmarks.tables import table
from hf_lngd import LNGD

HERE = Path(__file__).resolve().parent
BOUNDS = (1, 8, 64, 512)
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


def measure(bound: int, rounds: int) -> dict[str, float]:
    """MiB of the largest tensor, and seconds of a forward with the layer's hook, at one `conv_memory`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False))
    optimizer = LNGD(model, lr=0.0, conv_rows=1, conv_memory=bound)
    x = torch.randn(IMAGES, CHANNELS, SIDE, SIDE)
    seconds = []
    for _ in range(rounds):
        optimizer._capture.arm(True)
        start = time.perf_counter()
        model(x)
        seconds.append(time.perf_counter() - start)
    optimizer._capture.arm(True)
    with LargestTensor() as largest:
        model(x)
    optimizer.close()
    return {"bound": bound, "largest_mib": round(largest.bytes / 2**20, 1), "seconds": round(median(seconds), 4)}


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes the file and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="of each bound (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "patch_memory.json", help="file to write")
    args = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: got {getattr(args, name)}, accepted: at least 1")
    torch.set_num_threads(args.threads)
    rows = [measure(bound, args.rounds) for bound in BOUNDS]
    whole = IMAGES * SIDE * SIDE * CHANNELS * 9 * 4 / 2**20
    result = {"patches_mib": round(whole, 1), "hardware": f"CPU, {args.threads} threads", "rows": rows}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"all patches at once: {whole:.0f} MiB\n")
    body = [[f"{r['bound']} MiB", f"{r['largest_mib']:.1f} MiB", f"{r['seconds']:.2f}"] for r in rows]
    print(table(["conv_memory", "largest tensor", "seconds"], body))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
