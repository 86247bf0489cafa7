"""Each field is checked by name; presets and families; options as text."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
import torch
from torch import nn

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.config import FAMILIES, FISHERS, OPTIONS, PRESETS, other_fishers

BAD = {
    "preset": ["fst", 1],
    "family": ["shampoo", "KFAC"],
    "fisher": ["exact"],
    "direction": ["up", "gram"],
    "rate": ["fast", None, "trust"],
    "rate_scale": [0, -1, "a", float("nan"), True],
    "damping": ["none"],
    "damping_rho": [0, -1, float("inf")],
    "damping_bounds": [(0, 1), (1e-2, 1e-5), (1e-5,), 1e-5, ("a", "b")],
    "momentum": [1, -0.1, "x"],
    "momentum_on": ["both"],
    "ema_decay": [1.0, -1],
    "factor_interval": [0, 2.5, True],
    "inverse_interval": [0],
    "weight_decay": [-1],
    "weight_decay_scale": [-1, "x"],
    "bias": ["none"],
    "max_factor_dim": [0, "big", 2.0, True],
    "embedding": ["none", "rotated"],
    "exclude": ["("],
    "fallback_lr_scale": [0],
    "betas": [(0.9,), (0.9, 1.0), 0.9, ("a", "b")],
    "eps": [0],
    "seed": [-1, 0.5, 2**64],
}
GONE = [
    "rate_mu", "rate_rows", "nesterov", "stagger", "early_factors", "polar_interval", "gram_decay",
    "matrix_dtype", "factor_dtype", "bf16_update", "row_decay", "inverse_root", "fallback_lr", "chain", "head",
    "conv_rows", "conv_memory", "placement", "damping_min", "damping_max",
]  # fmt: skip


def test_every_field_has_bad_values_here() -> None:
    assert set(BAD) == {field.name for field in dataclasses.fields(LNGDConfig)} == {"preset", "family", *OPTIONS}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_bad_value_names_field_value_and_accepted(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name) as error:
        LNGDConfig(**{name: value})
    assert repr(value) in str(error.value) and "accepted" in str(error.value)


@pytest.mark.parametrize("name", GONE)
def test_options_that_are_gone_are_unknown_names(name: str) -> None:
    for call in (lambda: LNGD(nn.Linear(2, 2), **{name: 1}), lambda: LNGDConfig.from_optim_args(f"{name}=1")):
        with pytest.raises(ValueError, match=f"unknown name '{name}'; (did you mean|accepted: preset)"):
            call()


def test_presets() -> None:
    paper = LNGDConfig.preset("paper")
    assert (paper.preset, paper.fisher, paper.direction, paper.rate) == ("paper", "sampled", "natural", "adaptive")
    assert (paper.damping, paper.ema_decay, paper.momentum, paper.weight_decay) == ("paper", 0.95, 0.9, 0.004)
    assert (paper.momentum_on, paper.bias, paper.embedding, paper.factor_interval) == (
        "update", "factor", "fallback", 100,
    )  # fmt: skip
    assert LNGDConfig.preset("lngd_sample") == LNGDConfig(preset="lngd_sample")
    assert LNGDConfig.preset("lngd_sample").rate == "none"
    assert LNGDConfig.preset("lngd_lr").fisher == "true"
    assert LNGDConfig().preset == "fast" and LNGDConfig().embedding == "exact"
    assert LNGDConfig(preset="paper", momentum=0.5).damping == "paper"
    assert LNGDConfig.preset("paper", seed=4).seed == 4
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


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "lngd"])
@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("fisher", "expected", "empirical, true"),
        ("fisher", "sampled", "empirical, true"),
        ("direction", "polar", "natural"),
    ],
)
def test_fields_that_contradict_the_family_are_refused(family: str, field: str, value: str, accepted: str) -> None:
    with pytest.raises(ValueError) as error:
        LNGDConfig(family=family, **{field: value})
    assert str(error.value) == f"{field}: got {value!r}, accepted: {accepted} (family={family})"


def test_other_fishers_are_those_that_the_family_accepts() -> None:
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
    again = pickle.loads(pickle.dumps(LNGDConfig.preset("paper", seed=4)))
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


@pytest.mark.parametrize(
    "config",
    [
        LNGDConfig(),
        LNGDConfig(preset="paper", betas=(0.8, 0.9), exclude="a{1,2}", max_factor_dim=7),
        LNGDConfig(family="ekfac", damping_bounds=(1e-7, 0.5), seed=3),
    ],
    ids=lambda config: config.to_optim_args(),
)
def test_optim_args_there_and_back(config: LNGDConfig) -> None:
    assert LNGDConfig.from_optim_args(config.to_optim_args()) == config
    changed = config.to_optim_args().count("=")
    assert changed == 1 + sum(
        value != LNGDConfig(preset=config.preset, family=config.family).to_dict()[name]
        for name, value in config.to_dict().items()
    ) + (config.family != "lngd")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("facto_interval=3", "factor_interval"),
        ("zzz=1", "accepted: preset"),
        ("learning_rate=1", "optim_args: unknown name 'learning_rate'; did you mean lr?"),
        ("PRESET=fast", "unknown name 'PRESET'; did you mean preset"),
        ("weight-decay=0", "did you mean weight_decay or"),
        ("momentum", "name=value"),
        ("a=1,,b=2", "'a'"),
        ("seed=1,,momentum=0.5", "empty"),
        ("seed=1,seed=2", "twice"),
        ("factor_interval=1.5", "'1.5'"),
        ("betas=0.9", "betas"),
        ("damping_bounds=1", "damping_bounds: got (1.0,), accepted: two numbers"),
        ("momentum=x", "'x'"),
    ],
)
def test_optim_args_that_are_wrong(text: str, told: str) -> None:
    with pytest.raises(ValueError, match="optim_args|accepted") as error:
        LNGDConfig.from_optim_args(text)
    assert told in str(error.value)


def test_the_optimizer_checks_its_own_arguments() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="factor_interval"):
        LNGD(model, factor_intervall=3)
    with pytest.raises(ValueError, match="lr: got -1"):
        LNGD(model, lr=-1)
    with pytest.raises(ValueError, match="model: got"):
        LNGD(model.parameters())  # type: ignore[arg-type]
    for config, told in (
        (1e-3, "lr=1e-3"),
        (torch.tensor(0.1), "lr=1e-3"),
        ({"seed": 1}, r"LNGD\(model, \*\*settings"),
    ):
        with pytest.raises(ValueError, match=rf"config: got .*accepted: an LNGDConfig or None; .*{told}"):
            LNGD(model, config)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LNGD: unknown name 'learning_rate'; did you mean lr?"):
        LNGD(model, learning_rate=1e-3)
    with pytest.raises(ValueError, match="no parameter"):
        LNGD(model.requires_grad_(False))
    assert LNGD(nn.Linear(2, 2), LNGDConfig(preset="paper"), seed=5).config.seed == 5
    on_top = LNGD(nn.Linear(2, 2), LNGDConfig(seed=5), preset="paper").config
    assert on_top == LNGDConfig(preset="paper", seed=5)
