"""The models and batches whose steps are timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import MarianConfig, MarianMTModel

from benchmarks.tasks.cifar10 import make_resnet, make_vit

BATCH, TOKENS, IMAGES = 64, 32, 128
Batch = dict[str, Tensor]


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


def sentences(generator: torch.Generator) -> Batch:
    """A batch for the Marian."""
    tokens = torch.randint(3, 8_000, (2, BATCH, TOKENS), generator=generator)
    return {"input_ids": tokens[0], "attention_mask": torch.ones_like(tokens[0]), "labels": tokens[1]}


def images(generator: torch.Generator) -> Batch:
    """A batch for the models of images."""
    labels = torch.randint(0, 10, (IMAGES,), generator=generator)
    return {"pixel_values": torch.randn(IMAGES, 3, 32, 32, generator=generator), "labels": labels}


# name → a new model, and its next batch
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Batch]]] = {
    "marian": (lambda: small(), sentences),
    "resnet": (lambda: make_resnet(0), images),
    "vit": (lambda: make_vit(0), images),
}


def make(name: str) -> tuple[nn.Module, Callable[[torch.Generator], Batch]]:
    """The model of a case, in training, always with the same weights; what makes its batches."""
    torch.manual_seed(0)
    make_model, feed = CASES[name]
    return make_model().train(), feed
