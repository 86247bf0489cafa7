"""Trainers of other libraries, as small ones of the same shape: under `register()` and with the mixin before them.

The libraries' own are run by ``make test-compat``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_lngd
from hf_lngd import LNGDArgumentsMixin, LNGDSeq2SeqTrainer, LNGDSeq2SeqTrainingArguments, LNGDTrainerMixin
from hf_lngd.integrations.trainer import lngd_of
from tests.hf_helpers import hf_encoded, hf_pairs, hf_seq2seq_model, hf_tokenizer

SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 0.01,
    "remove_unused_columns": False,
    "optim": "lngd",
}


@pytest.fixture
def registered() -> Iterator[None]:
    hf_lngd.register()
    yield
    hf_lngd.unregister()


class Net(nn.Module):
    """A model that gives outputs alone, as those whose trainers have losses of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.hidden(x)))


class Classifier(nn.Module):
    """A loss with weights, which calls the model, as sentence-transformers' SoftmaxLoss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        torch.manual_seed(1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.model(x)), labels)


class LossTrainer(Trainer):
    """A loss beside the model, short signatures, groups of its own: as sentence-transformers' trainers."""

    rates: dict[str, float] = {}

    def __init__(self, model: Any = None, args: Any = None, loss: Any = None, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        self.loss = loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.loss.model = model  # what is wrapped, under DDP
        loss = self.loss(**inputs)
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.loss(**self._prepare_inputs(inputs)).detach(), None, None

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
        made, options = super().get_optimizer_cls_and_kwargs(args, self.loss)
        assert not {"params", "model", "optimizer_dict"} & set(options)
        named, chosen = dict(self.loss.named_parameters()), set(self.rates)
        groups: list[dict[str, Any]] = [{"params": [p for name, p in named.items() if name not in chosen]}]
        groups += [{"params": [named[name]], "lr": rate} for name, rate in self.rates.items()]
        options["optimizer_dict"] = [{**group, "weight_decay": 0.0} for group in groups]
        return made, options

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:  # type: ignore[override]
        super()._load_from_checkpoint(checkpoint_path)


class RatesTrainer(LossTrainer):
    """With learning rates by name."""

    rates = {"model.hidden.weight": 0.0, "head.bias": 0.0}


@dataclass
class Arguments(LNGDArgumentsMixin, TrainingArguments):
    """As a user makes them."""


def with_mixin(trainer: type) -> Any:
    return type(f"With{trainer.__name__}", (LNGDTrainerMixin, trainer), {})


def rows(count: int = 32) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, generator=draw), "labels": torch.tensor(i % 2)} for i in range(count)]


WAYS = ["register", "mixin"]


def make(way: str, folder: Path, trainer: type = LossTrainer, **values: Any) -> Any:
    made = trainer if way == "register" else with_mixin(trainer)
    args = (TrainingArguments if way == "register" else Arguments)(str(folder), **{**SETTINGS, **values})
    model = Net()
    return made(model=model, args=args, loss=Classifier(model), train_dataset=rows(), eval_dataset=rows(8))


