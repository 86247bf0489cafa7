"""Trains a tiny model for very many steps and checks that memory stays flat.

    python -m benchmarks.studies.soak [--steps 20000] [--optim_args ...] [--results benchmarks/results/soak.json]

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


class Training:
    """A model in training, and what long trainings do in between; checkpoints go to a file.

    Attributes:
        done: how often each interruption came.
    """

    def __init__(self, config: LNGDConfig, file: Path) -> None:
        self.config, self.file, self.draw = config, file, torch.Generator().manual_seed(0)
        self.model = Tiny()
        self.optimizer = LNGD(self.model, config, lr=3e-3)
        self.done = {"evaluations": 0, "checkpoints": 0, "restarts": 0, "faults": 0}

    def step(self, step: int) -> float:
        """One step, some with gradients of NaN; returns the loss."""
        ids, mask, labels = batch(self.draw)
        loss = nn.functional.cross_entropy(self.model(ids, mask), labels)
        (loss * (math.nan if step % FAULT == 0 else 1.0)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done["faults"] += step % FAULT == 0
        return float(loss.detach())

    def interrupt(self, step: int) -> None:
        """What is due after this step."""
        for name, interval, interruption in (
            ("evaluations", EVALUATION, self._evaluate),
            ("checkpoints", CHECKPOINT, self._save_and_load),
            ("restarts", RESTART, self._restart),
        ):
            if step % interval == 0:
                self.done[name] += 1
                interruption()

    def _evaluate(self) -> None:
        self.optimizer.eval()
        with torch.no_grad():
            self.model(*batch(self.draw)[:2])
        self.optimizer.train()
        self.optimizer.diagnostics()

    def _save_and_load(self) -> None:
        torch.save(self.optimizer.state_dict(), self.file)
        self.optimizer.load_state_dict(torch.load(self.file, weights_only=True))

    def _restart(self) -> None:
        """A copy goes on; the old pair is dropped, without close()."""
        state = self.optimizer.state_dict()
        self.model = copy.deepcopy(self.model)
        self.optimizer = LNGD(self.model, self.config, lr=3e-3)
        self.optimizer.load_state_dict(state)


class Memory:
    """Two sizes, sampled `SAMPLES` times in a number of steps. Python's own is traced from the start on."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.samples: list[tuple[int, float, float]] = []
        tracemalloc.start()

    def sample(self, step: int) -> None:
        """Look, if it is time: (step, MiB resident, KiB traced)."""
        if step * SAMPLES // self.steps > (step - 1) * SAMPLES // self.steps:  # from end to end, whatever the number
            gc.collect()
            self.samples.append((step, resident_mib(), tracemalloc.get_traced_memory()[0] / 1024))

    def stop(self) -> dict[str, Any]:
        """How much they grew, beside the limits."""
        tracemalloc.stop()
        resident, traced = (growth([sample[which] for sample in self.samples]) for which in (1, 2))
        return {
            "traced_growth_kib": round(traced, 1),
            "traced_limit_kib": TRACED_LIMIT_KIB,
            "resident_growth_mib": round(resident, 2),
            "resident_limit_mib": RESIDENT_LIMIT_MIB,
            "flat": traced <= TRACED_LIMIT_KIB and resident <= RESIDENT_LIMIT_MIB,
            "samples": [[step, round(mib, 2), round(kib, 1)] for step, mib, kib in self.samples],
        }


def soak(steps: int, config: LNGDConfig, each: Callable[[int], Any] = lambda step: None) -> dict[str, Any]:
    """Train for so many steps; what was seen.

    Args:
        each: called after each step.
    """
    torch.manual_seed(0)
    first: list[float] = []
    last: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        training = Training(config, Path(folder) / "optimizer.pt")
        memory, start = Memory(steps), time.perf_counter()
        for step in range(1, steps + 1):
            loss = training.step(step)
            if step <= steps // 10:
                first.append(loss)
            elif step > steps - steps // 10:
                last.append(loss)
            training.interrupt(step)
            each(step)
            memory.sample(step)
    seconds = time.perf_counter() - start
    return {
        "steps": steps,
        "config": config.to_dict(),
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        **training.done,
        "loss_of_the_first_tenth": round(statistics.mean(first), 4),
        "loss_of_the_last_tenth": round(statistics.mean(last), 4),
        "finite": all(bool(p.isfinite().all()) for p in training.model.parameters()),
        **memory.stop(),
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
    try:
        config = LNGDConfig.from_optim_args(given.optim_args)
    except ValueError as problem:
        parser.error(f"--optim_args: {str(problem).removeprefix('optim_args: ')}")
    if given.results is not None:  # now, not after hours
        given.results.parent.mkdir(parents=True, exist_ok=True)
    result = soak(given.steps, config, each)
    if given.results is not None:
        given.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shown = {name: value for name, value in result.items() if name not in ("samples", "config")}
    print(json.dumps(shown, indent=1))
    return 0 if result["flat"] and result["finite"] else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
