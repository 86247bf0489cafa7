"""The trainers and loops of one's own: one gradient however a batch is split, every optimizer, logs, routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)
from transformers.trainer_pt_utils import LabelSmoother

from hf_lngd import (
    LNGD,
    LNGDConfig,
    LNGDSeq2SeqTrainer,
    LNGDSeq2SeqTrainingArguments,
    LNGDTrainer,
    LNGDTrainerMixin,
    LNGDTrainingArguments,
    create_lngd_optimizer,
)
from hf_lngd.integrations.trainer import lngd_of
from tests.hf_helpers import HF_FAMILIES, hf_encoded, hf_images, hf_pairs, hf_seq2seq_model, hf_tokenizer, hf_vit

LAYOUTS = [(8, 1), (4, 2), (2, 4)]

SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 2,
    "disable_tqdm": True,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "learning_rate": 0.1,
}


def seq2seq_trainer(folder: Path, family: str = "marian", double: bool = False, **values: Any) -> LNGDSeq2SeqTrainer:
    tokenizer = hf_tokenizer()
    model = hf_seq2seq_model(family, tokenizer)
    args = LNGDSeq2SeqTrainingArguments(str(folder), **{**SETTINGS, **values})
    return LNGDSeq2SeqTrainer(
        model.double() if double else model,
        args,
        train_dataset=hf_encoded(tokenizer, hf_pairs(16)),
        eval_dataset=hf_encoded(tokenizer, hf_pairs(8, seed=1)),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=8),
        processing_class=tokenizer,
    )


def convnext() -> ConvNextForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "num_channels": 3, "patch_size": 2}
    return ConvNextForImageClassification(ConvNextConfig(**sizes, num_labels=3, drop_path_rate=0.0))


def image_trainer(folder: Path, model: Any, **values: Any) -> LNGDTrainer:
    args = LNGDTrainingArguments(str(folder), **{**SETTINGS, **values})
    images = hf_images(16, dtype=model.dtype)
    return LNGDTrainer(model, args, train_dataset=images, eval_dataset=hf_images(8, seed=1))


def weights_after(trainer: Any) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def layout(batch: int, accumulated: int) -> dict[str, int]:
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}


def assert_same(found: list[dict[str, torch.Tensor]], **tolerance: float) -> None:
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize(("family", "smoothing"), [("t5", 0.0), ("m2m100", 0.0), ("marian", 0.1)])
def test_one_step_whatever_the_layout_of_the_batch(family: str, smoothing: float, tmp_path: Path) -> None:
    found = [
        weights_after(
            seq2seq_trainer(tmp_path, family, True, optim="sgd", label_smoothing_factor=smoothing, **layout(*sizes))
        )
        for sizes in LAYOUTS
    ]
    assert_same(found, rtol=1e-6, atol=1e-9)


def test_images_step_alike_whatever_the_layout(tmp_path: Path) -> None:
    found = [weights_after(image_trainer(tmp_path, convnext().double(), optim="sgd", **layout(*s))) for s in LAYOUTS]
    assert_same(found, rtol=1e-6, atol=1e-9)


def test_the_loss_is_the_models_own_on_one_batch(tmp_path: Path) -> None:
    for family in HF_FAMILIES:
        trainer = seq2seq_trainer(tmp_path, family)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        count = (batch["labels"] != -100).sum()
        trainer.model.eval()
        with torch.no_grad():
            expected = trainer.model(**batch).loss
            found = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        torch.testing.assert_close(found, expected)


def test_label_smoothing_is_transformers_own(tmp_path: Path) -> None:
    trainer = seq2seq_trainer(tmp_path, label_smoothing_factor=0.3)
    batch = dict(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    count = (batch["labels"] != -100).sum()
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
        expected = LabelSmoother(epsilon=0.3)(trainer.model(**batch), batch["labels"])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
def test_other_optimizers_train(optim: str, tmp_path: Path) -> None:
    trainer = image_trainer(tmp_path, hf_vit(), optim=optim, learning_rate=1e-3)
    before = trainer.model.classifier.weight.detach().clone()
    trainer.train()
    assert lngd_of(trainer.optimizer) is None
    assert not torch.equal(before, trainer.model.classifier.weight)
    assert not any(key.startswith("lngd_") for entry in trainer.state.log_history for key in entry)


def test_stock_arguments_keep_their_optimizer_and_none_means_lngd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stock = LNGDTrainer(hf_vit(), TrainingArguments(str(tmp_path), use_cpu=True))
    assert isinstance(stock.create_optimizer(), torch.optim.AdamW)
    assert isinstance(LNGDTrainer(hf_vit()).create_optimizer(), LNGD)
    own = LNGD(model := hf_vit(), lr=0.3)
    args = LNGDTrainingArguments(str(tmp_path), use_cpu=True)
    assert LNGDTrainer(model, args, optimizers=(own, None)).create_optimizer() is own


SHORT = {"failed_inverses", "skipped_factors", "skipped_gradients"}
FULL = SHORT | {"direction_scale_mean", "damping_mean", "condition_max", "factor_seconds"}


@pytest.mark.parametrize(("asked", "keys"), [(None, SHORT), ("none", set()), ("full", FULL)])
def test_diagnostics_reach_training_logs_alone_and_tensorboard(
    asked: str | None, keys: set[str], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = {} if asked is None else {"lngd_log": asked}
    trainer = seq2seq_trainer(
        tmp_path, eval_strategy="steps", eval_steps=1, report_to="tensorboard", per_device_train_batch_size=4, **chosen
    )
    trainer.train()
    for entry in trainer.state.log_history:
        own = {key.removeprefix("lngd_") for key in entry if key.startswith("lngd_")}
        assert own == (keys if "loss" in entry else set())
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 2
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    tags = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {tag for tag in tags if "lngd" in tag} == {f"lngd/{key}" for key in keys}
    assert {"train/loss", "eval/loss"} <= set(tags)


@pytest.mark.parametrize(("fisher", "asked"), [("expected", []), ("true", [0, 2])])
def test_outputs_are_asked_for_where_a_second_pass_needs_them(fisher: str, asked: list[int], tmp_path: Path) -> None:
    """trl's trainers compute more for whoever asks."""
    found: list[int] = []

    class Watched(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            if return_outputs:
                found.append(self.state.global_step)
            return super().compute_loss(model, inputs, return_outputs, **kwargs)

    class Own(LNGDTrainerMixin, Watched):
        pass

    optim_args = f"fisher={fisher},factor_interval=2" + (",direction=natural" if fisher == "true" else "")
    args = LNGDTrainingArguments(str(tmp_path), **{**SETTINGS, "max_steps": 4, "optim_args": optim_args})
    Own(hf_vit(), args, train_dataset=hf_images(8)).train()
    assert found == asked


def test_fisher_true_gets_its_second_pass(tmp_path: Path) -> None:
    trainer = seq2seq_trainer(tmp_path, optim_args="preset=lngd_lr,factor_interval=1", **layout(4, 2))
    trainer.train()
    factors = lngd_of(trainer.optimizer).factors("model.encoder.layers.0.fc1")
    assert factors["phi"].abs().sum() > 0


# Loops of one's own: plain ones, and accelerate's with accumulation and saved states

ROWS, BATCH, ACCUMULATED = 48, 4, 2
FIELDS: dict[str, Any] = {"factor_interval": 3, "fallback_lr_scale": 2.0}


def plain_weights() -> dict[str, torch.Tensor]:
    """Whole batches in a loop without accelerate."""
    model = hf_vit(num_labels=3).double()
    optimizer = create_lngd_optimizer(model, lr=1e-2, **FIELDS)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 6)
    for batch in DataLoader(hf_images(ROWS, dtype=torch.float64), batch_size=BATCH * ACCUMULATED):
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.state_dict()


