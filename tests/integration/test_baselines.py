"""`--optim muon` and `--optim soap`: their libraries' own steps, with AdamW beside them; saved, resumed, refused."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_lngd
from hf_lngd import LNGD, LNGDTrainer, LNGDTrainingArguments
from hf_lngd.integrations.baselines import WithAdamW
from tests.hf_helpers import hf_images, hf_vit

SETTINGS: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_grad_norm": 0.0}
SETTINGS |= {"learning_rate": 0.02, "max_steps": 4, "lr_scheduler_type": "constant", "save_strategy": "no"}

ORDER: dict[str, Any] = {"train_sampling_strategy": "sequential"}


class SOAP(torch.optim.SGD):
    """In the place of pytorch-optimizer's, which is not installed here."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, momentum=betas[0], weight_decay=weight_decay)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("pytorch_optimizer")
    package.SOAP = SOAP  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", package)


def trainer_of(folder: Path, optim: str, model: Any = None, **values: Any) -> LNGDTrainer:
    args = LNGDTrainingArguments(str(folder), optim=optim, **{**SETTINGS, **values})
    return LNGDTrainer(hf_vit() if model is None else model, args, train_dataset=hf_images(64))


def test_muon_is_torchs_with_adamw_beside_it(tmp_path: Path) -> None:
    """Step by step as by hand; matrices are LNGD's, the convolution as a matrix."""
    trainer = trainer_of(tmp_path, "muon", weight_decay=0.1, optim_args="momentum=0.9,ns_steps=3", **ORDER)
    model = hf_vit()
    named = dict(model.named_parameters())
    routes = [r for r in LNGD(hf_vit()).routing() if r.kind == "lngd"]
    matrices = [named[r.parameter] for r in routes]
    plain = [p for name, p in named.items() if not any(p is q for q in matrices)]
    convolution = named["vit.embeddings.patch_embeddings.projection.weight"]
    views = [nn.Parameter(p.detach().flatten(1)) if p is convolution else p for p in matrices]
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"}
    muon = torch.optim.Muon(views, **options)
    decayed = [p for p in plain if p.dim() == 3]  # positions and the class token
    others = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1},
         {"params": [p for p in plain if p.dim() < 3], "weight_decay": 0.0}], lr=0.02
    )  # fmt: skip
    images = trainer.train_dataset
    trainer.train()
    for step in range(4):
        rows = images[8 * step : 8 * step + 8]
        batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
        model(**batch).loss.backward()
        for view, p in zip(views, matrices, strict=True):
            view.grad = p.grad.flatten(1)
        muon.step()
        others.step()
        model.zero_grad()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("optim", ["muon", "soap"])
def test_resuming_is_as_going_on(optim: str, library: None, tmp_path: Path) -> None:
    values: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    values |= {"optim_args": "betas=0.8:0.9"} if optim == "soap" else {}
    whole = trainer_of(tmp_path, optim, **values)
    whole.train()
    assert isinstance(whole.optimizer.optimizer, WithAdamW)
    resumed = trainer_of(tmp_path, optim, hf_vit(seed=1), **values)
    resumed.train(str(tmp_path / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert whole.optimizer.param_groups[0]["lr"] == resumed.optimizer.param_groups[0]["lr"] < 0.02


@pytest.mark.parametrize("optim", ["muon", "soap"])
def test_a_stock_trainer_takes_them_too(optim: str, library: None, tmp_path: Path) -> None:
    values = {**SETTINGS, "weight_decay": 0.1, "optim_args": "betas=0.8:0.9" if optim == "soap" else "momentum=0.9"}
    ours = trainer_of(tmp_path, optim, **values)
    ours.train()
    hf_lngd.register()
    try:
        args = TrainingArguments(str(tmp_path), optim=optim, **values)
        stock = Trainer(hf_vit(), args, train_dataset=hf_images(64))
        stock.train()
    finally:
        hf_lngd.unregister()
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, stock.model.state_dict()[name]), name


def test_what_they_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"optim_args: got 'momentun=0.9', accepted: name=value with lr, weight_decay"):
        trainer_of(tmp_path, "muon", optim_args="momentun=0.9")
    with pytest.raises(ValueError, match=r"optim_args: got .*momentum='a'"):
        trainer_of(tmp_path, "muon", optim_args="momentum=a").create_optimizer()
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ValueError, match="optim: got 'soap', whose package pytorch-optimizer is missing: pip install"):
        trainer_of(tmp_path, "soap")
    with pytest.raises(ValueError, match="optim: got 'muonn' .did you mean muon"):
        trainer_of(tmp_path, "muonn")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    trainer = trainer_of(tmp_path, "muon")
    with pytest.raises(RuntimeError, match=r"optim: got 'muon' under FSDP \(fsdp\), accepted: one process, or DDP"):
        trainer.create_optimizer()


def test_another_state_and_groups_of_a_trainers_own_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "muon")
    optimizer = trainer.create_optimizer()
    with pytest.raises(
        ValueError, match=r"another optimizer's \(with amsgrad, betas, .*accepted: that of the optimizer used here"
    ):
        optimizer.load_state_dict(torch.optim.AdamW(trainer.model.parameters()).state_dict())
    other = trainer_of(tmp_path, "muon")
    other._groups_of_trainer = lambda model: [{"params": list(model.parameters()), "lr": 1.0}]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="optim: got 'muon' for a trainer that makes parameter groups of its own"):
        other.create_optimizer()


def test_a_model_of_matrices_alone_trains(tmp_path: Path) -> None:
    """As under LoRA: AdamW has nothing to do."""
    model = hf_vit()
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith(("fc1.weight", "intermediate.dense.weight"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer_of(tmp_path, "muon", model, max_steps=1).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained and len(trained) == 2
