"""English to German from scratch: data, model and validation loss.

A small Marian learns to translate from nothing: lowercased text, a joint BPE of 4,000 pieces trained on the training
text, at most 40 tokens a sentence, batches of sentences of like length. Multi30k are captions of images, Tatoeba
everyday sentences; the folder of either has `train.json.gz` and `validation.json.gz`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MarianConfig, MarianMTModel

from benchmarks.tasks.task import Batch, Task
from benchmarks.tasks.text import read_pairs, train_tokenizer

TASKS = ("multi30k", "tatoeba")
VOCABULARY = 4_000
MAX_TOKENS = 40
BATCH = 64
EVALUATION_BATCH = 128
WIDTH = 128
PAD, IGNORED = 0, -100

Encoded = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Data:
    """Token ids of both sides of each pair, and the batches of the validation set."""

    train: Encoded
    validation: list[Batch]


@cache
def prepare(folder: Path) -> Data:
    """Reads and encodes `train.json.gz` and `validation.json.gz` of a folder, once a process.

    Raises:
        ValueError: a file is missing or holds a line that is no translation.
    """
    parts = {}
    for name in ("train", "validation"):
        path = folder / f"{name}.json.gz"
        if not path.is_file():
            raise ValueError(f"--data: {folder} has no {path.name}")
        parts[name] = [(en.lower(), de.lower()) for en, de in read_pairs(path)]
    tokenizer = train_tokenizer(parts["train"], VOCABULARY)

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]

    encoded = {
        name: list(zip(*(encode(list(side)) for side in zip(*pairs, strict=True)), strict=True))
        for name, pairs in parts.items()
    }
    validation = sorted(encoded["validation"], key=lengths_of)
    cuts = range(0, len(validation), EVALUATION_BATCH)
    return Data(encoded["train"], [collate(validation[cut : cut + EVALUATION_BATCH]) for cut in cuts])


def lengths_of(pair: tuple[list[int], list[int]]) -> tuple[int, int]:
    """What pairs are sorted by, so that those of a batch need little padding."""
    return len(pair[1]), len(pair[0])


def collate(pairs: Encoded) -> Batch:
    """Pads to one batch: `input_ids` and `attention_mask` [pairs, source], `labels` [pairs, target] with -100."""

    def pad(rows: list[list[int]], value: int) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    sources = [source for source, _ in pairs]
    return {
        "input_ids": pad(sources, PAD),
        "attention_mask": pad([[1] * len(source) for source in sources], 0),  # other vocabularies use PAD for a token
        "labels": pad([target for _, target in pairs], IGNORED),
    }


def batches(data: Data, seed: int) -> Iterator[Batch]:
    """Endless training batches of sentences of like length, in an order that the seed alone decides."""
    order = random.Random(seed)
    pairs = list(data.train)
    bucket = BATCH * 50
    while True:
        order.shuffle(pairs)
        cuts = []
        for start in range(0, len(pairs), bucket):
            alike = sorted(pairs[start : start + bucket], key=lengths_of)
            cuts += [alike[cut : cut + BATCH] for cut in range(0, len(alike), BATCH)]
        order.shuffle(cuts)
        for cut in cuts:
            yield collate(cut)


def make_model(seed: int) -> nn.Module:
    """The Marian of the task (d=128, 2+2 layers, 1.4 million parameters), its weights decided by the seed alone."""
    torch.manual_seed(seed)
    config = MarianConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        activation_function="relu",
        dropout=0.1,
        init_std=WIDTH**-0.5,
        scale_embedding=True,
        max_position_embeddings=64,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
        eos_token_id=1,
        forced_eos_token_id=None,
    )
    return MarianMTModel(config)


@torch.no_grad()
def validation_loss(model: nn.Module, data: Data) -> float:
    """Mean cross entropy over the validation set's target tokens, in nats."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for batch in data.validation:
        count = int((batch["labels"] != IGNORED).sum())
        total += float(model(**batch).loss) * count
        tokens += count
    model.train(was_training)
    return total / tokens


def make_task(name: str, folder: Path) -> Task:
    """The task of this name with its data."""
    data = prepare(folder)
    return Task(
        name=name,
        make_model=make_model,
        batches=partial(batches, data),
        evaluate=lambda model, tuning: {"loss": validation_loss(model, data)},
    )
