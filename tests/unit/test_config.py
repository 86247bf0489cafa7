"""Each field is checked by name; presets and families; options as text."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from hf_lngd import LNGDConfig
from hf_lngd.config import FAMILIES, FISHERS, OPTIONS, PRESETS, LNGDFields, other_fishers
from tests.contract.fault_states import BAD


def test_bad_values_of_every_field_are_in_the_table_of_faults() -> None:
    assert set(BAD) == {field.name for field in dataclasses.fields(LNGDConfig)} == {"preset", "family", *OPTIONS}


def test_keywords_are_typed_as_the_fields_are() -> None:
    assert get_type_hints(LNGDFields) == get_type_hints(LNGDConfig)


def test_a_type_checker_knows_the_keywords(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    calls = ["factor_interval=3, betas=(0.9, 0.99)", "momentun=0.9", "seed='a'", "layout='whole', param_groups=[]"]
    lines = ["import torch", "from hf_lngd import LNGD, create_lngd_optimizer", "model = torch.nn.Linear(2, 2)"]
    lines += [f"{name}(model, lr=1e-3, {given})" for name in ("LNGD", "create_lngd_optimizer") for given in calls]
    file = tmp_path / "call.py"
    file.write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(file)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    found = re.findall(r'call\.py:(\d+): error: [^"]*"(\w+)"', done.stdout)
    assert found == [("5", "momentun"), ("6", "seed"), ("9", "momentun"), ("10", "seed")], done.stdout + done.stderr


def test_presets() -> None:
    paper = LNGDConfig(preset="paper")
    assert (paper.preset, paper.fisher, paper.direction, paper.rate) == ("paper", "sampled", "natural", "adaptive")
    assert (paper.damping, paper.ema_decay, paper.momentum, paper.weight_decay) == ("paper", 0.95, 0.9, 0.004)
    assert (paper.momentum_on, paper.bias, paper.embedding, paper.factor_interval) == (
        "update", "factor", "fallback", 100,
    )  # fmt: skip
    assert LNGDConfig(preset="lngd_sample").rate == "none"
    assert LNGDConfig(preset="lngd_lr").fisher == "true"
    assert LNGDConfig().preset == "fast" and LNGDConfig().embedding == "exact"
    assert LNGDConfig(preset="paper", momentum=0.5).damping == "paper"
    assert all(set(fields) <= set(OPTIONS) for fields in PRESETS.values())


def test_every_option_says_what_it_means_and_its_default_is_accepted() -> None:
    for name, option in OPTIONS.items():
        assert option["help"].endswith(".") and getattr(LNGDConfig(), name) == option["default"]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "lngd"])
def test_a_family_given_alone_is_enough(family: str) -> None:
    config = LNGDConfig.from_optim_args(f"family={family}")
    assert (config.family, config.fisher, config.direction, config.rate) == (family, "empirical", "natural", "rms")
    fast = LNGDConfig().to_dict()
    assert {n for n, v in config.to_dict().items() if v != fast[n]} == {"family", "fisher", "direction"}
    paper = LNGDConfig(preset="paper", family=family, fisher="true")
    assert (paper.fisher, paper.rate, paper.damping, paper.bias) == ("true", "adaptive", "paper", "factor")
    assert LNGDConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("field", "value", "accepted"), [("fisher", "sampled", "empirical, true"), ("direction", "polar", "natural")]
)
def test_fields_that_contradict_the_family_are_refused(field: str, value: str, accepted: str) -> None:
    with pytest.raises(ValueError) as error:
        LNGDConfig(family="tkfac", **{field: value})
    assert str(error.value) == f"{field}: got {value!r}, accepted: {accepted} (family=tkfac)"
    assert other_fishers(LNGDConfig(fisher="true")).split(", ") == [name for name in FISHERS if name != "true"]
    assert other_fishers(LNGDConfig(family="kfac", fisher="true")) == "empirical"


def test_copies_are_equal() -> None:
    config = LNGDConfig(preset="paper", betas=(0.8, 0.9), fallback_lr_scale=0.1)
    assert pickle.loads(pickle.dumps(config)) == config
    assert LNGDConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert dataclasses.replace(config, seed=7).fallback_lr_scale == 0.1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        LNGDConfig("paper")  # type: ignore[misc]


def test_a_preset_or_family_on_top_of_settings_leaves_what_was_given() -> None:
    """What was not given follows, also where a given value is that of the old preset."""
    config = LNGDConfig(momentum=0.5, weight_decay=0.1)
    assert config.with_fields(preset="paper") == LNGDConfig(preset="paper", momentum=0.5, weight_decay=0.1)
    assert config.with_fields(family="kfac", seed=3).with_fields(preset="lngd_sample") == LNGDConfig(
        preset="lngd_sample", family="kfac", momentum=0.5, weight_decay=0.1, seed=3
    )
    again = pickle.loads(pickle.dumps(LNGDConfig(preset="paper", seed=4)))
    assert again.with_fields(preset="fast") == LNGDConfig(seed=4)


@pytest.mark.parametrize(("name", "value"), [("preset", "paper"), ("family", "kfac")])
def test_a_preset_or_family_that_would_change_nothing_is_refused(name: str, value: str) -> None:
    whole = LNGDConfig(**LNGDConfig().to_dict())
    assert whole.with_fields(seed=4, **{name: getattr(whole, name)}).seed == 4
    with pytest.raises(ValueError, match=f"{name}: got '{value}', accepted: (fast|lngd) on top of settings"):
        whole.with_fields(**{name: value})


def test_optim_args() -> None:
    text = "factor_interval=7, preset=paper,betas=0.8:0.9,damping_bounds=1e-4:1,max_factor_dim=AUTO"
    config = LNGDConfig.from_optim_args(text + ",exclude=a{1\\,2},seed=3", weight_decay=0.3, seed=1)
    assert (config.factor_interval, config.preset, config.betas) == (7, "paper", (0.8, 0.9))
    assert (config.max_factor_dim, config.damping_bounds, config.exclude) == ("auto", (1e-4, 1.0), "a{1,2}")
    assert (config.weight_decay, config.seed) == (0.3, 3)
    assert LNGDConfig.from_optim_args("max_factor_dim=32").max_factor_dim == 32
    assert LNGDConfig.from_optim_args(None) == LNGDConfig.from_optim_args("") == LNGDConfig()


def test_optim_args_there_and_back() -> None:
    for fields, given in (
        ({}, 1),
        ({"preset": "paper", "betas": (0.8, 0.9), "exclude": "a{1,2}", "max_factor_dim": 7}, 4),
        ({"family": "ekfac", "damping_bounds": (1e-7, 0.5), "seed": 3}, 4),
    ):
        text = LNGDConfig(**fields).to_optim_args()
        assert LNGDConfig.from_optim_args(text) == LNGDConfig(**fields) and text.count("=") == given


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("facto_interval=3", "factor_interval"),
        ("learning_rate=1", "optim_args: unknown name 'learning_rate'; did you mean lr?"),
        ("weight-decay=0", "did you mean weight_decay or"),
        ("factor_interval=1.5", "'1.5'"),
        ("betas=0.9", "betas"),
        ("damping_bounds=1", "damping_bounds: got (1.0,), accepted: two numbers"),
    ],
)
def test_optim_args_that_are_wrong(text: str, told: str) -> None:
    with pytest.raises(ValueError, match="optim_args|accepted") as error:
        LNGDConfig.from_optim_args(text)
    assert told in str(error.value)
