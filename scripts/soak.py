"""Trains a tiny model for very many steps and checks that memory stays flat.

    python scripts/soak.py [--steps 20000] [--optim_args ...] [--results benchmarks/results/soak.json]

Evaluation, checkpoints that are written and loaded back, models and optimizers that are made anew from one and replace
the old ones, and gradients of NaN come in between, as they do in long trainings. Two sizes are looked at, 24 times:
what Python holds (tracemalloc) and what the process takes (resident set). Exit code 1 if either grows from the second
third of the run to the last one by more than its limit.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_lngd import LNGD, LNGDConfig

SAMPLES = 24
# What is left to chance: interned strings, caches of torch, pages that the allocator keeps.
TRACED_LIMIT_KIB = 128.0
RESIDENT_LIMIT_MIB = 8.0
# Steps between these; none divides another, so that they meet factor steps and each other in every way.
EVALUATION, CHECKPOINT, RESTART, FAULT = 7, 23, 59, 101
WORDS, CLASSES = 50, 5


class Tiny(nn.Module):
    """An embedding, two convolutions (one grouped), a norm, three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(WORDS, 16), nn.LayerNorm(16)
        self.conv, self.group = nn.Conv1d(16, 16, 3, padding=1), nn.Conv1d(16, 16, 3, padding=1, groups=4)
        self.up, self.act, self.down, self.head = (
            nn.Linear(16, 32),
            nn.GELU(),
            nn.Linear(32, 16),
            nn.Linear(16, CLASSES),
        )

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.group(torch.relu(self.conv(x.mT))).mT
        x = x + self.down(self.act(self.up(self.norm(x))))
        return self.head((x * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True))


def batch(draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, T], mask [B, T], labels [B] (what the first two words say), of any length."""
    rows, length = 8, int(torch.randint(3, 12, (), generator=draw))
    ids = torch.randint(0, WORDS, (rows, length), generator=draw)
    mask = torch.ones(rows, length)
    mask[: rows // 2, length - 1 :] = 0
    return ids, mask, (ids[:, 0] + ids[:, 1]) % CLASSES


def resident_mib() -> float:
    """The process's resident set."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(samples: list[float]) -> float:
    """From the second third to the last one, medians."""
    third = len(samples) // 3
    return statistics.median(samples[-third:]) - statistics.median(samples[third : 2 * third])


def soak(steps: int, config: LNGDConfig, each: Callable[[int], Any] = lambda step: None) -> dict[str, Any]:
    """Train for so many steps; what was seen.

    Args:
        each: called after each step.
    """
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    model = Tiny()
    optimizer = LNGD(model, config, lr=3e-3)
    file = Path(tempfile.mkdtemp()) / "optimizer.pt"
    done = {"evaluations": 0, "checkpoints": 0, "restarts": 0, "faults": 0}
    losses: list[float] = []
    resident: list[float] = []
    traced: list[float] = []
    at: list[int] = []
    tracemalloc.start()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        ids, mask, labels = batch(draw)
        loss = nn.functional.cross_entropy(model(ids, mask), labels)
        (loss * (math.nan if step % FAULT == 0 else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step <= steps // 10 or step > steps - steps // 10:
            losses.append(float(loss.detach()))
        done["faults"] += step % FAULT == 0
        if step % EVALUATION == 0:
            done["evaluations"] += 1
            optimizer.eval()
            with torch.no_grad():
                model(*batch(draw)[:2])
            optimizer.train()
            optimizer.diagnostics()
        if step % CHECKPOINT == 0:
            done["checkpoints"] += 1
            torch.save(optimizer.state_dict(), file)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        if step % RESTART == 0:  # a copy goes on, the old pair is dropped, without close()
            done["restarts"] += 1
            state = optimizer.state_dict()
            model = copy.deepcopy(model)
            optimizer = LNGD(model, config, lr=3e-3)
            optimizer.load_state_dict(state)
            del state
        each(step)
        if step % max(1, steps // SAMPLES) == 0 and len(at) < SAMPLES:
            gc.collect()
            at.append(step)
            resident.append(resident_mib())
            traced.append(tracemalloc.get_traced_memory()[0] / 1024)
    seconds = time.perf_counter() - start
    tracemalloc.stop()
    file.unlink(missing_ok=True)
    file.parent.rmdir()
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    part = len(losses) // 2
    first, last = statistics.mean(losses[:part]), statistics.mean(losses[part:])
    traced_growth, resident_growth = growth(traced), growth(resident)
    return {
        "steps": steps,
        "config": config.to_dict(),
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        **done,
        "loss_of_the_first_tenth": round(first, 4),
        "loss_of_the_last_tenth": round(last, 4),
        "traced_growth_kib": round(traced_growth, 1),
        "traced_limit_kib": TRACED_LIMIT_KIB,
        "resident_growth_mib": round(resident_growth, 2),
        "resident_limit_mib": RESIDENT_LIMIT_MIB,
        "flat": traced_growth <= TRACED_LIMIT_KIB and resident_growth <= RESIDENT_LIMIT_MIB,
        "finite": finite,
        "samples": [[s, round(r, 2), round(t, 1)] for s, r, t in zip(at, resident, traced, strict=True)],
    }


def main(arguments: list[str] | None = None, each: Callable[[int], Any] = lambda step: None) -> int:
    """Exit code: 0 if memory stayed flat and the weights finite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--optim_args", default="factor_interval=10,inverse_interval=5")
    parser.add_argument("--results", type=Path, help="a JSON file for what was seen")
    given = parser.parse_args(arguments)
    if given.steps < SAMPLES:
        parser.error(f"--steps: got {given.steps}, accepted: an integer, at least {SAMPLES}")
    result = soak(given.steps, LNGDConfig.from_optim_args(given.optim_args), each)
    if given.results is not None:
        given.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shown = {name: value for name, value in result.items() if name not in ("samples", "config")}
    print(json.dumps(shown, indent=1))
    return 0 if result["flat"] and result["finite"] else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
