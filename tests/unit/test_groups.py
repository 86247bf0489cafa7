"""Groups by kind, what a user's entries make of them, what a group says in a step. In training: tests/contract."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.groups import KINDS, Options, StepOptions, alike, make_groups, options_of
from hf_lngd.routing import Routing, route


def routed(**fields: Any) -> tuple[Routing, LNGDConfig]:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.ConvTranspose1d(3, 3, 2))
    config = LNGDConfig(**{"bias": "factor", **fields})
    return route(model, config), config


def test_there_is_a_group_for_each_kind() -> None:
    routing, config = routed(fallback_lr_scale=3.0, momentum=0.7)
    groups = {group["name"]: group for group in make_groups(routing, config, 0.25)}
    assert set(groups) == set(KINDS) and next(iter(groups)) == "lngd"
    for name, group in groups.items():
        layers = name in ("lngd", "lngd_bias")
        assert (group["lr"], group["lr_scale"], group["eps"]) == (0.25, 1.0 if layers else 3.0, config.eps)
        decay = {"lngd": 1.5, "embedding": 0.1, "fallback": 0.1}.get(name, 0.0)
        assert (group["weight_decay"], group["decay_floor"]) == (decay, 0.5 if name == "lngd" else 0.0)
        assert group["betas"] == ((0.7, 0.95) if layers else (0.7 if name == "embedding" else 0.9, 0.999))
        assert {k: v for k, v in group.items() if k not in ("params", "name")} == options_of(name, config, 0.25)
    others = {"lr": 0.25, "lr_scale": 1.0, "weight_decay": 0.0, "decay_floor": 0.0, "betas": config.betas, "eps": 1e-8}
    assert options_of("added", config, 0.25) == others
    assert "lngd_bias" not in {group["name"] for group in make_groups(*routed(bias="fallback"), 0.25)}


def test_entries_make_a_group_for_each_kind_in_them() -> None:
    routing, config = routed()
    weight = routing.parameters["1.weight"]
    entries = [{"params": r"^1\.b|^2\.", "lr": 0.1, "name": "top"}, {"params": [weight], "weight_decay": 0.2, "eps": 1}]
    groups = {group["name"]: group for group in make_groups(routing, config, 0.5, entries)}
    assert set(groups) == {
        "embedding",
        "fallback",
        "fallback_no_decay",
        "top.lngd_bias",
        "top.fallback_no_decay",
        "1.lngd",
    }
    assert next(iter(groups)) == "1.lngd" and groups["1.lngd"]["params"] == [weight]
    assert (groups["1.lngd"]["weight_decay"], groups["1.lngd"]["decay_floor"]) == (0.2, 0.0)
    assert groups["1.lngd"]["eps"] == 1 and groups["top.lngd_bias"]["lr"] == 0.1 and groups["fallback"]["lr"] == 0.5
    every = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in routing.parameters.values())


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (
            [{"params": ".", "rate": 1e-4}],
            "entry 0: got the key 'rate', accepted: betas, decay_floor, eps, lr, lr_scale, ",
        ),
        ([{"params": "nothing"}], "entry 0: no trained parameter has a name that 'nothing' matches"),
        ([{"params": "1"}, {"params": ["1.weight"]}], "parameter '1.weight' is in entries 0 and 1, accepted: in one"),
        ([{"params": ["9.weight"]}], "entry 0: got '9.weight', accepted: names or parameters of the model"),
        ([{"params": [torch.zeros(2)]}], "entry 0: got a tensor that is no parameter of the model"),
        ([{"lr": 1.0}], "entry 0: got {'lr': 1.0}, accepted: a dict with the key 'params'"),
        ([{"params": "1", "lr": -1}], "lr: got -1"),
        ([{"params": "1", "weight_decay": -1.0}], "weight_decay"),
        ([{"params": "1", "weight_decay": "auto"}], "weight_decay must be non-negative, got auto"),
        ([{"params": "("}], "params"),
    ],
)
def test_entries_that_do_not_fit_are_refused(entries: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ValueError) as error:
        make_groups(*routed(), 0.5, entries)
    assert told in str(error.value)


def test_what_a_group_says() -> None:
    group = {"lr": 0.5, "lr_scale": 3.0, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    own = {"weight_decay": 0.1, "momentum": 0.9, "beta2": 0.99, "eps": 1e-8}
    assert Options.of(group) == Options(lr=1.5, peak_lr=1.5, **own)
    for key in ("initial_lr", "max_lr"):
        assert Options.of({**group, key: 2.0}) == Options(lr=1.5, peak_lr=6.0, **own)
        assert Options.of({**group, key: 0.1}) == Options(lr=1.5, peak_lr=1.5, **own)
    tensors = {"lr": torch.tensor(0.5), "initial_lr": torch.tensor(2.0)}
    assert float(Options.of({**group, **tensors}).peak_lr) == 6.0
    assert Options.of({**group, "momentum": 0.3}).momentum == 0.3


def test_which_group_has_a_parameter() -> None:
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    groups: list[dict[str, Any]] = [{"params": own, "lr": 1.0, "lr_scale": 1.0} for own in ([a], [b, c])]
    for group in groups:
        group |= {"weight_decay": 0.0, "betas": (0.9, 0.99), "eps": 1e-8}
    options = StepOptions(groups)
    assert list(options) == [a, b, c] and options[c] is options.groups[1]
    groups[1]["params"] = [b]
    options = StepOptions(groups)
    assert list(options) == [a, b] and c not in options
    groups.append({**groups[0]})
    with pytest.raises(ValueError, match=r"a parameter \[2\] is in groups 0 and 2, accepted: in one"):
        StepOptions(groups)


def test_values_of_layers_are_one_number_where_they_are_the_same() -> None:
    like = torch.empty(0, dtype=torch.float64)
    rate = torch.tensor(0.5)
    assert alike([0.1, 0.1], like) == 0.1 and alike([rate, rate], like) is rate
    for values in ([0.1, 0.2], [torch.tensor(0.1).double(), 0.2]):
        found = alike(values, like)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, torch.tensor([0.1, 0.2]).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("lr", "fields", "words"),
    [
        (0.4, {}, "lr: got 0.4, at which weight decay takes 60 % of weights in each step"),
        (0.2, {"weight_decay": 1.0, "fallback_lr_scale": 3.0}, "lr: got 0.2, at which weight decay takes 60 %"),
        (1e-3, {"param_groups": [{"params": "fc", "lr": 1.0}]}, "lr: got 1, at which weight decay takes 150 %"),
        (0.3, {}, None),
        (9.0, {"weight_decay": 0.0}, None),
    ],
)
def test_a_rate_at_which_decay_takes_half_of_the_weights_is_refused(
    lr: float, fields: dict[str, Any], words: str | None
) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(3, 3), "table": nn.Embedding(3, 3)})
    with nullcontext() if words is None else pytest.raises(ValueError, match=words):
        LNGD(model, lr=lr, **fields)
