"""`python -m hf_lngd doctor`: batches that fit, what was replaced is said, owners and bytes are those of real steps."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import (
    ASTConfig,
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MarianConfig,
    MixtralConfig,
    ResNetConfig,
    Speech2TextConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.integrations import doctor
from hf_lngd.integrations.command import main
from hf_lngd.integrations.doctor import build, price_line, step_of
from hf_lngd.integrations.forecast import counting, step_to_adamw
from hf_lngd.integrations.startup import report
from hf_lngd.integrations.usage import UsageError, read_config
from tests.hf_helpers import SIZES, hf_images, hf_vit

TOKENS = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}

WAVES: dict[str, Any] = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
WAVES |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}


def saved(folder: Path, config: Any) -> str:
    config.save_pretrained(folder)
    return str(folder)


def marian() -> MarianConfig:
    return MarianConfig(
        **{**SIZES, **TOKENS, "decoder_start_token_id": 0, "decoder_vocab_size": 40, "forced_eos_token_id": None}
    )


def test_it_tells_what_training_will_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Owners and bytes are those of an optimizer that has made steps on real tensors."""
    model = hf_vit()
    main(["doctor", saved(tmp_path, model.config), "--optim_args", "factor_interval=4,lr=0.1"])
    text = capsys.readouterr().out
    optimizer = LNGD(model, factor_interval=4)
    images = hf_images(8)
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in images]) for name in images[0]}
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
    assert report(optimizer) in text and "ViTForImageClassification" in text
    total, adamw = optimizer.memory_usage()["total"], sum(8 * p.numel() + 4 for p in model.parameters())
    assert re.search(f"State of a process: {total / 2**20:.1f} MiB .*, {total / adamw:.2f} of AdamW's", text)
    assert re.search(r"Factors: .*\d+ of width 16", text)


@pytest.mark.parametrize(
    "fields",
    [{}, {"direction": "natural"}, {"preset": "paper"}, {"preset": "lngd_lr"}, {"family": "ekfac"}, {"family": "ng+"},
     {"embedding": "fallback"}],
    ids=str,
)  # fmt: skip
def test_estimates_are_those_of_real_steps(fields: dict[str, Any]) -> None:
    settings = LNGDConfig(**fields)
    _, found, _ = step_of(marian(), "translation", settings)
    model, inputs = build(marian(), "translation", "cpu")
    optimizer = LNGD(model, settings)
    logits = model(**inputs).logits
    if optimizer.needs_fisher_pass:
        optimizer.fisher_backward(logits)
    logits.square().sum().backward()
    optimizer.step()
    assert found.memory_usage() == optimizer.memory_usage()
    assert [r.owner for r in found.routing()] == [r.owner for r in optimizer.routing()]
    assert report(found) == report(optimizer)


@pytest.mark.parametrize("embedding", ["exact", "fallback"])
def test_estimates_of_bfloat16_weights(embedding: str) -> None:
    """AdamW's moments are float32 here, and what rounding takes off is kept of every parameter."""
    config = LlamaConfig(**TOKENS, **HEADS, dtype="bfloat16")
    settings = LNGDConfig(embedding=embedding, update_interval=1)
    _, found, _ = step_of(config, "text", settings)
    model, inputs = build(config, "text", "cpu")
    optimizer = LNGD(model, settings)
    model(**inputs).logits.sum().backward()
    optimizer.step()
    assert found.memory_usage() == optimizer.memory_usage()


