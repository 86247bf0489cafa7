"""Factors of one model in several precisions: what the table of the README and its test measure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from hf_lngd import LNGD
from tests.core_helpers import IGNORED, core_batch, core_marian

FULL = "float32"
BF16_AUTOCAST, FP16_AUTOCAST, BF16_WEIGHTS = "bf16 autocast", "fp16 autocast, scaler", "bf16 weights"
PRECISIONS = (FULL, BF16_AUTOCAST, FP16_AUTOCAST, BF16_WEIGHTS)
ACCUMULATIONS = (1, 2)
CHECKPOINTING: dict[str, bool | None] = {"off": None, "non-reentrant": False, "reentrant": True}
MODELS = ("Marian", "ViT")
# What is estimated: in the forward pass; from gradients, which reentrant checkpointing hides; the rates of Eq. 12-13.
FORWARD: dict[str, Any] = {"chain": "full"}
GRADIENTS: dict[str, Any] = {"family": "kfac", "rate": "adaptive", "rate_rows": 1}
STEPS = 2
# Gradients overflow at this scale, so that the first steps are left out, as when training begins.
FIRST_SCALE = 2.0**22


def make(kind: str) -> nn.Module:
    """A tiny model in float32, without dropout."""
    if kind == "Marian":
        return core_marian().float()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.0)
    return ViTForImageClassification(config).train()


def batch_of(kind: str, seed: int) -> dict[str, Tensor]:
    """16 sentences, some of them padded, or 16 images of noise."""
    if kind == "Marian":
        return core_batch(seed, rows=16)
    draw = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(16, 3, 8, 8, generator=draw),
        "labels": torch.randint(0, 3, (16,), generator=draw),
    }


def factors(
    kind: str, precision: str, accumulation: int, checkpointing: str, fields: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Factors and rates by layer after two steps that move nothing, as the Trainer makes them: clipped by norm.

    Returns:
        factors, by layer and kind; rates α_l; steps that the scaler left out.
    """
    model: Any = make(kind)
    if precision == BF16_WEIGHTS:
        model.to(torch.bfloat16)
    reentrant = CHECKPOINTING[checkpointing]
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    optimizer = LNGD(model, lr=0.0, factor_interval=1, conv_rows=1, **fields)
    scaler = GradScaler("cpu", init_scale=FIRST_SCALE, enabled=precision == FP16_AUTOCAST)
    half = torch.float16 if precision == FP16_AUTOCAST else torch.bfloat16
    tries = 0
    while optimizer._steps < STEPS:
        batch = batch_of(kind, optimizer._steps)
        if precision == BF16_WEIGHTS:
            batch = {name: v.to(torch.bfloat16) if v.is_floating_point() else v for name, v in batch.items()}
        terms = (batch["labels"] != IGNORED).sum()
        for part in zip(*(value.chunk(accumulation) for value in batch.values()), strict=True):
            piece = dict(zip(batch, part, strict=True))
            with torch.autocast("cpu", half, enabled=precision in (BF16_AUTOCAST, FP16_AUTOCAST)):
                logits = model(**piece).logits
            flat, labels = logits.float().flatten(0, -2), piece["labels"].flatten()
            loss = F.cross_entropy(flat, labels, ignore_index=IGNORED, reduction="sum") / terms
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        tries += 1
    named = {f"{n}.{k}": v for n in optimizer._capture.layers for k, v in optimizer.factors(n).items()}
    assert optimizer._preconditioner is not None
    banks = optimizer._preconditioner.layer_banks
    rates = {y.name: rate for bank in banks for y, rate in zip(bank.layers, bank.rate, strict=True)}
    optimizer.close()
    return named, rates, tries - STEPS


def gap(found: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    """The greatest relative difference, ‖X − X₃₂‖ / ‖X₃₂‖."""
    assert found.keys() == plain.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in plain.items())
