"""Tiny models, batches and steps, and the configurations that the contract is stated over."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MarianConfig, MarianMTModel

from hf_lngd import LNGD

IGNORED = -100
EVERY_STEP: dict[str, Any] = {"factor_interval": 1, "inverse_interval": 1, "update_interval": 1}


class Images(nn.Module):
    """A residual network of two convolutions, one of them grouped, a norm and a head, for images [B, 3, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.norm, self.head = nn.LayerNorm([6, 4, 4]), nn.Linear(6, 5)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        x = torch.relu(self.first(pixel_values))
        x = x + torch.relu(self.grouped(self.norm(x)))
        return self.head(x.mean((2, 3)))


class Words(nn.Module):
    """An embedding, two layers around a norm, for tokens [B, T]; `act` follows the first layer, `spoil` its input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.norm, self.down = (
            nn.Embedding(12, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4),
        )  # fmt: skip
        self.act: Callable[[Tensor], Tensor] = torch.tanh
        self.spoil: Callable[[Tensor], Tensor] | None = None

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        h = self.act(self.up(x if self.spoil is None else self.spoil(x)))
        return self.down(self.norm(h))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model from this seed; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().train()


def tiny_marian(seed: int = 0, **changes: Any) -> MarianMTModel:
    """A Marian with 1 + 1 layers of width 16 and a tied embedding, in float64, without dropout."""
    sizes = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    rest = {"dropout": 0.0, "activation_function": "relu"}
    return seeded(lambda: MarianMTModel(MarianConfig(**{**sizes, **heads, **tokens, **rest, **changes})).double(), seed)


def marian_batch(seed: int = 0, rows: int = 8, source: int = 7, target: int = 6) -> dict[str, Tensor]:
    """Random sentences, some of them padded."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 40, (rows, source), generator=draw)
    labels = torch.randint(2, 40, (rows, target), generator=draw)
    mask = torch.ones_like(ids)
    mask[: rows // 2, source - 2 :] = 0
    labels[: rows // 4 or 1, target - 2 :] = IGNORED
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def image_batch(seed: int = 0, rows: int = 8) -> dict[str, Tensor]:
    """Images of noise."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, 4, 4, generator=draw, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(0, 5, (rows,), generator=draw)}


def word_batch(seed: int = 0, rows: int = 8, length: int = 5) -> dict[str, Tensor]:
    """Tokens with a label each."""
    draw = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(0, n, (rows, length), generator=draw) for n in (12, 4))
    return {"ids": ids, "labels": labels}


def loss_of(model: Any, batch: dict[str, Tensor], terms: Any = None, optimizer: Any = None) -> Tensor:
    """The mean cross-entropy of a batch, or its share of that over `terms`; for fisher="true" the second pass, too."""
    output = model(**batch)
    logits, labels = getattr(output, "logits", output).flatten(0, -2), batch["labels"].flatten()
    if isinstance(optimizer, LNGD) and optimizer.needs_fisher_pass:
        optimizer.fisher_backward(logits, labels != IGNORED)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return loss / ((labels != IGNORED).sum() if terms is None else terms)


def backward(model: Any, optimizer: Any, batch: dict[str, Tensor], parts: int | list[int] = 1) -> None:
    """The gradient of a batch's mean loss, in micro-batches: so many, or of these sizes."""
    rows, terms = len(batch["labels"]), (batch["labels"] != IGNORED).sum()
    sizes = [rows // parts] * parts if isinstance(parts, int) else parts
    for part in zip(*(value.split(sizes) for value in batch.values()), strict=True):
        loss_of(model, dict(zip(batch, part, strict=True)), terms, optimizer).backward()


def train_step(model: Any, optimizer: Any, batch: dict[str, Tensor], parts: int | list[int] = 1) -> None:
    """One step."""
    backward(model, optimizer, batch, parts)
    optimizer.step()
    optimizer.zero_grad()


@dataclass(frozen=True)
class Case:
    """One of the configurations over which the contract is stated: a model, its batches, settings."""

    name: str
    build: Callable[[int], nn.Module]
    batch_of: Callable[..., dict[str, Tensor]]
    fields: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    def model(self, seed: int = 0) -> Any:
        """A new model, the same for the same seed."""
        return self.build(seed).to(self.dtype)

    def make(self, seed: int = 0, **fields: Any) -> tuple[Any, LNGD]:
        """A model and its optimizer, whose factor steps are 0, 2, 4, …"""
        model = self.model(seed)
        every_other = {"lr": 1e-2, "factor_interval": 2, "inverse_interval": 2}
        return model, LNGD(model, **{**every_other, **self.fields, **fields})

    def batch(self, seed: int = 0) -> dict[str, Tensor]:
        """A batch of 8 samples in the model's precision."""
        found = self.batch_of(seed)
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in found.items()}

    def train(self, model: Any, optimizer: Any, steps: range = range(3), parts: int | list[int] = 1) -> None:
        """A step with the batch of each of these seeds."""
        for seed in steps:
            train_step(model, optimizer, self.batch(seed), parts)


CASES = {
    case.name: case
    for case in (
        Case("images", lambda seed: seeded(Images, seed), image_batch),
        Case("marian", tiny_marian, marian_batch),
        Case("bias", lambda seed: seeded(Images, seed), image_batch, {"bias": "factor", "max_factor_dim": 10}),
        Case("bfloat16", lambda seed: seeded(Words, seed), word_batch, dtype=torch.bfloat16),
        Case("paper", lambda seed: seeded(Words, seed), word_batch, {"preset": "paper"}),
        Case("kfac", lambda seed: seeded(Images, seed), image_batch, {"family": "kfac"}),
    )
}


# What is compared


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what is trained, without keys' biases: their gradient is rounding, which AdamW blows up."""
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad and not name.endswith("k_proj.bias")
    }


def equal(first: Any, second: Any) -> bool:
    """Whether two models, or two dicts or lists of tensors, are the same to the bit."""
    one, two = (dict(v.named_parameters()) if isinstance(v, nn.Module) else v for v in (first, second))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """‖θ₁ − θ₂‖ / ‖θ₂‖ over all parameters."""
    gap = sum(float((first[name] - value).double().square().sum()) for name, value in second.items())
    size = sum(float(value.double().square().sum()) for value in second.values())
    return (gap / size) ** 0.5


def layers_of(optimizer: LNGD) -> list[str]:
    """Names of the layers that LNGD whitens, in the model's order."""
    routes = [route for route in optimizer.routing() if route.owner == "lngd" and "embedding" not in route.reason]
    return list(dict.fromkeys(route.layer for route in routes))


def factors_of(optimizer: LNGD) -> dict[str, Tensor]:
    """Every factor as `<layer>.<kind>`."""
    return {f"{n}.{kind}": value.clone() for n in layers_of(optimizer) for kind, value in optimizer.factors(n).items()}


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists by their path."""
    if not isinstance(state, (dict, list, tuple)):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {name: leaf for key, value in items for name, leaf in flat(value, f"{prefix}/{key}").items()}


def tensors_of(state: Any) -> dict[str, Tensor]:
    """A copy of every tensor of a state by its path."""
    return {name: value.clone() for name, value in flat(state).items() if isinstance(value, Tensor)}


def assert_identical(found: Any, expected: Any) -> None:
    """All leaves are the same, tensors to the bit and in the same dtype."""
    mine, theirs = flat(found), flat(expected)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            assert mine[name].dtype == value.dtype and torch.equal(mine[name], value), name
        else:
            assert mine[name] == value, name


def through_a_file(value: Any) -> Any:
    """What comes back from a file that is loaded with ``weights_only=True``."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@contextmanager
def every_sample() -> Iterator[None]:
    """Factors of convolutions are of all samples, not of one in eight: which one depends on how a batch is split."""
    from hf_lngd.capture import Capture

    with patch.object(Capture, "convolution_samples", 1):
        yield


BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def cpu_with(*names: str) -> Any:
    """A CPU that has these instructions for bfloat16 alone."""
    capabilities = {"avx512_f": True, "architecture": "x86_64"} | {name: name in names for name in BF16_INSTRUCTIONS}
    return patch.object(torch.cpu, "get_capabilities", lambda: capabilities, create=True)


def hooks_of(model: nn.Module) -> int:
    """How many forward hooks there are in a model."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@contextmanager
def keeping(model: nn.Module) -> Iterator[None]:
    """What happens here leaves the weights as they are."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    yield
    assert equal(before, {name: p.detach() for name, p in model.named_parameters()})
