"""The model card: metadata that the Hub's library reads back, settings, command, attribution, no secrets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from run_shared import LOSSES, draw_losses

from hf_lngd import LNGDConfig, LNGDTrainingArguments
from hf_lngd.integrations.card import (
    CardFacts,
    optimizer_options,
    without_authors,
    write_model_card,
)
from hf_lngd.integrations.training_args import lngd_settings

BLEU = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
COMMAND = ["python", "train.py", "--source_prefix", "translate: ", "--hub_token", "hf_abc", "--token=hf_abc"]
DATA: dict[str, Any] = {"dataset_name": "WMT16", "dataset_type": "wmt/wmt16", "dataset_config": "de-en"}
SCORES = [
    EvalResult("translation", metric_type="bleu", metric_name="BLEU", metric_value=23.4567, dataset_split="test",
               metric_args={"signature": BLEU}, **DATA),
    EvalResult("translation", metric_type="chrf", metric_name="chrF", metric_value=50.0, dataset_split="validation",
               **DATA),
]  # fmt: skip
FACTS: dict[str, Any] = {
    **DATA,
    "name": "tiny",
    "task": "translation",
    "examples": 1234,
    "scores": SCORES,
    "command": COMMAND,
    "languages": ["en", "de"],
    "base_model": "someone/model",
    "license": "cc-by-2.0",
    "attribution": "Sentences: tatoeba.org.",
    "architecture": "MarianMTModel",
    "parameters": 1000,
    "routing": "owner  reason",
}
LOG: list[dict[str, Any]] = [
    *({"step": step, "loss": 10 / step} for step in range(1, 40)),
    {"step": 39, "eval_loss": 0.5},
    {"step": 39, "train_loss": 1.0},
]


def card_of(folder: Path, args: dict[str, Any] | None = None, **changes: Any) -> ModelCard:
    training = LNGDTrainingArguments(str(folder), use_cpu=True, **(args or {}))
    return ModelCard.load(write_model_card(folder, CardFacts(**{**FACTS, **changes}), training))


def test_the_model_index_reads_back(tmp_path: Path) -> None:
    card = card_of(tmp_path)
    bleu, chrf = card.data.eval_results
    assert (bleu.metric_type, bleu.metric_value, bleu.metric_args) == ("bleu", 23.4567, {"signature": BLEU})
    assert (bleu.dataset_type, bleu.dataset_config, bleu.dataset_split) == ("wmt/wmt16", "de-en", "test")
    assert (chrf.metric_name, chrf.dataset_split, chrf.metric_args) == ("chrF", "validation", None)
    assert card.data.model_name == "tiny" and card.data.base_model == "someone/model"
    assert card.data.language == ["en", "de"] and card.data.license == "cc-by-2.0"
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    index = yaml.safe_load(text.split("---\n")[1])["model-index"]
    assert index[0]["name"] == "tiny" and {"task", "dataset", "metrics"} == set(index[0]["results"][0])


def test_no_scores_no_index(tmp_path: Path) -> None:
    card = card_of(tmp_path, scores=())
    assert card.data.eval_results is None and "## Results" not in card.text
    assert "model-index" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_base_model_in_a_folder_is_no_name_on_the_hub(tmp_path: Path) -> None:
    card = card_of(tmp_path, base_model=str(tmp_path))
    assert card.data.base_model is None and "fine-tuned from" in card.text
    assert "trained from scratch" in card_of(tmp_path, base_model=None).text


def settings_in(card: ModelCard) -> dict[str, Any]:
    return json.loads(card.text.split("```json\n")[1].split("```")[0])


def test_the_optimizers_settings_remake_the_config(tmp_path: Path) -> None:
    given = {"optim_args": "preset=paper,damping_bounds=1e-4:0.1", "learning_rate": 0.03, "weight_decay": 0.2}
    settings = settings_in(card_of(tmp_path, given))
    assert (settings.pop("optim"), settings.pop("lr")) == ("lngd", 0.03)
    assert LNGDConfig(**settings) == LNGDConfig(preset="paper", damping_bounds=(1e-4, 0.1), weight_decay=0.2)


@pytest.mark.parametrize(
    "given",
    [
        ["--push_to_hub"],
        ["--push_to_hub", "true", "--hub_model_id", "a/b", "--hub_private_repo=true"],
        ["--hub_tok", "hf_abc"],
        ["--hub-token", "hf_abc"],
        ["--tok=hf_abc", "--hub_strategy", "end"],
        ["--resume_from_checkpoint", "last"],
        ["--overwrite_output_dir", "true"],
    ],
)
def test_what_is_the_authors_alone_is_left_out(given: list[str]) -> None:
    kept = ["--tokenizer_name", "here", "--do_train", "--betas", "1", "2"]
    assert without_authors([*kept[:2], *given, *kept[2:]]) == kept


@pytest.mark.parametrize("optim_args", ["lr=0.25,exclude=a{1\\,2}=,betas=0.8:0.9", "preset=paper,family=kfac", None])
def test_the_optimizers_options_give_its_settings_back(optim_args: str | None, tmp_path: Path) -> None:
    first = LNGDTrainingArguments(str(tmp_path), optim_args=optim_args, weight_decay=0.3, adam_epsilon=1e-7)
    names = ("optim", "learning_rate", "optim_args")
    parts = optimizer_options(first)
    assert parts[::2] == [f"--{name}" for name in names]
    second = LNGDTrainingArguments(str(tmp_path), optim=parts[1], learning_rate=float(parts[3]), optim_args=parts[5])
    assert lngd_settings(second) == lngd_settings(first)


def test_an_evaluation_claims_no_training(tmp_path: Path) -> None:
    card = card_of(tmp_path, trained=False, curves=LOSSES)
    assert "`someone/model`, evaluated." in card.text and "gives these results again" in card.text
    assert "## Training" not in card.text and "optimizer" not in card.text and "loss_curves" not in card.text


def test_curves_and_no_curves(tmp_path: Path) -> None:
    assert draw_losses(tmp_path, LOG, "tiny") and "(loss_curves.png)" in card_of(tmp_path, curves=LOSSES).text
    assert (tmp_path / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "loss_curves" not in card_of(tmp_path).text
    assert not draw_losses(tmp_path, [{"step": 1, "loss": 1.0}], "tiny")
    assert not (tmp_path / "loss_curves.png").exists()


def test_it_tells_data_and_attribution(tmp_path: Path) -> None:
    text = card_of(tmp_path).text
    data = text.split("## Training data")[1].split("## Training")[0]
    assert "WMT16, de-en: 1,234 examples." in data and "Sentences: tatoeba.org." in data
    text = card_of(tmp_path, file="train.json", seen=1200, dataset_config=None).text
    assert "WMT16 (`train.json`): 1,234 examples, of which 1,200 were seen." in text


@pytest.mark.parametrize("missing", ["attribution", "license", "routing"])
def test_what_is_not_known_is_left_out(missing: str, tmp_path: Path) -> None:
    card_of(tmp_path, **{missing: None})
    assert "None" not in (tmp_path / "README.md").read_text(encoding="utf-8")
