"""The models and batches whose steps are timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MarianConfig, MarianMTModel

from benchmarks.tasks.cifar10 import make_resnet, make_vit

BATCH, TOKENS, IMAGES = 64, 32, 128
Batch = dict[str, Tensor]
# a new model, and its next batch
Case = tuple[Callable[[], nn.Module], Callable[[torch.Generator], Batch]]


def marian(width: int, ffn: int, heads: int, layers: int, vocabulary: int) -> nn.Module:
    """A Marian with its weights; eager attention, which the meta device can run too."""
    config = MarianConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        activation_function="relu",
        dropout=0.1,
        init_std=width**-0.5,
        scale_embedding=True,
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_id=1,
        forced_eos_token_id=None,
    )
    return MarianMTModel._from_config(config, attn_implementation="eager" if torch.empty(0).is_meta else "sdpa")


def small() -> nn.Module:
    """The model whose steps are timed (7.6 million parameters)."""
    return marian(256, 1024, 4, 3, 8_000)


def transformer_big() -> nn.Module:
    """Transformer-big (209 million parameters)."""
    return marian(1024, 4096, 16, 6, 32_000)


def text(model: Callable[[], nn.Module], batch: int, length: int, vocabulary: int, classes: int = 0) -> Case:
    """Random tokens, to be translated, or of so many classes."""

    def feed(generator: torch.Generator) -> Batch:
        tokens = torch.randint(3, vocabulary, (2, batch, length), generator=generator)
        labels = torch.randint(0, classes, (batch,), generator=generator) if classes else tokens[1]
        return {"input_ids": tokens[0], "attention_mask": torch.ones_like(tokens[0]), "labels": labels}

    return model, feed


def images(model: Callable[[], nn.Module], batch: int, size: int) -> Case:
    """Random images of ten classes."""

    def feed(generator: torch.Generator) -> Batch:
        labels = torch.randint(0, 10, (batch,), generator=generator)
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator), "labels": labels}

    return model, feed


CASES: dict[str, Case] = {
    "marian": text(lambda: small(), BATCH, TOKENS, 8_000),
    "resnet": images(lambda: make_resnet(0), IMAGES, 32),
    "vit": images(lambda: make_vit(0), IMAGES, 32),
}


def timed_step(model: nn.Module, optimizer: Any, batch: Batch, now: Callable[[], float]) -> tuple[float, float]:
    """One training step; seconds by the clock `now` of the whole, and of `optimizer.step()`."""
    start = now()
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    middle = now()
    optimizer.step()
    end = now()
    optimizer.zero_grad()
    return now() - start, end - middle


def make(name: str) -> tuple[nn.Module, Callable[[torch.Generator], Batch]]:
    """The model of a case, in training, always with the same weights; what makes its batches."""
    torch.manual_seed(0)
    make_model, feed = CASES[name]
    return make_model().train(), feed
