"""How far factors are from those of float32: precision × accumulation × checkpointing × model.

    python -m benchmarks.cost.precision

Steps that move nothing, made as the Trainer makes them: clipped by norm, scaled in float16. `tests/` bounds the same
figures. The results are `benchmarks/results/precision.json` and the table `precision.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.report.tables import table
from benchmarks.studies import tiny
from hf_lngd import LNGD

RESULTS = Path(__file__).resolve().parents[1] / "results"
HEAD = ["model", "precision", "micro-batches", "checkpointing", "Φ, Ψ", "KFAC's A, B", "rates α_l", "steps left out"]
FULL = "float32"
BF16_AUTOCAST, FP16_AUTOCAST, BF16_WEIGHTS = "bf16 autocast", "fp16 autocast, scaler", "bf16 weights"
PRECISIONS = (FULL, BF16_AUTOCAST, FP16_AUTOCAST, BF16_WEIGHTS)
ACCUMULATIONS = (1, 2)
CHECKPOINTING: dict[str, bool | None] = {"off": None, "non-reentrant": False, "reentrant": True}
MODELS = ("Marian", "ViT")
# What is estimated: in the forward pass; from gradients, which reentrant checkpointing hides; the rates of Eq. 12-13.
FORWARD: dict[str, Any] = {}
GRADIENTS: dict[str, Any] = {"family": "kfac", "rate": "adaptive"}
STEPS, ROWS = 2, 16
# Gradients overflow at this scale, so that the first steps are left out, as when training begins.
FIRST_SCALE = 2.0**22
Factors = dict[str, Tensor]


def make(kind: str) -> nn.Module:
    """A tiny model in float32, without dropout."""
    if kind == "Marian":
        return tiny.marian().float()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.0)
    return ViTForImageClassification(config).train()


def factors(
    kind: str, precision: str, accumulation: int, checkpointing: str, fields: dict[str, Any]
) -> tuple[Factors, float, int]:
    """Of two steps that move nothing: factors by layer and kind, the mean rate α_l, steps that the scaler left out."""
    model: Any = make(kind)
    if precision == BF16_WEIGHTS:
        model.to(torch.bfloat16)
    reentrant = CHECKPOINTING[checkpointing]
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    optimizer = LNGD(model, lr=0.0, factor_interval=1, **fields)
    scaler = GradScaler("cpu", init_scale=FIRST_SCALE, enabled=precision == FP16_AUTOCAST)
    half = torch.float16 if precision == FP16_AUTOCAST else torch.bfloat16
    steps = left_out = 0
    while steps < STEPS:
        batch = tiny.sentences(steps, ROWS) if kind == "Marian" else tiny.images(steps, ROWS, 8, 3)
        batch = tiny.to(batch, torch.bfloat16 if precision == BF16_WEIGHTS else torch.float32)
        terms = (batch["labels"] != tiny.IGNORED).sum()
        for part in zip(*(value.chunk(accumulation) for value in batch.values()), strict=True):
            piece = dict(zip(batch, part, strict=True))
            with torch.autocast("cpu", half, enabled=precision in (BF16_AUTOCAST, FP16_AUTOCAST)):
                logits = model(**piece).logits
            flat, labels = logits.float().flatten(0, -2), piece["labels"].flatten()
            loss = F.cross_entropy(flat, labels, ignore_index=tiny.IGNORED, reduction="sum") / terms
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped = scaler.get_scale() < scale
        steps, left_out = steps + (not skipped), left_out + skipped
        optimizer.zero_grad()
    layers = dict.fromkeys(layer.name for layer in optimizer.core.routing.layers)
    found = {f"{name}.{kind}": value for name in layers for kind, value in optimizer.factors(name).items()}
    rate = optimizer.diagnostics()["direction_scale_mean"]
    optimizer.close()
    return found, rate, left_out


def gap(found: Factors, plain: Factors) -> float:
    """The greatest relative difference, ‖X − X₃₂‖ / ‖X₃₂‖."""
    assert found.keys() == plain.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in plain.items())


def measure() -> list[dict[str, Any]]:
    """A row for each combination: the greatest relative difference over layers. None: gradients are hidden."""
    rows = []
    for kind in MODELS:
        plain, _, _ = factors(kind, FULL, 1, "off", FORWARD)
        of_gradients, rate, _ = factors(kind, FULL, 1, "off", GRADIENTS)
        for precision in PRECISIONS:
            for accumulation in ACCUMULATIONS:
                for checkpointing, reentrant in CHECKPOINTING.items():
                    case = (kind, precision, accumulation, checkpointing)
                    row: dict[str, Any] = dict(zip(HEAD, case, strict=False))
                    found, _, row["steps left out"] = factors(*case, FORWARD)
                    row["Φ, Ψ"] = gap(found, plain)
                    row["KFAC's A, B"] = row["rates α_l"] = None
                    if not reentrant:
                        found, own, _ = factors(*case, GRADIENTS)
                        row["KFAC's A, B"], row["rates α_l"] = gap(found, of_gradients), abs(own - rate) / rate
                    rows.append(row)
    return rows


def text_of(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""

    def cell(value: Any) -> str:
        return "refused" if value is None else f"{value:.1e}" if isinstance(value, float) else str(value)

    return table(HEAD, [[cell(row[name]) for name in HEAD] for row in rows])


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    rows = measure()
    (RESULTS / "precision.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    title = "# Factors in half precision: greatest relative difference to float32 over layers\n\n"
    note = (
        "`python -m benchmarks.cost.precision`. In float32 without accumulation and checkpointing: the row itself.\n\n"
    )
    (RESULTS / "precision.md").write_text(title + note + text_of(rows) + "\n", encoding="utf-8")
    print(text_of(rows))


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()  # a wrong argument is named
    main()
