"""What a run says at its start: weight decay over the run, the price of a step, memory, an untouched rate."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

import hf_lngd
from hf_lngd import LNGD, LNGDTrainer, LNGDTrainingArguments
from hf_lngd.integrations.forecast import counting, step_to_adamw
from hf_lngd.integrations.startup import decay_line
from hf_lngd.integrations.stock import Trainer
from hf_lngd.work import flops_of_update
from tests.hf_helpers import hf_images, hf_vit

SETTINGS: dict[str, Any] = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}


def trained(folder: Path, stock: bool = False, images: int = 16, **values: Any) -> Any:
    values = {"max_steps": 40, "per_device_train_batch_size": 2, **SETTINGS, **values}
    if stock:
        trainer: Any = Trainer(hf_vit(), TrainingArguments(str(folder), **values), train_dataset=hf_images(images))
    else:
        trainer = LNGDTrainer(hf_vit(), LNGDTrainingArguments(str(folder), **values), train_dataset=hf_images(images))
    trainer.train()
    return trainer


def test_weight_decay_is_added_up_over_the_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Linear from 0.02 to 0 in 40 steps: Σ lr_t is 0.02 · (40 + 1) / 2."""
    trainer = trained(tmp_path, learning_rate=0.02, max_steps=40)
    said = capsys.readouterr().out
    total = 0.02 * 41 / 2
    layers, others = (100 * (1 - torch.tensor(-rate * total).exp().item()) for rate in (1.5, 0.3))
    assert f"norms in this run (40 steps): of lngd up to {layers:.3g} % (1.5 · lr a step" in said
    assert "ends at 50 % of the first norm" in said
    assert f"up to {others:.3g} % (0.3 · lr a step)" in said
    assert said.count(trainer.optimizer.optimizer.routing_table()) == 1  # with what follows each layer
    memory = trainer.optimizer.optimizer.memory_usage()["total"] / 2**20
    assert f"State of a process: {memory:.1f} MiB (" in said
    assert re.search(r"A step takes about \d+\.\d of AdamW's here", said)
    assert "learning rate is" not in said


def test_what_the_decay_really_takes(tmp_path: Path) -> None:
    """Of weights that nothing else moves: a layer's gradient is zero."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    optimizer = LNGD(model, lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    said = decay_line(optimizer, schedule, 20)
    before = model[1].weight.detach().norm()
    for _ in range(20):
        (model(torch.ones(4, 8)).sum() * 0.0).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    lost = float(1 - model[1].weight.detach().norm() / before)
    found = float(re.search(r"of lngd up to ([\d.]+) %", said)[1]) / 100
    assert found == pytest.approx(min(lost, 0.5), rel=0.15)


def test_no_decay_and_no_schedule() -> None:
    model = torch.nn.Linear(8, 8)
    assert decay_line(LNGD(model, weight_decay=0.0)) == "Weight decay takes of the weights' norms: nothing."
    assert "norms: of lngd 0.1 · lr a step." in decay_line(LNGD(model, weight_decay=0.1))


@pytest.mark.parametrize("stock", [False, True])
def test_an_untouched_rate_and_a_dear_step_are_told(
    stock: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hf_lngd.register()
    try:
        with caplog.at_level(logging.WARNING):
            trained(tmp_path, stock, max_steps=2, optim="lngd")
    finally:
        hf_lngd.unregister()
    assert "default, 5e-05: try one that a sweep found for AdamW" in capsys.readouterr().out
    assert re.search(r"a step takes about \d\.\d of AdamW's .* gradient_accumulation_steps=\d+, 1\.\d", caplog.text)


def test_a_cheap_step_is_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, images=256, max_steps=1, per_device_train_batch_size=32, gradient_accumulation_steps=8)
    assert "a step takes" not in caplog.text


# The forecast's arithmetic

WIDE = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 3, "num_hidden_layers": 1}


def test_matmuls_are_those_that_torch_counts() -> None:
    """Over an interval of factors: tall, wide and square layers, blocks, and attention by head."""
    torch.manual_seed(0)
    model = hf_vit(**WIDE)
    optimizer = LNGD(model)
    images = hf_images(8)
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in images]) for name in images[0]}
    found = 0
    for step in range(40):
        model(**copy.copy(batch)).loss.backward()
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        found += counter.get_total_flops() if step >= 20 else 0
        optimizer.zero_grad()
    assert optimizer.core.interval == 4
    expected = sum(flops_of_update(layer, optimizer.config, 4) for layer in optimizer.core.routing.layers)
    assert expected * 20 / 4 == pytest.approx(found, rel=0.05)


def test_forward_and_backward_are_those_that_torch_counts_and_larger_batches_cost_less() -> None:
    model = hf_vit(**WIDE)
    optimizer = LNGD(model, update_interval=2)
    images = hf_images(8)
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in images]) for name in images[0]}
    with counting(model, optimizer) as work, FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    assert work.model == pytest.approx(counter.get_total_flops(), rel=0.15)  # attention's own products are left out
    model(**batch)
    found = [step_to_adamw(optimizer, work, batches) for batches in (1, 2, 1e9)]
    assert found[0] - found[2] == pytest.approx(2 * (found[1] - found[2]))
    assert step_to_adamw(LNGD(hf_vit(), preset="paper"), work) is None
