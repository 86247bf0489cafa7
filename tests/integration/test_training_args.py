"""`--optim lngd --optim_args …` from the command line, JSON, Python; precedence; errors on construction."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_lngd import LNGDSeq2SeqTrainingArguments, LNGDTrainingArguments, create_lngd_optimizer
from hf_lngd.integrations.training_args import is_lngd, lngd_settings
from hf_lngd.integrations.usage import UsageParser

CLASSES = [LNGDTrainingArguments, LNGDSeq2SeqTrainingArguments]
TEXT = "factor_interval=10,preset=fast"


def same(args: Any) -> None:
    assert is_lngd(args) and args.optim == "lngd" and args.optim_args == TEXT
    config, lr = lngd_settings(args)
    assert (config.preset, config.factor_interval, lr) == ("fast", 10, 0.01)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_way_in(cls: Any, tmp_path: Path) -> None:
    values = {"output_dir": "out", "optim": "lngd", "optim_args": TEXT, "learning_rate": 0.01}
    argv = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    (parsed,) = HfArgumentParser(cls).parse_args_into_dataclasses(argv)
    same(parsed)
    same(cls(**values))
    file = tmp_path / "args.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    (from_json,) = HfArgumentParser(cls).parse_json_file(str(file))
    same(from_json)
    same(dataclasses.replace(parsed, seed=3))
    same(pickle.loads(pickle.dumps(parsed)))
    as_dict = parsed.to_dict()
    assert json.loads(json.dumps(as_dict))["optim"] == "lngd"


@pytest.mark.parametrize("cls", CLASSES)
def test_lngd_is_the_default_of_these_classes_and_helped(cls: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cls("out").optim == "lngd"
    text = " ".join(HfArgumentParser(cls).format_help().split())
    assert "layer-wise natural gradient" in text and "factor_interval=10,preset=fast" in text


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_every_other_name_is_accepted_as_before(name: str) -> None:
    args = LNGDTrainingArguments("out", optim=name)
    assert args.optim is OptimizerNames(name)
    assert args.to_dict()["optim"] == name


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"optim": "lngdd"}, ("optim: got 'lngdd'", "did you mean lngd", "accepted: lngd, muon, soap, adamw_torch")),
        ({"optim_args": "factor_intervall=3"}, ("optim_args", "factor_intervall", "factor_interval")),
        ({"optim_args": "lr=fast"}, ("optim_args: lr: got 'lr=fast'", "accepted")),
        ({"learning_rate": -1.0}, ("learning_rate: got -1.0", "accepted")),
        ({"learning_rate": "1e-3"}, ("learning_rate: got '1e-3'", "accepted: a number, at least 0")),
        ({"optim_args": {"momentum": 0.8}}, ("optim_args: got {'momentum': 0.8}", "accepted: a text, name=value")),
        ({"weight_decay": -1.0}, ("weight_decay: got -1.0", "accepted")),
        ({"lngd_log": "long"}, ("lngd_log: got 'long'", "accepted: none, short, full")),
        (
            {"learning_rate": 0.4},
            ("lr: got 0.4, at which weight decay takes 60 %", "accepted: at most 50 %"),
        ),
        ({"adam_beta2": 1.0}, ("betas: got (0.9, 1.0)", "accepted")),
    ],
)
def test_a_wrong_value_is_refused_on_construction(given: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        LNGDTrainingArguments("out", **given)
    for word in words:
        assert word in str(caught.value)


def test_precedence() -> None:
    def settings(**values: Any) -> tuple[Any, float]:
        return lngd_settings(LNGDTrainingArguments("out", **values))

    preset, lr = settings()
    assert lr == LNGDTrainingArguments("out").learning_rate
    assert preset.weight_decay == "auto" and settings(weight_decay=0.0)[0].weight_decay == 0
    assert LNGDTrainingArguments("out", optim="adamw_torch").weight_decay == 0
    flags = {"weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "learning_rate": 0.02}
    config, lr = settings(**flags)
    assert (config.weight_decay, config.betas, config.eps, lr) == (0.3, (0.8, 0.95), 1e-6, 0.02)
    config, lr = settings(**flags, optim_args="weight_decay=0.2,betas=0.7:0.9,eps=1e-7,lr=0.05,preset=paper")
    assert (config.weight_decay, config.betas, config.eps, lr) == (0.2, (0.7, 0.9), 1e-7, 0.05)
    assert config.preset == "paper"
    config, _ = settings(optim_args="preset=paper")
    assert config.weight_decay == 0.004
    config, _ = settings(optim_args="weight_decay=0")
    assert config.weight_decay == 0


def test_fp16_on_the_cpu_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="fp16: got True on the CPU.*accepted: bf16"):
        LNGDTrainingArguments("out", use_cpu=True, fp16=True)
    assert LNGDTrainingArguments("out", use_cpu=True, fp16=True, optim="adamw_torch").fp16
    assert LNGDTrainingArguments("out", use_cpu=True, bf16=True).bf16


@pytest.mark.parametrize("cls", CLASSES)
def test_a_pickle_has_no_token_and_a_copy_has(cls: Any) -> None:
    args = cls("out", hub_token="hf_secret", optim_args=TEXT, label_names=["labels"])
    data = pickle.dumps(args)
    assert b"hf_secret" not in data and args.hub_token == "hf_secret"
    read = pickle.loads(data)
    assert read.hub_token is None and dataclasses.replace(read, hub_token="hf_secret") == args
    for made in (copy.copy(args), copy.deepcopy(args), dataclasses.replace(args)):
        assert made.hub_token == "hf_secret" and made == args
    assert copy.deepcopy(args).label_names is not args.label_names and copy.copy(args).label_names is args.label_names


@pytest.mark.parametrize(
    ("targets", "owned"),
    [
        ("all-linear", {"0", "block.fc", "block.out"}),
        (r"block\.\w+", {"block.fc", "block.out", "block.conv"}),
        (["fc", "0"], {"0", "block.fc"}),
        (["block"], {"block.fc", "block.out", "block.conv"}),
        (None, {"0", "block.fc", "block.out", "block.conv"}),
    ],
)
def test_target_modules_are_lngds_and_all_others_adamws(targets: Any, owned: set[str], tmp_path: Path) -> None:
    block = nn.ModuleDict({"fc": nn.Linear(4, 4), "out": nn.Linear(4, 4), "conv": nn.Conv2d(2, 2, 3)})
    model = nn.Sequential(OrderedDict({"0": nn.Linear(4, 4), "block": block, "table": nn.Embedding(5, 4)}))
    args = LNGDTrainingArguments(str(tmp_path), optim_target_modules=targets, use_cpu=True)
    optimizer = create_lngd_optimizer(model, args)
    routes = optimizer.routing()
    assert {r.layer for r in routes if r.owner == "lngd" and r.parameter.endswith("weight")} - {"table"} == owned
    args.optim_args = "exclude=^block"
    assert {r.layer for r in create_lngd_optimizer(model, args).routing() if r.owner == "lngd"} <= {"0", "table"}
    args.optim_target_modules = ["nowhere"]
    with pytest.raises(ValueError, match=r"optim_target_modules: got \['nowhere'\], which is no module of Sequential"):
        create_lngd_optimizer(model, args)


def test_a_negative_number_may_have_an_exponent() -> None:
    """Which argparse takes for the name of another argument; so the rate itself is refused."""
    args = UsageParser(TrainingArguments).parse(["--learning_rate", "-1e-3", "--use_cpu", "true"])[0]
    assert args.learning_rate == -1e-3
