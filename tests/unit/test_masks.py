"""Which tokens of a batch count, and which mask is whose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import FSMTConfig, FSMTForConditionalGeneration

from hf_lngd import LNGD
from hf_lngd.masks import INPUTS, OPEN, TARGETS, BatchMasks, bind_batch
from tests.helpers import marian_batch, tiny_marian


def test_target_mask_without_labels() -> None:
    config = SimpleNamespace(pad_token_id=0, eos_token_id=1, is_encoder_decoder=True)
    # labels: 5 6 1 - -, then 5 6 7 8 9 (cut off), then 5 6 7 1 -
    ids = torch.tensor([[0, 5, 6, 1, 0], [0, 5, 6, 7, 8], [0, 5, 6, 7, 1]])
    masks = BatchMasks({"input_ids": ids, "decoder_input_ids": ids}, config)
    assert masks.by_source[TARGETS].tolist() == [[True] * 3 + [False] * 2, [True] * 5, [True] * 4 + [False]]


def test_labels_stand_above_masks_and_masks_above_inputs() -> None:
    ids = torch.tensor([[3, 4, 0]])
    config = SimpleNamespace(pad_token_id=0, is_encoder_decoder=True)
    labels, mask = torch.tensor([[-100, 4, 5]]), torch.tensor([[1, 0, 1]])
    batch = {"decoder_input_ids": ids, "decoder_attention_mask": mask, "labels": labels}
    assert BatchMasks(batch, config).by_source[TARGETS].tolist() == [[False, True, True]]
    del batch["labels"]
    assert BatchMasks(batch, config).by_source[TARGETS].tolist() == [[True, False, True]]


@pytest.mark.parametrize(
    ("batch", "samples", "terms"),
    [
        ({"labels": torch.tensor([[1, -100], [2, 3]])}, 2, 3),
        ({"x": torch.zeros(5, 2), "labels": torch.zeros(5, 1)}, 5, 5),  # regression: a term a sample
        ({"images": [torch.zeros(4, 3)]}, 4, 4),
        ({"more": {"x": (torch.zeros(()), torch.zeros(6))}}, 6, 6),
        ({"n": 3}, 0, 0),
    ],
)
def test_samples_and_terms_of_a_batch(batch: dict[str, Any], samples: int, terms: int) -> None:
    masks = BatchMasks(batch)
    assert (masks.samples, int(masks.terms)) == (samples, terms)


def test_whose_mask_it_is() -> None:
    two_sided = SimpleNamespace(is_encoder_decoder=True)
    mask = torch.ones(2, 4, dtype=torch.long)
    for target, own in ((6, TARGETS), (4, TARGETS)):
        masks = BatchMasks({"attention_mask": mask, "labels": torch.ones(2, target, dtype=torch.long)}, two_sided)
        source, there = torch.Size((2, 4)), torch.Size((2, target))
        assert masks.source_of("encoder.fc", source, False) == masks.source_of("decoder.k", source, True) == INPUTS
        assert masks.source_of("decoder.fc", there, False) == own
        assert masks.source_of("decoder.fc", torch.Size((3, 3)), False) is None
        assert masks.flat(INPUTS, torch.Size((3, 3))) is None and masks.flat(None, source) is None
        assert masks.flat(own, there).shape == (2 * target,)
    assert BatchMasks({}).source_of("fc", torch.Size((2, 4)), False) == OPEN
    # a source without a mask: each batch tells again
    assert BatchMasks({"labels": torch.ones(2, 4).long()}, two_sided).source_of("encoder.fc", source, False) == OPEN


def test_arguments_by_name() -> None:
    class Model(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            return ids

    assert bind_batch(Model(), (1, 2), {"labels": 3}) == {"ids": 1, "mask": 2, "labels": 3}
    assert bind_batch(Model(), (), {"ids": 1}) == {"ids": 1}
    assert bind_batch(Model(), (1, 2, 3), {}) == {"ids": 1, "mask": 2, "arg2": 3}


# In a model


def counted(optimizer: LNGD) -> dict[str, int]:
    """Tokens by group, of the step that is under way."""
    return {name: int(one.n) for name, one in optimizer.core.capture.finish().items()}


@pytest.mark.parametrize("target", [8, 6], ids=["as many tokens as sentences", "fewer"])
def test_masks_of_a_model_that_works_time_first(target: int) -> None:
    tokens = {"src_vocab_size": 40, "tgt_vocab_size": 40, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    rest = {"dropout": 0.0, "attention_dropout": 0.0, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    model = FSMTForConditionalGeneration(FSMTConfig(langs=["en", "de"], **tokens, **sizes, **heads, **rest))
    batch = marian_batch(rows=8, source=8, target=target)
    optimizer = LNGD(model, lr=0.0)
    model(**batch, decoder_input_ids=batch["labels"].clamp_min(0)).loss.backward()
    counts = counted(optimizer)
    assert counts["model.encoder.layers.0.fc1"] == int(batch["attention_mask"].sum())
    assert counts["model.decoder.layers.0.fc1"] == int((batch["labels"] != -100).sum())


def test_a_batch_that_is_named_beforehand_counts() -> None:
    model, batch = tiny_marian(), marian_batch()
    optimizer = LNGD(model, lr=0.0)
    labels = batch.pop("labels")
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    optimizer.set_batch({**batch, "labels": labels})
    model(**batch, decoder_input_ids=shifted).logits.sum().backward()
    assert int(optimizer.core.capture.terms) == int((labels != -100).sum())
    assert counted(optimizer)["model.decoder.layers.0.fc1"] == int((labels != -100).sum())