@pytest.mark.parametrize("way", WAYS)
def test_the_weights_of_a_loss_are_trained(
    registered: None, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(way, tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.loss.named_parameters()}
    trainer.train()
    for name, p in trainer.loss.named_parameters():
        assert not torch.equal(before[name], p), name
    groups = {group["name"]: group for group in lngd_of(trainer.optimizer).param_groups}
    assert groups["outside"]["lr_scale"] == 3.0
    assert "Not the model's, trained by AdamW: 2 tensors, 14 parameters." in capsys.readouterr().out
    assert "not trained" not in caplog.text


def test_both_ways_train_alike(registered: None, tmp_path: Path) -> None:
    found = []
    for way in WAYS:
        trainer = make(way, tmp_path)
        trainer.train()
        found.append(trainer.loss.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_a_loss_are_those_of_their_step(registered: None, way: str, tmp_path: Path) -> None:
    """`model.zero_grad()`, which the Trainer calls, does not reach them."""
    trainer = make(way, tmp_path, max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.loss.head.weight.grad is None


@pytest.mark.parametrize("way", WAYS)
def test_rates_that_a_trainer_gives_by_name_are_obeyed(registered: None, way: str, tmp_path: Path) -> None:
    trainer = make(way, tmp_path, RatesTrainer)
    before = {name: p.detach().clone() for name, p in trainer.loss.named_parameters()}
    trainer.train()
    resting = {name for name, p in trainer.loss.named_parameters() if torch.equal(before[name], p)}
    assert resting == set(RatesTrainer.rates)


@pytest.mark.parametrize("way", WAYS)
def test_resume_goes_on_to_the_bit(registered: None, way: str, tmp_path: Path) -> None:
    whole = make(way, tmp_path)
    states: dict[int, Any] = {}
    steps = type(whole).training_step

    def remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        states[self.state.global_step] = {name: p.detach().clone() for name, p in self.loss.head.state_dict().items()}
        return steps(self, *args, **kwargs)

    type(whole).training_step = remember
    try:
        whole.train()
    finally:
        type(whole).training_step = steps
    resumed = make(way, tmp_path)
    resumed.loss.head.load_state_dict(states[2])  # which no checkpoint of such a trainer holds
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in whole.loss.state_dict().items():
        assert torch.equal(value, resumed.loss.state_dict()[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_the_best_model_is_loaded_at_the_end(registered: None, way: str, tmp_path: Path) -> None:
    values = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.3}
    trainer = make(way, tmp_path, max_steps=8, greater_is_better=True, metric_for_best_model="eval_loss", **values)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and not best.endswith("-8")  # the worst of them is wanted: not the last
    other = Net()
    saved = make(way, tmp_path / "other")
    saved.model = other
    saved._load_from_checkpoint(best)
    for name, value in other.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


class BesideTrainer(LossTrainer):
    """Which gives its optimizer the model alone, as transformers' does: the loss is forgotten."""

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
        return Trainer.get_optimizer_cls_and_kwargs(args, model)


def test_parameters_that_nobody_trains_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make("mixin", tmp_path, BesideTrainer)
    trainer.train()
    told = [record for record in caplog.records if "not trained" in record.message]
    assert len(told) == 1 and told[0].levelno == logging.WARNING
    assert "loss.head.weight, loss.head.bias" in told[0].message and "model.hidden" not in told[0].message


# Constructors and methods of other signatures


class OtherOrder(Trainer):
    """As trl's DPO, GRPO, KTO and RLOO trainers: `args` is not the second."""

    def __init__(self, model: Any = None, reward: Any = None, args: Any = None, dataset: Any = None, **kw: Any) -> None:
        super().__init__(model=model, args=args, train_dataset=dataset, **kw)
        self.reward = reward


class Passing(OtherOrder):
    """Whose signature tells nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize("trainer", [OtherOrder, Passing])
@pytest.mark.parametrize("by_place", [True, False])
def test_arguments_arrive_as_they_were_given(trainer: type, by_place: bool, tmp_path: Path) -> None:
    args, reward, dataset = Arguments(str(tmp_path), **{**SETTINGS, "max_steps": 7}), object(), rows(4)
    model = Net()
    if by_place:
        made = with_mixin(trainer)(model, reward, args, dataset)
    else:
        made = with_mixin(trainer)(model=model, args=args, dataset=dataset, reward=reward)
    assert made.args is args and made.reward is reward and made.train_dataset is dataset and made.model is model


def test_sharding_is_refused_wherever_the_arguments_stand(tmp_path: Path) -> None:
    args = Arguments(str(tmp_path), **SETTINGS)
    args.fsdp = [True]
    with pytest.raises(RuntimeError, match="LNGD: got FSDP2 on CPU"):
        with_mixin(OtherOrder)(Net(), None, args)


class OldSignatures(Trainer):
    """Methods as many wrote them for earlier versions, and a loss that returns no outputs, as GRPO's."""

    def create_optimizer(self) -> Any:  # type: ignore[override]
        return super().create_optimizer()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs:
            raise ValueError("no outputs")
        return nn.functional.cross_entropy(model(inputs["x"]), inputs["labels"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs)


def test_methods_are_called_as_the_trainer_calls_them(tmp_path: Path) -> None:
    args = Arguments(str(tmp_path), **SETTINGS, logging_steps=1)
    trainer = with_mixin(OldSignatures)(Net(), args, train_dataset=rows())
    trainer.train()
    assert lngd_of(trainer.optimizer) is not None and trainer.state.global_step == 4


# Positions that checkpoints leave out


def marian(folder: Path) -> Any:
    made = hf_seq2seq_model("marian", hf_tokenizer())
    made.save_pretrained(folder)
    return lambda: type(made).from_pretrained(folder)


def positions(model: Any) -> torch.Tensor:
    return model.model.decoder.embed_positions.weight


def test_what_checkpoints_leave_out_is_not_trained_under_model_init(tmp_path: Path) -> None:
    load, data = marian(tmp_path / "model"), hf_encoded(hf_tokenizer(), [hf_pairs(1)[0]] * 32)
    args = LNGDSeq2SeqTrainingArguments(str(tmp_path / "run"), **SETTINGS)
    whole = LNGDSeq2SeqTrainer(args=args, model_init=load, train_dataset=data)
    whole.train()
    resumed = LNGDSeq2SeqTrainer(args=args, model_init=load, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(positions(whole.model), positions(load()))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_what_checkpoints_leave_out_is_not_trained_by_a_stock_trainer(registered: None, tmp_path: Path) -> None:
    load, data = marian(tmp_path / "model"), hf_encoded(hf_tokenizer(), [hf_pairs(1)[0]] * 32)
    trainer = Trainer(load(), TrainingArguments(str(tmp_path / "run"), **SETTINGS), train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(positions(trainer.model), positions(load()))
