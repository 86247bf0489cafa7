"""`python -m hf_lngd doctor`: batches that fit, what was replaced is said, and its bytes are those of real steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import BartConfig, BertConfig, GPT2Config, LlamaConfig

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.estimate import estimate
from hf_lngd.integrations import doctor_batch, doctor_model
from hf_lngd.integrations.command import main
from hf_lngd.integrations.doctor_model import Subject, build, look
from hf_lngd.integrations.usage import UsageError
from tests.hf_helpers import SIZES

TOKENS = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}


def saved(folder: Path, config: Any) -> str:
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("embedding", ["rotated", "fallback"])
@pytest.mark.parametrize("update", ["kahan", "stochastic", "nearest"])
def test_estimates_of_bfloat16_weights(embedding: str, update: str) -> None:
    """AdamW's moments are float32 here, and what rounding takes off is kept of every parameter."""
    config, settings = (
        LlamaConfig(**TOKENS, **HEADS, dtype="bfloat16"),
        LNGDConfig(embedding=embedding, bf16_update=update),
    )
    found = look(config, "text", 2, 5, lambda subject: estimate(subject.model, subject.loss, settings))
    subject = build(config, "text", 2, 5, "cpu")
    optimizer = LNGD(subject.model, settings)
    subject.loss().backward()
    optimizer.step()
    assert found.memory == optimizer.memory_usage()
    assert found.adamw == sum(4 * p.numel() + 4 for p in subject.model.parameters())


@pytest.mark.parametrize("text", ["fisher=sampled", "preset=paper", "preset=lngd_sample", "preset=lngd_lr"])
def test_doctor_takes_every_preset_of_a_large_model(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws, too, are made on the meta device: there is no model that is too large."""
    monkeypatch.setattr(doctor_model, "MOST_ON_CPU", 0)
    main(["doctor", saved(tmp_path, LlamaConfig(**TOKENS, **HEADS)), "--optim_args", text, "--length", "5"])
    assert "state: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "architecture", "told"),
    [
        (GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=16, vocab_size=50), "GPT2LMHeadModel",
         "8 texts of 16 tokens (it has no more positions)"),
        (BertConfig(**TOKENS, **HEADS, max_position_embeddings=16), "BertForMaskedLM",
         "note: BertLMHeadModel stands for BertForMaskedLM, which the configuration names and task=text does not have"),
        (BertConfig(**TOKENS, **HEADS, num_labels=3, problem_type="multi_label_classification"),
         "BertForSequenceClassification", "8 texts of 128 tokens"),
        (BertConfig(**TOKENS, **HEADS, num_labels=2, problem_type="regression"),
         "BertForSequenceClassification", "8 texts of 128 tokens"),
        (BertConfig(**TOKENS, **HEADS, num_labels=1, problem_type="regression"),
         "BertForSequenceClassification", "8 texts of 128 tokens"),
        (BartConfig(**{**SIZES, **TOKENS}), "BartForSequenceClassification", "BartForSequenceClassification, "),
        (LlamaConfig(**TOKENS, **HEADS, dtype="float16"), "LlamaForCausalLM",
         "note: built in float32, not the configuration's float16"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith(("Model", "LM", "cation")) else "",
)  # fmt: skip
@pytest.mark.parametrize("text", ["preset=fast", "preset=paper"])
def test_doctor_makes_a_batch_that_fits_and_says_what_it_replaced(
    config: Any, architecture: str, told: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copy.deepcopy(config)
    config.architectures = [architecture]
    main(["doctor", saved(tmp_path, config), "--optim_args", text])
    out = capsys.readouterr().out
    assert told in out and ("note: " in out) == told.startswith("note")


def test_a_length_that_no_field_bounds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_batch, "positions_of", lambda config: None)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=16, vocab_size=50)

    def see(subject: Subject) -> Any:
        if next(subject.model.parameters()).is_meta:
            raise RuntimeError("a number is read")
        return subject.loss()

    with pytest.raises(UsageError, match="length.*got 128 for 'gpt2', which has no such position"):
        look(config, "text", 2, 128, see)
    assert look(config, "text", 2, 16, see).isfinite()