@pytest.mark.parametrize("text", ["preset=paper", "preset=lngd_lr"])
def test_it_takes_every_preset_of_a_large_model(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Draws, too, are made on the meta device: there is no model that is too large."""
    main(["doctor", saved(tmp_path, LlamaConfig(**TOKENS, **HEADS)), "--optim_args", text])
    assert "State of a process: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "architecture", "made"),
    [
        (GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=4, vocab_size=50), "GPT2LMHeadModel", "GPT2LMHeadModel"),
        (BertConfig(**TOKENS, **HEADS, max_position_embeddings=16), "BertForMaskedLM", "BertForMaskedLM"),
        (BertConfig(**TOKENS, **HEADS, max_position_embeddings=16), None, "BertForMaskedLM"),
        (BertConfig(**TOKENS, **HEADS), "BertLMHeadModel", "BertLMHeadModel"),
        (WhisperConfig(**{**SIZES, **TOKENS}), None, "WhisperForConditionalGeneration"),
        (Speech2TextConfig(**{**SIZES, **TOKENS}), None, "Speech2TextForConditionalGeneration"),
        (Wav2Vec2Config(**TOKENS, **HEADS, **WAVES), None, "Wav2Vec2ForCTC"),
        (Wav2Vec2Config(**TOKENS, **HEADS, **WAVES), "Wav2Vec2ForSequenceClassification",
         "Wav2Vec2ForSequenceClassification"),
        (ASTConfig(**HEADS, max_length=64), None, "ASTForAudioClassification"),
        (BertConfig(**TOKENS, **HEADS, num_labels=3, problem_type="multi_label_classification"),
         "BertForSequenceClassification", "BertForSequenceClassification"),
        (BertConfig(**TOKENS, **HEADS, num_labels=2, problem_type="regression"),
         "BertForSequenceClassification", "BertForSequenceClassification"),
        (BertConfig(**TOKENS, **HEADS, num_labels=1, problem_type="regression"),
         "BertForSequenceClassification", "BertForSequenceClassification"),
        (LlamaConfig(**TOKENS, **HEADS, dtype="float16"), "LlamaForCausalLM", "LlamaForCausalLM"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_batch_fits(
    config: Any, architecture: str | None, made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if config.model_type == "wav2vec2" and Version(torch.__version__) < Version("2.13"):
        pytest.skip("torch 2.9 has no gradient of weight_norm on the meta device: refused by name")
    config = copy.deepcopy(config)
    config.architectures = [architecture] if architecture else None
    main(["doctor", saved(tmp_path, config)])
    said = capsys.readouterr().out
    assert f"{made}, " in said
    assert re.search(r"in a batch: 1.5 with [\d,]+, 1.2 with [\d,]+, 1.1 with [\d,]+", said)


def test_what_the_meta_device_cannot_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = BartConfig(**{**SIZES, **TOKENS})  # counts the ends of sentences to classify
    model, optimizer, _ = step_of(config, "classification", LNGDConfig())
    assert {p.device.type for p in model.parameters()} == {"cpu"} and optimizer.core.steps == 1
    monkeypatch.setattr(doctor, "_MOST_ON_CPU", 1000)
    with pytest.raises(UsageError, match="model: got 'bart', whose forward does not run on the meta device, and which"):
        step_of(config, "classification", LNGDConfig())


def test_experts_run_on_the_meta_device() -> None:
    config = MixtralConfig(**HEADS, vocab_size=40, num_key_value_heads=1, num_local_experts=2)
    model, optimizer, _ = step_of(config, "text", LNGDConfig())
    assert {p.device.type for p in model.parameters()} == {"meta"} and optimizer.core.steps == 1


def test_a_type_of_model_is_its_default_configuration() -> None:
    assert read_config("model", "marian").to_dict() == MarianConfig().to_dict()


def test_what_it_does_not_accept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vit = saved(tmp_path / "vit", hf_vit().config)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "odd.json").write_text(json.dumps({"model_type": "vits"}))
    cases = {
        (): "error: model: got none, accepted: a folder, a config.json, a type of model",
        ("--task", "image"): "error: model: got '--task', accepted: a folder",
        (str(tmp_path / "nothing"),): f"error: model: got '{tmp_path / 'nothing'}', which is not there, accepted: a ",
        ("./nothing",): "error: model: got './nothing', which is not there, accepted: a folder with a config.json",
        (str(tmp_path),): f"error: model: got '{tmp_path}', which has no configuration that can be read",
        (str(tmp_path / "broken.json"),): f"error: model: got '{tmp_path / 'broken.json'}', which has no configuration",
        (str(tmp_path / "odd.json"),): "error: model: got 'vits' for auto; this one can do: none of them",
        (vit, "--task", "translation"): "error: task: got 'vit' for translation; this one can do: image",
        (vit, "--task", "sound"): "error: task: got 'sound', accepted: auto, translation, image",
        (vit, "--optim_args", "rate=fast"): "error: optim_args: rate: got 'fast'",
        (vit, "--optim_arguments", "x"): "error: optim_arguments: unknown argument; did you mean --optim_args?",
    }
    for argv, words in cases.items():
        with pytest.raises(SystemExit) as exit_:
            main(["doctor", *argv])
        assert exit_.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(words), argv


def test_convolutions_and_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"layer_type": "basic", "depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8}
    main(["doctor", saved(tmp_path / "resnet", ResNetConfig(**sizes))])
    text = capsys.readouterr().out
    assert "ResNetForImageClassification" in text and "convolution" in text
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}))
    main(["doctor", str(folder / "config.json")])
    assert "GPT2LMHeadModel" in capsys.readouterr().out
    main(["doctor", str(folder), "--task", "classification"])
    assert "GPT2ForSequenceClassification" in capsys.readouterr().out


def test_a_batch_of_the_size_that_it_tells_costs_so_much() -> None:
    model, optimizer, inputs = step_of(marian(), "translation", LNGDConfig())
    line = price_line(model, optimizer, inputs)
    tokens = int(re.search(r"so many tokens in a batch: 1.5 with ([\d,]+)", line)[1].replace(",", ""))
    ids = torch.ones(tokens // 8, 8, dtype=torch.int64, device="meta")
    with counting(model, optimizer) as work:
        model(input_ids=ids, decoder_input_ids=ids)
    assert step_to_adamw(optimizer, work) == pytest.approx(1.5, rel=0.02)
