"""Tiny models and steps for the tests of the core: float64, no dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MarianConfig, MarianMTModel

from hf_lngd import LNGD
from hf_lngd.curvature import compiled

IGNORED = -100


def core_marian(seed: int = 0, **changes: Any) -> MarianMTModel:
    """A Marian with 2 + 2 layers of width 16, in float64."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    rest = {"dropout": 0.0, "max_position_embeddings": 32, "activation_function": "relu"}
    return MarianMTModel(MarianConfig(**{**sizes, **heads, **tokens, **rest, **changes})).double().train()


def core_batch(seed: int = 0, rows: int = 8, source: int = 7, target: int = 6) -> dict[str, Tensor]:
    """Random sentences, some of them padded."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 40, (rows, source), generator=draw)
    labels = torch.randint(2, 40, (rows, target), generator=draw)
    mask = torch.ones_like(ids)
    mask[: rows // 2, source - 2 :] = 0
    labels[: rows // 4 or 1, target - 2 :] = IGNORED
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def core_backward(model: nn.Module, optimizer: Any, batch: dict[str, Tensor], parts: int | list[int] = 1) -> None:
    """The exact gradient of the batch's mean loss in micro-batches, and the second pass of fisher="true"."""
    rows = len(batch["labels"])
    sizes = [rows // parts] * parts if isinstance(parts, int) else parts
    terms = (batch["labels"] != IGNORED).sum()
    for part in zip(*(value.split(sizes) for value in batch.values()), strict=True):
        piece = dict(zip(batch, part, strict=True))
        logits = model(**piece).logits
        if isinstance(optimizer, LNGD) and optimizer.needs_fisher_pass:
            optimizer.fisher_backward(logits, piece["labels"] != IGNORED)
        loss = F.cross_entropy(logits.flatten(0, -2), piece["labels"].flatten(), ignore_index=IGNORED, reduction="sum")
        (loss / terms).backward()


def core_step(model: nn.Module, optimizer: Any, batch: dict[str, Tensor], parts: int | list[int] = 1) -> None:
    """One step."""
    core_backward(model, optimizer, batch, parts)
    optimizer.step()
    optimizer.zero_grad()


def core_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what is trained, without keys' biases: their gradient is rounding, which AdamW blows up."""
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad and not name.endswith("k_proj.bias")
    }


def core_distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """‖θ₁ − θ₂‖ / ‖θ₂‖ over all parameters."""
    gap = sum(float((first[name] - second[name]).double().square().sum()) for name in second)
    size = sum(float(value.double().square().sum()) for value in second.values())
    return (gap / size) ** 0.5


def core_forget_watchers() -> None:
    """Optimizers that other tests have left behind no longer hold torch.compile back."""
    for watcher in list(compiled._watchers):
        compiled.run_eagerly(watcher, False)
