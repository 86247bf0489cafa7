"""`create_lngd_optimizer` in loops of one's own: plain ones, and accelerate's with accumulation and saved states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import TrainingArguments, get_linear_schedule_with_warmup

from hf_lngd import LNGD, LNGDConfig, create_lngd_optimizer
from hf_lngd.integrations.diagnostics import lngd_of
from tests.hf_helpers import hf_images, hf_vit

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


def test_arguments_of_a_trainer_serve_in_a_loop_too(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=0.02, weight_decay=0.3, optim_args="seed=5")
    optimizer = create_lngd_optimizer(hf_vit(), args, factor_interval=7)
    assert (optimizer.config.weight_decay, optimizer.config.seed, optimizer.config.factor_interval) == (0.3, 5, 7)
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_a_preset_or_family_by_name_is_that_with_the_rates_of_the_arguments(tmp_path: Path) -> None:
    """Precedence as in README: keywords, then the arguments, then the family, then the preset."""
    args = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=0.02, weight_decay=0.1, optim_args="seed=5")
    for fields in ({"preset": "paper"}, {"family": "kfac"}):
        optimizer = create_lngd_optimizer(hf_vit(), args, **fields)
        assert optimizer.config == LNGDConfig(**fields, weight_decay=0.1, seed=5)
        assert optimizer.param_groups[0]["lr"] == 0.02
