"""Trainers of sentence-transformers and trl on two processes, under DDP on gloo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import hf_lngd
from tests.compat import test_sentence_transformers as sentence_transformers
from tests.compat import test_trl as trl
from tests.compat.tiny import bert, llama, weights
from tests.distributed.pool import DistPool

WAYS = ["register", "mixin"]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DistPool]:
    made = DistPool(2, tmp_path_factory.mktemp("pool"), __name__)
    yield made
    made.close()


def train(library: str, way: str, name: str, folder: str, resume: str | None = None, **values: Any) -> Weights:
    """All weights after training, those of a loss among them."""
    hf_lngd.register()
    values |= {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    trainer: Any
    if library == "trl":
        trainer = trl.make(way, name, Path(folder), **values)
        trained = trainer.model
    else:
        trainer = sentence_transformers.make(way, Path(folder), *sentence_transformers.LOSSES[name], **values)
        trained = trainer.loss
    before = weights(trained)
    trainer.train(resume_from_checkpoint=resume)
    after = dict(zip(before, weights(trained).values(), strict=True))  # DDP, if it wraps a loss's model, renames them
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    return after


def on_both(pool: DistPool, folder: Path, **case: Any) -> list[Weights]:
    """What each process ends with. The model is written before."""
    if case["library"] == "trl":
        llama(folder / "model", 1 if case["name"] == "Reward" else None)
    else:
        bert(folder / "bert")
    return pool.run(train, folder=str(folder), **case)


def check_alike(found: list[Weights], expected: Weights, **tolerance: float) -> None:
    """Ranks are the same to the bit, and as expected."""
    for name, value in expected.items():
        assert torch.equal(found[0][name], found[1][name]), name
        torch.testing.assert_close(found[0][name], value, msg=lambda text, name=name: name + text, **tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("library", "name"),
    [("sentence_transformers", "CosineSimilarity"), ("sentence_transformers", "Softmax"), ("trl", "SFT")],
)
def test_two_processes_train_as_one(library: str, name: str, way: str, pool: DistPool, tmp_path: Path) -> None:
    """Where the loss is a mean over rows or tokens; `Softmax` has weights of its own, which no DDP averages."""
    case = {"library": library, "way": way, "name": name, "save_strategy": "no"}
    one = train(folder=str(tmp_path / "one"), per_device_train_batch_size=8, **case)
    hf_lngd.unregister()
    found = on_both(pool, tmp_path / "two", per_device_train_batch_size=4, **case)
    check_alike(found, one, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("sentence_transformers", "MultipleNegativesRanking"),
        ("sentence_transformers", "Matryoshka"),
        ("trl", "DPO"),
        ("trl", "KTO"),
        ("trl", "Reward"),
        ("trl", "GRPO"),
        ("trl", "RLOO"),
    ],
)
def test_ranks_end_alike(library: str, name: str, way: str, pool: DistPool, tmp_path: Path) -> None:
    """Of losses that depend on which rows are in a batch, or draw."""
    found = on_both(pool, tmp_path, library=library, way=way, name=name, save_strategy="no")
    check_alike(found, found[0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("library", "name"), [("sentence_transformers", "MultipleNegativesRanking"), ("trl", "SFT")])
def test_resume_to_the_bit(library: str, name: str, way: str, pool: DistPool, tmp_path: Path) -> None:
    case = {"library": library, "way": way, "name": name}
    whole = on_both(pool, tmp_path, **case)[0]
    last = tmp_path / ("run/checkpoint-2" if library == "sentence_transformers" else "checkpoint-2")
    check_alike(on_both(pool, tmp_path, resume=str(last), **case), whole, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("way", WAYS)
def test_lora(way: str, pool: DistPool, tmp_path: Path) -> None:
    adapters = LoraConfig(r=4, task_type="CAUSAL_LM")
    case = {"library": "trl", "way": way, "name": "SFT", "save_strategy": "no", "peft_config": adapters}
    found = on_both(pool, tmp_path, **case)
    check_alike(found, found[0])
