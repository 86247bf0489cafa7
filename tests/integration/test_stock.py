"""`hf_lngd.register()`: an unmodified Trainer script accepts `optim="lngd"`; it can be undone."""

from __future__ import annotations

import pickle
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_lngd
from hf_lngd import (
    LNGD,
    LNGDSeq2SeqTrainer,
    LNGDSeq2SeqTrainingArguments,
    LNGDTrainer,
    LNGDTrainerMixin,
    LNGDTrainingArguments,
)
from hf_lngd.integrations import stock as stock_module
from hf_lngd.integrations.trainer import lngd_of
from tests.hf_helpers import hf_images, hf_vit

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "max_steps": 2,
    "disable_tqdm": True,
    "learning_rate": 0.01,
}


@pytest.fixture
def registered() -> Iterator[None]:
    hf_lngd.register()
    yield
    hf_lngd.unregister()


def stock(folder: Path, model: Any, **values: Any) -> Trainer:
    args = TrainingArguments(str(folder), **{**SETTINGS, **values})
    return Trainer(model, args, train_dataset=hf_images(16))


def test_a_stock_trainer_trains_with_it(registered: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--output_dir", str(tmp_path), "--optim", "lngd", "--optim_args", "factor_interval=3", "--use_cpu"]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(argv)
    assert args.optim == "lngd" and args.to_dict()["optim"] == "lngd"
    trainer = stock(tmp_path, hf_vit(), optim="lngd", optim_args="factor_interval=3", weight_decay=0.2)
    trainer.train()
    optimizer = lngd_of(trainer.optimizer)
    assert isinstance(optimizer, LNGD)
    assert (optimizer.config.factor_interval, optimizer.config.weight_decay) == (3, 0.2)
    assert capsys.readouterr().out.count(optimizer.routing_table().split("\n\n")[0]) == 1


def test_it_steps_as_our_trainer_does(registered: None, tmp_path: Path) -> None:
    text = "family=ekfac"
    found = stock(tmp_path, hf_vit(), optim="lngd", optim_args=text)
    found.train()
    args = LNGDTrainingArguments(str(tmp_path), optim_args=text, **SETTINGS)
    ours = LNGDTrainer(hf_vit(), args, train_dataset=hf_images(16))
    ours.train()
    for (name, value), other in zip(found.model.state_dict().items(), ours.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_it_is_idempotent_and_leaves_nothing_behind(tmp_path: Path) -> None:
    names = list(OptimizerNames)
    for _ in range(2):
        hf_lngd.register()
    assert [*names, *map(OptimizerNames, ("lngd", "muon", "soap"))] == list(OptimizerNames)
    assert OptimizerNames.LNGD is OptimizerNames["LNGD"] is OptimizerNames("lngd")  # type: ignore[attr-defined]
    assert len(OptimizerNames) == len(names) + 3 and "lngd" in repr(OptimizerNames.LNGD)  # type: ignore[attr-defined]
    for _ in range(2):
        hf_lngd.unregister()
    assert list(OptimizerNames) == names
    assert not hasattr(OptimizerNames, "LNGD")
    with pytest.raises(ValueError, match="lngd is not a valid OptimizerNames"):
        TrainingArguments(str(tmp_path), optim="lngd", use_cpu=True)


def test_our_classes_work_beside_it(registered: None, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), optim="lngd", use_cpu=True)
    assert isinstance(LNGDTrainer(hf_vit(), args).create_optimizer(), LNGD)
    assert LNGDTrainingArguments(str(tmp_path), use_cpu=True).optim == "lngd"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("factor_intervall=3", "did you mean factor_interval"),
        ("preset=lngd_lr", "fisher: got 'true' in a stock Trainer"),
        ("family=kfac,fisher=true", "accepted: empirical; or use hf_lngd.LNGDTrainer"),
    ],
)
def test_bad_settings_say_what_is_wrong(registered: None, text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        stock(tmp_path, hf_vit(), optim="lngd", optim_args=text).train()


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("exclude=a{1\\,2}", "exclude", "a{1,2}"),
        ("seed=3, exclude=x=y", "exclude", "x=y"),
        ("exclude=a b", "exclude", "a b"),
        ("betas=0.8:0.9", "betas", (0.8, 0.9)),
    ],
)
def test_settings_are_written_as_for_our_own_classes(
    registered: None, text: str, field: str, value: Any, tmp_path: Path
) -> None:
    """transformers would split at every comma and equals sign, and take out spaces."""
    trainer = stock(tmp_path, hf_vit(), optim="lngd", optim_args=text)
    optimizer = lngd_of(trainer.create_optimizer())
    assert optimizer is not None and getattr(optimizer.config, field) == value
    ours = LNGDTrainer(hf_vit(), LNGDTrainingArguments(str(tmp_path), optim_args=text, **SETTINGS))
    assert lngd_of(ours.create_optimizer()).config == optimizer.config  # type: ignore[union-attr]


