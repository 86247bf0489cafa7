"""Tiny models and batches in float64, without dropout, on which invariance and precision are measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MarianConfig, MarianMTModel

Batch = dict[str, Tensor]
WORDS, CLASSES, IGNORED = 40, 5, -100


def marian(**changes: Any) -> nn.Module:
    """A Marian with 2 + 2 layers of width 16."""
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    rest = {"dropout": 0.0, "max_position_embeddings": 32, "activation_function": "relu"}
    return MarianMTModel(MarianConfig(**{**sizes, **heads, **tokens, **rest, **changes})).double().train()


def sentences(seed: int, rows: int, source: int = 7, target: int = 6) -> Batch:
    """Random sentences, some of them padded."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, WORDS, (rows, source), generator=draw)
    labels = torch.randint(2, WORDS, (rows, target), generator=draw)
    mask = torch.ones_like(ids)
    mask[: rows // 2, source - 2 :] = 0
    labels[: rows // 4 or 1, target - 2 :] = IGNORED
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


class Convolutions(nn.Module):
    """A small residual network of convolutions, one of them grouped, and a head; no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm([8, 6, 6])
        self.head = nn.Linear(8, CLASSES)
        self.double()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [B, CLASSES] of images [B, 3, 6, 6]."""
        x = torch.relu(self.first(pixel_values))
        x = x + torch.relu(self.grouped(self.norm(x)))
        return self.head(x.mean((2, 3)))


def images(seed: int, rows: int, size: int = 6, classes: int = CLASSES) -> Batch:
    """Noise, and labels."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, size, size, generator=draw, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(0, classes, (rows,), generator=draw)}


def to(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with its floating-point tensors in this dtype."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
