"""trl's own trainers, under `register()` and with the mixin before them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import LoraConfig

import hf_lngd
from hf_lngd import LNGDArgumentsMixin, LNGDTrainerMixin
from hf_lngd.integrations.trainer import lngd_of
from tests.compat.tiny import SETTINGS, llama, moved, sentence, table, tokenizer, weights

WAYS = ["register", "mixin"]
KINDS = ("SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO")
# As a user makes them, `class LNGDSFTTrainer(LNGDTrainerMixin, trl.SFTTrainer)` and so on; pickles look for them here.
for _kind in KINDS:
    _bases = (LNGDArgumentsMixin, getattr(trl, f"{_kind}Config"))
    globals()[f"LNGD{_kind}Config"] = dataclass(type(f"LNGD{_kind}Config", _bases, {}))
    globals()[f"LNGD{_kind}Trainer"] = type(
        f"LNGD{_kind}Trainer", (LNGDTrainerMixin, getattr(trl, f"{_kind}Trainer")), {}
    )
TEXTS = table(text=lambda i: sentence(i))
PREFERENCES = table(
    prompt=lambda i: sentence(i, 3), chosen=lambda i: f" {sentence(i, 4)}", rejected=lambda i: f" {sentence(i + 1, 4)}"
)
LABELLED = table(prompt=lambda i: sentence(i, 3), completion=lambda i: f" {sentence(i, 4)}", label=lambda i: i % 2 == 0)
PROMPTS = table(prompt=lambda i: sentence(i, 3))


def length_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Which completions differ in."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


GENERATED: dict[str, Any] = {"num_generations": 2, "max_completion_length": 4}
CASES: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any]]] = {
    "SFT": ("SFT", TEXTS, {"max_length": 16}, {}),
    "SFT, packing": ("SFT", TEXTS, {"max_length": 16, "packing": True, "packing_strategy": "wrapped"}, {}),
    "DPO": ("DPO", PREFERENCES, {}, {}),
    "KTO": ("KTO", LABELLED, {}, {}),
    "Reward": ("Reward", PREFERENCES, {}, {}),
    "GRPO": ("GRPO", PROMPTS, GENERATED, {"reward_funcs": length_reward}),
    "RLOO": ("RLOO", PROMPTS, GENERATED, {"reward_funcs": length_reward}),
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    hf_lngd.register()
    yield
    hf_lngd.unregister()


def make(way: str, name: str, folder: Path, **values: Any) -> Any:
    kind, data, settings, parts = CASES[name]
    trainer, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    if way == "mixin":
        trainer, config = globals()[f"LNGD{kind}Trainer"], globals()[f"LNGD{kind}Config"]
    lora = {"peft_config": values.pop("peft_config")} if "peft_config" in values else {}
    args = config(output_dir=str(folder), **{**SETTINGS, "bf16": False, **settings, **values})
    model = llama(folder / "model", 1 if kind == "Reward" else None)
    return trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **parts, **lora)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_trainers(name: str, way: str, tmp_path: Path) -> None:
    trainer = make(way, name, tmp_path)
    assert trainer.args.max_steps == 4 and str(getattr(trainer.args.optim, "value", trainer.args.optim)) == "lngd"
    before = weights(trainer.model)
    trainer.train()
    assert lngd_of(trainer.optimizer) is not None
    assert any("q_proj" in key for key in moved(before, trainer.model))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_lora(name: str, way: str, tmp_path: Path) -> None:
    trainer = make(way, name, tmp_path, peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"))
    before = weights(trainer.model)
    trainer.train()
    changed = moved(before, trainer.model)
    assert changed and all("lora" in key for key in changed)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_resume(name: str, way: str, tmp_path: Path) -> None:
    whole = make(way, name, tmp_path)
    whole.train()
    resumed = make(way, name, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


@pytest.mark.parametrize("way", WAYS)
def test_sft_under_accumulation(way: str, tmp_path: Path) -> None:
    """trl's loss is divided by the tokens of the whole step: the first losses are the same."""
    first = []
    for size, accumulated in ((8, 1), (2, 4)):
        trainer = make(
            way, "SFT", tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_steps=1
        )
        trainer.train()
        first.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
    assert first[0] == pytest.approx(first[1], rel=1e-3)
