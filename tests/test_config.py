"""Each field is checked by name; presets; `--optim_args`."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.config import PRESETS

BAD = {
    "preset": ["fst", 1],
    "family": ["shampoo", "KFAC"],
    "fisher": ["exact"],
    "direction": ["up"],
    "rate": ["fast", None],
    "rate_scale": [0, -1, "a", float("nan"), True],
    "rate_mu": [-1e-9, float("inf")],
    "rate_rows": [0, 1.5],
    "damping": ["none"],
    "damping_rho": [0, -1],
    "damping_min": [0],
    "damping_max": [-1],
    "momentum": [1, -0.1, "x"],
    "nesterov": ["yes", 1],
    "momentum_on": ["both"],
    "ema_decay": [1.0, -1],
    "factor_interval": [0, 2.5, True],
    "inverse_interval": [0],
    "stagger": [None],
    "early_factors": [2],
    "polar_interval": [0, "often", 1.5],
    "gram_decay": [1],
    "matrix_dtype": ["float16"],
    "factor_dtype": ["float16", "float32", None],
    "row_decay": [1],
    "bf16_update": ["float32", 1],
    "inverse_root": ["svd"],
    "weight_decay": [-1],
    "weight_decay_scale": [-1, "x"],
    "bias": ["none"],
    "max_factor_dim": [0, "big", 2.0],
    "embedding": ["none"],
    "exclude": ["("],
    "fallback_lr": [0, -1],
    "fallback_lr_scale": [0],
    "betas": [(0.9,), (0.9, 1.0), 0.9, ("a", "b")],
    "eps": [0],
    "seed": [-1, 0.5, 2**64],
    "chain": ["none"],
    "head": ["poisson"],
    "conv_rows": [0, 1.5],
    "conv_memory": [0],
    "placement": ["round"],
}


def test_every_field_has_bad_values_here() -> None:
    assert set(BAD) == {field.name for field in dataclasses.fields(LNGDConfig)}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_bad_value_names_field_value_and_accepted(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name) as error:
        LNGDConfig(**{name: value})
    assert repr(value) in str(error.value) and "accepted" in str(error.value)


def test_presets() -> None:
    paper = LNGDConfig.preset("paper")
    assert (paper.preset, paper.fisher, paper.direction, paper.rate) == ("paper", "sampled", "natural", "adaptive")
    assert (paper.damping, paper.ema_decay, paper.momentum, paper.weight_decay) == ("paper", 0.95, 0.9, 0.004)
    assert (paper.momentum_on, paper.stagger, paper.early_factors) == ("update", False, False)
    assert LNGDConfig.preset("lngd_sample").rate == "none"
    assert LNGDConfig.preset("lngd_lr").fisher == "true"
    assert LNGDConfig().preset == "fast"
    assert LNGDConfig(preset="paper", momentum=0.5).damping == "paper"
    assert LNGDConfig.preset("paper", seed=4).seed == 4
    assert all(set(fields) == set(PRESETS["fast"]) for fields in PRESETS.values())


def test_copies_are_equal() -> None:
    config = LNGDConfig(preset="paper", betas=(0.8, 0.9), fallback_lr=0.1)
    assert pickle.loads(pickle.dumps(config)) == config
    assert LNGDConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert dataclasses.replace(config, seed=7).fallback_lr == 0.1
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


def test_damping_bounds_are_in_order() -> None:
    with pytest.raises(ValueError, match="damping_min.*damping_max"):
        LNGDConfig(damping_min=1.0, damping_max=0.1)


def test_optim_args() -> None:
    text = "factor_interval=7, preset=paper,betas=0.8:0.9,nesterov=true,max_factor_dim=auto,fallback_lr=none"
    config = LNGDConfig.from_optim_args(text + ",exclude=a{1\\,2},seed=3", weight_decay=0.3, seed=1)
    assert (config.factor_interval, config.preset, config.betas, config.nesterov) == (7, "paper", (0.8, 0.9), True)
    assert (config.max_factor_dim, config.fallback_lr, config.exclude) == ("auto", None, "a{1,2}")
    assert (config.weight_decay, config.seed) == (0.3, 3)
    assert LNGDConfig.from_optim_args("max_factor_dim=32").max_factor_dim == 32
    assert LNGDConfig.from_optim_args("fallback_lr=0.5,stagger=0").fallback_lr == 0.5
    assert LNGDConfig.from_optim_args(None) == LNGDConfig.from_optim_args("") == LNGDConfig()


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
        ("nesterov=maybe", "'maybe'"),
        ("betas=0.9", "betas"),
        ("momentum=x", "'x'"),
    ],
)
def test_optim_args_that_are_wrong(text: str, told: str) -> None:
    with pytest.raises(ValueError, match="optim_args|accepted") as error:
        LNGDConfig.from_optim_args(text)
    assert told in str(error.value)


def test_the_optimizer_checks_its_own_arguments() -> None:
    import torch

    model = torch.nn.Linear(2, 2)
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
    assert LNGD(torch.nn.Linear(2, 2), LNGDConfig(preset="paper"), seed=5).config.seed == 5
    on_top = LNGD(torch.nn.Linear(2, 2), LNGDConfig(seed=5), preset="paper").config
    assert on_top == LNGDConfig(preset="paper", seed=5)
