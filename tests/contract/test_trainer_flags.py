"""The Trainer's flags of torch.compile and bf16 do with LNGD what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from hf_lngd import LNGD, LNGDTrainer, LNGDTrainingArguments
from hf_lngd.torch_internals import stop_running_eagerly
from tests.helpers import factors_of
from tests.hf_helpers import hf_images, hf_vit


def train(folder: Path, **values: Any) -> LNGDTrainer:
    """Some steps of a ViT."""
    settings = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": 6}
    args = LNGDTrainingArguments(str(folder), per_device_train_batch_size=4, **{**settings, **values})
    trainer = LNGDTrainer(hf_vit(), args, train_dataset=hf_images(24))
    trainer.train()
    return trainer


def test_torch_compile(tmp_path: Path) -> None:
    stop_running_eagerly()
    torch._dynamo.reset()
    counters.clear()
    flags = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    common = {"optim_args": "factor_interval=3", "learning_rate": 0.01}
    plain, compiled = (train(tmp_path, **common, **more).model.state_dict() for more in ({}, flags))
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["lngd", "kfac"])
def test_bf16(family: str, tmp_path: Path) -> None:
    found = []
    for bf16 in (False, True):
        values = {"optim_args": f"family={family},factor_interval=1", "learning_rate": 0.0, "max_steps": 2}
        optimizer = train(tmp_path, bf16=bf16, gradient_accumulation_steps=2, **values).optimizer.optimizer
        assert isinstance(optimizer, LNGD)
        found.append(factors_of(optimizer))
    gap = max(float((found[1][name] - value).norm() / value.norm()) for name, value in found[0].items())
    assert 1e-6 < gap < 3e-2
