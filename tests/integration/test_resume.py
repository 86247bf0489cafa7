"""A run that is stopped and resumed ends bit for bit where an unbroken one does, on one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, SwinConfig, SwinForImageClassification

from hf_lngd import LNGDSeq2SeqTrainer, LNGDSeq2SeqTrainingArguments, LNGDTrainer, LNGDTrainingArguments
from tests.hf_helpers import hf_encoded, hf_images, hf_pairs, hf_seq2seq_model, hf_tokenizer, hf_vit

STEPS = 5
# Factor steps are 0 and 3: the checkpoints lie between them, before one and on it. An epoch ends with the third step.
STOPS = (1, 2, 3)

SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "max_steps": STEPS,
    "save_steps": 1,
    "logging_steps": 1,
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "warmup_steps": 2,
}


def swin() -> SwinForImageClassification:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    return SwinForImageClassification(SwinConfig(**sizes, num_labels=3, hidden_dropout_prob=0.1))


def translation(folder: Path, **values: Any) -> LNGDSeq2SeqTrainer:
    tokenizer = hf_tokenizer()
    model = hf_seq2seq_model("marian", tokenizer, dropout=0.1)
    return LNGDSeq2SeqTrainer(
        model,
        LNGDSeq2SeqTrainingArguments(str(folder), **{**SETTINGS, **values}),
        train_dataset=hf_encoded(tokenizer, hf_pairs(20)),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )


def images(model: Any, folder: Path, **values: Any) -> LNGDTrainer:
    args = LNGDTrainingArguments(str(folder), **{**SETTINGS, **values})
    return LNGDTrainer(model, args, train_dataset=hf_images(20), eval_dataset=hf_images(6, seed=1))


def vit_trainer(folder: Path, **values: Any) -> LNGDTrainer:
    return images(hf_vit(hidden_dropout_prob=0.1), folder, **values)


def swin_trainer(folder: Path, **values: Any) -> LNGDTrainer:
    return images(swin(), folder, **values)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists by path."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{name}.{i}").items()}
    return {name: value}


def assert_identical(found: dict[str, Any], expected: dict[str, Any]) -> None:
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


CASES = [
    (translation, "factor_interval=3,inverse_interval=3"),
    (translation, "preset=paper,factor_interval=3,inverse_interval=3"),
    (vit_trainer, "factor_interval=3,inverse_interval=3"),
    (swin_trainer, "factor_interval=3,inverse_interval=3"),
    (translation, "family=ekfac,factor_interval=3,inverse_interval=3"),
    (vit_trainer, "family=kfac,fisher=true,factor_interval=3,inverse_interval=3"),
]


@pytest.mark.parametrize(
    ("make", "settings"),
    CASES,
    ids=["marian-fast", "marian-paper", "vit-fast", "swin-fast", "marian-ekfac", "vit-kfac"],
)
def test_resume_is_exact(make: Any, settings: str, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", optim_args=settings)
    whole.train()
    for stop in STOPS:
        folder = tmp_path / f"resumed-{stop}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", folder / f"checkpoint-{stop}")
        resumed = make(folder, optim_args=settings)
        with torch.no_grad():
            for parameter in resumed.model.parameters():
                parameter.add_(1.0)  # what is not loaded would be seen
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == STEPS
        assert_identical(resumed.model.state_dict(), whole.model.state_dict())
        assert_identical(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
        losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
        again = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
        assert again[-1] == losses[-1]


def test_another_optimizer_resumes_exactly_too(tmp_path: Path) -> None:
    whole = vit_trainer(tmp_path / "whole", optim="adamw_torch")
    whole.train()
    resumed = vit_trainer(tmp_path / "resumed", optim="adamw_torch")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_identical(resumed.model.state_dict(), whole.model.state_dict())


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


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    vit_trainer(tmp_path, max_steps=2).train()
    other = vit_trainer(tmp_path, optim_args="damping_rho=0.5")
    with pytest.raises(ValueError, match=r"damping_rho: checkpoint 1.0, here 0.5"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("optimizer", ["lngd", "adamw_torch"])
def test_a_checkpoint_of_another_model_is_refused_before_any_weight_is_loaded(
    optimizer: str, layers: int, tmp_path: Path
) -> None:
    vit_trainer(tmp_path, max_steps=2, optim=optimizer).train()
    other = images(hf_vit(num_hidden_layers=layers), tmp_path, optim=optimizer)
    before = {name: p.detach().clone() for name, p in other.model.named_parameters()}
    kind, message = {
        "lngd": (ValueError, r"optimizer.pt: state_dict: the model differs: vit\.\S+: checkpoint .*, here "),
        "adamw_torch": (
            RuntimeError,
            "weights of another model: vit" if layers == 1 else r"no weights for vit\.\S*layer",
        ),
    }[optimizer]
    with pytest.raises(kind, match=message):
        other.train(resume_from_checkpoint=True)
    assert all(torch.equal(p, before[name]) for name, p in other.model.named_parameters())