def accelerate_loop(folder: Path, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
    """The documented loop, from step 0 or from the state in `folder`, for so many steps; its state is saved at 3."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    model = hf_vit(num_labels=3).double()
    optimizer = create_lngd_optimizer(model, lr=1e-2, **FIELDS)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 6)
    loader = DataLoader(hf_images(ROWS, dtype=torch.float64), batch_size=BATCH)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    done = 0
    if resume:
        accelerator.load_state(str(folder))
        loader, done = accelerator.skip_first_batches(loader, 3 * ACCUMULATED), 3
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            done += 1
            if done == 3 and not resume:
                accelerator.save_state(str(folder))
            if done == steps:
                break
    assert isinstance(lngd_of(optimizer), LNGD)
    return accelerator.unwrap_model(model).state_dict()


def test_accelerate_loops_step_and_resume_as_plain_ones(tmp_path: Path) -> None:
    plain = plain_weights()
    whole = accelerate_loop(tmp_path, ROWS // BATCH // ACCUMULATED)
    resumed = accelerate_loop(tmp_path, ROWS // BATCH // ACCUMULATED, resume=True)
    for name, value in plain.items():
        torch.testing.assert_close(whole[name], value, rtol=1e-7, atol=1e-9)
        assert torch.equal(resumed[name], whole[name]), name


def test_a_preset_or_family_by_name_is_that_with_the_rates_of_the_arguments(tmp_path: Path) -> None:
    """Precedence as in docs/options.md: keywords, then the arguments, then the family, then the preset."""
    args = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=0.02, weight_decay=0.1, optim_args="seed=5")
    for fields in ({"preset": "paper"}, {"family": "kfac"}):
        optimizer = create_lngd_optimizer(hf_vit(), args, **fields)
        assert optimizer.config == LNGDConfig(**fields, weight_decay=0.1, seed=5)
        assert optimizer.param_groups[0]["lr"] == 0.02