def test_other_optimizers_are_chosen_as_before(tmp_path: Path) -> None:
    """Also where a library has wrapped the Trainer's method in the meantime."""
    before = Trainer.__dict__["get_optimizer_cls_and_kwargs"]
    args = TrainingArguments(str(tmp_path), optim="adamw_torch", optim_args="amsgrad", use_cpu=True)
    for _ in range(2):
        hf_lngd.register()
        with pytest.raises(ValueError, match="not enough values to unpack"):
            Trainer.get_optimizer_cls_and_kwargs(args)
        args.optim_args = None
        assert Trainer.get_optimizer_cls_and_kwargs(args)[0] is torch.optim.AdamW
        args.optim_args = "amsgrad"
    with pytest.MonkeyPatch.context() as patch:
        ours = Trainer.get_optimizer_cls_and_kwargs
        patch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *args: ours(*args)))
        hf_lngd.unregister()
        with pytest.raises(ValueError, match="not enough values to unpack"):
            Trainer.get_optimizer_cls_and_kwargs(args)
    hf_lngd.unregister()
    assert Trainer.__dict__["get_optimizer_cls_and_kwargs"] is before


def test_an_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("4.57.6", "5.5.4", "6.0.0", "6.0rc1", "unknown"):
        monkeypatch.setattr(stock_module.transformers, "__version__", version)
        for function in (hf_lngd.register, hf_lngd.unregister):
            with pytest.raises(RuntimeError, match=f"register: got transformers {version}, accepted: 5.6 up to 6.0"):
                function()
    for version in ("5.24.0.dev0", "5.99.1"):
        monkeypatch.setattr(stock_module.transformers, "__version__", version)
        hf_lngd.register()
        hf_lngd.unregister()


def test_the_range_is_that_of_the_package() -> None:
    """`TESTED` is what pyproject.toml lets pip install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    first, last = (".".join(map(str, bound)) for bound in stock_module.TESTED)
    assert f"transformers>={first},<{last.removesuffix('.0')}" in project["dependencies"]


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("OptimizerNames", ["adamw_torch"], "without training_args.OptimizerNames, an enum of strings"),
        ("get_optimizer_cls_and_kwargs", lambda args: None, "without Trainer.get_optimizer_cls_and_kwargs, a static"),
        ("get_optimizer_cls_and_kwargs", None, "without Trainer.get_optimizer_cls_and_kwargs, a static method"),
    ],
)
def test_a_later_version_that_was_built_otherwise_is_refused(
    part: str, value: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the range, but without the private parts: nothing is changed, and the version is named."""
    names = list(OptimizerNames)
    owner = stock_module.training_args if part == "OptimizerNames" else Trainer
    if value is None:
        monkeypatch.delattr(owner, part)
    else:
        monkeypatch.setattr(owner, part, value)
    monkeypatch.setattr(stock_module.transformers, "__version__", "5.31.0")
    with pytest.raises(RuntimeError, match=rf"register: got transformers 5.31.0 {words}.*LNGDTrainer needs no"):
        hf_lngd.register()
    assert list(OptimizerNames) == names


def test_saved_arguments_are_read_again_where_it_is_registered(registered: None, tmp_path: Path) -> None:
    """`training_args.bin` holds the name; without registration its enum refuses it."""
    args = TrainingArguments(str(tmp_path), optim="lngd", use_cpu=True)
    data = pickle.dumps(args)
    assert pickle.loads(data).optim == "lngd"
    hf_lngd.unregister()
    with pytest.raises(ValueError, match="lngd"):
        pickle.loads(data)


class OwnTrainer(Trainer):
    """As users and other libraries make them: a loss and a constructor of its own."""

    def __init__(self, *args: Any, factor: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor, self.calls = factor, 0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        self.calls += 1
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (self.factor * loss, outputs) if return_outputs else self.factor * loss


class OwnLNGDTrainer(LNGDTrainerMixin, OwnTrainer):
    """The same with the mixin before it."""


@dataclass
class OwnArguments(TrainingArguments):
    """As trl's: a field that its trainer needs."""

    max_length: int = 5


class TrainerWithOwnArguments(Trainer):
    def __init__(self, model: Any, args: Any = None, **kwargs: Any) -> None:
        args = OwnArguments("own", use_cpu=True) if args is None else args
        self.length = args.max_length
        super().__init__(model, args, **kwargs)


def test_without_arguments_a_trainer_makes_its_own(caplog: pytest.LogCaptureFixture) -> None:
    trainer = type("Both", (LNGDTrainerMixin, TrainerWithOwnArguments), {})(hf_vit())
    assert trainer.length == 5 and type(trainer.args) is OwnArguments
    assert "args: got none, so Both made OwnArguments, which do not ask for lngd" in caplog.text
    caplog.clear()
    stock_based = type("Stock", (LNGDTrainerMixin, Trainer), {})(hf_vit())
    assert type(stock_based.args) is LNGDTrainingArguments and not caplog.text
    assert type(LNGDSeq2SeqTrainer(hf_vit()).args) is LNGDSeq2SeqTrainingArguments


def test_trainer_subclasses_work_registered_and_with_the_mixin(registered: None, tmp_path: Path) -> None:
    """Other libraries' trainers are subclasses: both ways end at the same weights, through their own loss."""
    found = []
    for cls, arguments in ((OwnTrainer, TrainingArguments), (OwnLNGDTrainer, LNGDTrainingArguments)):
        args = arguments(str(tmp_path), optim="lngd", gradient_accumulation_steps=2, **SETTINGS)
        trainer = cls(model=hf_vit(), args=args, train_dataset=hf_images(32), factor=0.5)
        trainer.train()
        assert trainer.calls == 4 and isinstance(lngd_of(trainer.optimizer), LNGD)
        found.append(trainer.model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
