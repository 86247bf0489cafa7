"""Resume of other optimizers and models, the best model. LNGD's own: contract/test_state, distributed/test_trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lngd import LNGDTrainer, LNGDTrainingArguments
from hf_lngd.integrations.trainer import lngd_of
from tests.helpers import assert_identical, keeping
from tests.hf_helpers import hf_images, hf_vit

SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "max_steps": 5,
    "save_steps": 1,
    "logging_steps": 1,
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "warmup_steps": 2,
}


def images(model: Any, folder: Path, **values: Any) -> LNGDTrainer:
    args = LNGDTrainingArguments(str(folder), **{**SETTINGS, **values})
    return LNGDTrainer(model, args, train_dataset=hf_images(20), eval_dataset=hf_images(6, seed=1))


def vit_trainer(folder: Path, **values: Any) -> LNGDTrainer:
    return images(hf_vit(hidden_dropout_prob=0.1), folder, **values)


def test_another_optimizer_resumes_exactly_too(tmp_path: Path) -> None:
    whole = vit_trainer(tmp_path / "whole", optim="adamw_torch")
    whole.train()
    resumed = vit_trainer(tmp_path / "resumed", optim="adamw_torch")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_identical(resumed.model.state_dict(), whole.model.state_dict())


def test_intervals_rates_and_decay_may_change(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"learning_rate": 0.02},
        {"weight_decay": 0.7},
        {"optim_args": "preset=fast,factor_interval=2,inverse_interval=2,rate_scale=0.5,fallback_lr_scale=1.0"},
    ]
    vit_trainer(tmp_path / "whole", learning_rate=0.01).train()
    found = []
    for number, change in enumerate(changes):
        trainer = vit_trainer(tmp_path / str(number), **{"learning_rate": 0.01, **change})
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
        found.append(trainer)
    rates = [[entry["learning_rate"] for entry in t.state.log_history if "loss" in entry][-1] for t in found]
    assert rates[1] == pytest.approx(2 * rates[0]) and rates[2:] == [rates[0]] * 2
    groups = [{group["name"]: group for group in lngd_of(t.optimizer).param_groups} for t in found]
    assert groups[1]["lngd"]["initial_lr"] == 0.02
    assert groups[2]["lngd"]["weight_decay"] == groups[2]["fallback"]["weight_decay"] == 0.7
    assert groups[2]["lngd"]["decay_floor"] == 0 < groups[0]["lngd"]["decay_floor"]
    assert groups[3]["fallback"]["lr_scale"] == 1.0
    weights = [t.model.vit.layernorm.weight for t in found]
    assert all(not torch.equal(weights[0], other) for other in (weights[1], weights[3]))


def test_the_best_model_is_loaded_whole(tmp_path: Path) -> None:
    trainer = vit_trainer(
        tmp_path, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=0.3, max_steps=6
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    stored = type(trainer.model).from_pretrained(best)
    assert_identical(trainer.model.state_dict(), stored.state_dict())
    history = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.evaluate()["eval_loss"] == history[int(best.name.split("-")[1])] == min(history.values())


@pytest.mark.parametrize(
    ("layers", "message"), [(1, "weights of another model: vit"), (3, r"no weights for vit\.\S*layer")]
)
def test_a_checkpoint_of_another_model_is_refused_before_any_weight_is_loaded(
    layers: int, message: str, tmp_path: Path
) -> None:
    """Of AdamW's, which knows no names; LNGD's own: docs/faults.md."""
    vit_trainer(tmp_path, max_steps=2, optim="adamw_torch").train()
    other = images(hf_vit(num_hidden_layers=layers), tmp_path, optim="adamw_torch")
    with keeping(other.model), pytest.raises(RuntimeError, match=message):
        other.train(resume_from_checkpoint=True)
