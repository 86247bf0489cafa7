"""sentence-transformers' own trainers, under `register()` and with the mixin before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

import hf_lngd
from hf_lngd import LNGDArgumentsMixin, LNGDTrainerMixin
from hf_lngd.integrations.trainer import lngd_of
from tests.compat.tiny import SETTINGS, bert, moved, sentence, table, weights

WAYS = ["register", "mixin"]
PAIRS = table(anchor=lambda i: sentence(i), positive=lambda i: sentence(i, 4))
SCORED = table(a=lambda i: sentence(i), b=lambda i: sentence(i + 1), label=lambda i: float(i % 2))
CLASSES = table(a=lambda i: sentence(i), b=lambda i: sentence(i + 1), label=lambda i: i % 3)
TRIPLETS = table(a=lambda i: sentence(i), b=lambda i: sentence(i, 4), c=lambda i: sentence(i + 2))
Make = Callable[[Any], Any]
LOSSES: dict[str, tuple[Make, Any]] = {
    "MultipleNegativesRanking": (lambda model: losses.MultipleNegativesRankingLoss(model), PAIRS),
    "CosineSimilarity": (lambda model: losses.CosineSimilarityLoss(model), SCORED),
    "CoSENT": (lambda model: losses.CoSENTLoss(model), SCORED),
    "Triplet": (lambda model: losses.TripletLoss(model), TRIPLETS),
    "Softmax": (lambda model: losses.SoftmaxLoss(model, 16, 3), CLASSES),
    "Matryoshka": (
        lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [16, 8]),
        PAIRS,
    ),
}
CACHED: Make = lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)  # noqa: E731


@dataclass
class Arguments(LNGDArgumentsMixin, SentenceTransformerTrainingArguments):
    """As a user makes them."""


class MixinTrainer(LNGDTrainerMixin, SentenceTransformerTrainer):
    """As a user makes it."""


@dataclass
class CrossArguments(LNGDArgumentsMixin, CrossEncoderTrainingArguments):
    """As a user makes them."""


class CrossTrainer(LNGDTrainerMixin, CrossEncoderTrainer):
    """As a user makes it."""


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    hf_lngd.register()
    yield
    hf_lngd.unregister()


def encoder(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(modules=[Transformer(bert(folder / "bert")), Pooling(16)], device="cpu")


def make(way: str, folder: Path, loss: Make, data: Any, **values: Any) -> Any:
    trainer, kind = (
        (SentenceTransformerTrainer, SentenceTransformerTrainingArguments)
        if way == "register"
        else (MixinTrainer, Arguments)
    )
    model = encoder(folder)
    args = kind(str(folder / "run"), **{**SETTINGS, **values})
    return trainer(model=model, args=args, train_dataset=data, eval_dataset=data, loss=loss(model))


def train(trainer: Any, **values: Any) -> set[str]:
    """What moved."""
    before = weights(trainer.loss)
    trainer.train(**values)
    assert lngd_of(trainer.optimizer) is not None
    return moved(before, trainer.loss)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, way: str, tmp_path: Path) -> None:
    trainer = make(way, tmp_path, *LOSSES[name])
    changed = train(trainer)
    assert any("attention" in key for key in changed)
    head = {key for key in weights(trainer.loss) if key.startswith("classifier")}
    assert head <= changed and bool(head) is (name == "Softmax")


@pytest.mark.parametrize("way", WAYS)
def test_cached_losses(way: str, tmp_path: Path) -> None:
    assert train(make(way, tmp_path, CACHED, PAIRS))


@pytest.mark.parametrize("way", WAYS)
def test_resume(way: str, tmp_path: Path) -> None:
    whole = make(way, tmp_path, *LOSSES["MultipleNegativesRanking"])
    train(whole)
    resumed = make(way, tmp_path, *LOSSES["MultipleNegativesRanking"])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_best_model(way: str, tmp_path: Path) -> None:
    values = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}
    trainer = make(way, tmp_path, *LOSSES["CosineSimilarity"], metric_for_best_model="eval_loss", max_steps=8, **values)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and not best.endswith("-8")
    for name, value in SentenceTransformer(best, device="cpu").state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_rates_by_name(way: str, tmp_path: Path) -> None:
    trainer = make(way, tmp_path, *LOSSES["Softmax"], learning_rate_mapping={"word_embeddings": 0.0})
    changed = train(trainer)
    assert not any("word_embeddings" in name for name in changed) and any("attention" in name for name in changed)


@pytest.mark.parametrize("way", WAYS)
def test_cross_encoder(way: str, tmp_path: Path) -> None:
    of_mixin = way == "mixin"
    trainer: Any = CrossTrainer if of_mixin else CrossEncoderTrainer
    kind: Any = CrossArguments if of_mixin else CrossEncoderTrainingArguments
    model = CrossEncoder(bert(tmp_path / "bert"), num_labels=1, device="cpu")
    args = kind(str(tmp_path / "run"), **SETTINGS)
    made = trainer(model=model, args=args, train_dataset=SCORED, loss=BinaryCrossEntropyLoss(model))
    assert any("attention" in name for name in train(made))
