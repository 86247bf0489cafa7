"""The model card: metadata that the Hub's library reads back, settings, command, attribution, no secrets."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_lngd import LNGDConfig, LNGDTrainingArguments
from hf_lngd.integrations.model_card import CardFacts, Score, without_secrets, write_model_card

BLEU = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
COMMAND = ["python", "train.py", "--source_prefix", "translate: ", "--hub_token", "hf_abc", "--token=hf_abc"]
FACTS: dict[str, Any] = {
    "name": "tiny",
    "task": "translation",
    "dataset_name": "WMT16",
    "dataset_type": "wmt/wmt16",
    "dataset_config": "de-en",
    "examples": 1234,
    "scores": [
        Score(metric="bleu", name="BLEU", value=23.4567, split="test", signature=BLEU),
        Score(metric="chrf", name="chrF", value=50.0, split="validation"),
    ],
    "command": COMMAND,
    "languages": ["en", "de"],
    "base_model": "someone/model",
    "license": "cc-by-2.0",
    "attribution": "Sentences: tatoeba.org.",
    "architecture": "MarianMTModel",
    "parameters": 1000,
    "routing": "owner  reason",
    "log_history": [
        *({"step": step, "loss": 10 / step} for step in range(1, 40)),
        {"step": 39, "eval_loss": 0.5},
        {"step": 39, "train_loss": 1.0},
    ],
}


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
    given = {"optim_args": "preset=paper,damping_max=0.1", "learning_rate": 0.03, "weight_decay": 0.2}
    settings = settings_in(card_of(tmp_path, given))
    assert (settings.pop("optim"), settings.pop("lr")) == ("lngd", 0.03)
    assert LNGDConfig(**settings) == LNGDConfig(preset="paper", damping_max=0.1, weight_decay=0.2)
    other = settings_in(card_of(tmp_path, {"optim": "adamw_torch", "learning_rate": 0.01, "adam_beta2": 0.98}))
    assert (other["optim"], other["lr"], other["adam_beta2"]) == ("adamw_torch", 0.01, 0.98)


def test_the_command_can_be_typed_and_tells_no_secret(tmp_path: Path) -> None:
    card = card_of(tmp_path)
    typed = shlex.split(card.text.split("```bash\n")[1].split("```")[0].replace("\\\n", " "))
    assert typed == without_secrets(COMMAND)
    assert typed == ["python", "train.py", "--source_prefix", "translate: ", "--hub_token", "***", "--token=***"]
    assert "hf_abc" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_it_tells_data_and_attribution(tmp_path: Path) -> None:
    text = card_of(tmp_path).text
    data = text.split("## Training data")[1].split("## Training")[0]
    assert "WMT16, de-en: 1,234 examples." in data and "Sentences: tatoeba.org." in data


def test_losses_are_thinned_and_end_with_the_last(tmp_path: Path) -> None:
    table = card_of(tmp_path).text.split("| step | training loss | validation loss |")[1].split("\n\n")[0]
    rows = table.strip().splitlines()[1:]
    assert len(rows) <= 12 and rows[0].startswith("| 1 | 10.0000 |") and rows[-1] == "| 39 | 0.2564 | 0.5000 |"


@pytest.mark.parametrize("missing", ["attribution", "license", "routing"])
def test_what_is_not_known_is_left_out(missing: str, tmp_path: Path) -> None:
    card_of(tmp_path, **{missing: None})
    assert "None" not in (tmp_path / "README.md").read_text(encoding="utf-8")
