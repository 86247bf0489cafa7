"""Saved and loaded state continues bit for bit; a state that does not fit is refused whole."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from core_helpers import core_batch, core_marian, core_step
from torch import nn

from hf_lngd import LNGD

CONFIGS: list[dict[str, Any]] = [
    {},
    {"direction": "natural", "factor_interval": 3, "inverse_interval": 2, "stagger": False},
    {"direction": "polar", "bias": "factor", "max_factor_dim": 10},
    {"matrix_dtype": "full", "inverse_root": "newton", "direction": "gram"},
    {"chain": "full", "head": "categorical", "factor_interval": 3},
    {"embedding": "exact", "momentum_on": "update", "nesterov": False, "bf16_update": "stochastic"},
    {"bias": "factor", "bf16_update": "stochastic"},
    {"preset": "paper", "factor_interval": 2, "inverse_interval": 4},
    {"preset": "lngd_sample", "factor_interval": 2},
    {"preset": "lngd_lr", "factor_interval": 3},
    {"family": "kfac", "factor_interval": 2, "inverse_interval": 3},
    {"factor_dtype": "bfloat16", "factor_interval": 2},
    {"factor_dtype": "bfloat16", "factor_interval": 2, "family": "tkfac"},
    {"family": "ekfac", "factor_interval": 2, "inverse_interval": 3},
    {"family": "tkfac", "factor_interval": 2, "inverse_interval": 3, "fisher": "true", "preset": "paper"},
    {"family": "ng+", "factor_interval": 2, "inverse_interval": 3, "bias": "factor", "max_factor_dim": 10},
]


def reload(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_goes_on_bit_for_bit(fields: dict[str, Any], dtype: torch.dtype) -> None:
    model = core_marian().to(dtype)
    optimizer = LNGD(model, lr=1e-2, **fields)
    for seed in range(4):
        core_step(model, optimizer, core_batch(seed))
    other = core_marian(seed=9).to(dtype)
    other.load_state_dict(model.state_dict())
    resumed = LNGD(other, lr=5.0, **fields)
    resumed.load_state_dict(reload(optimizer.state_dict()))
    assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]
    first, second = flat(optimizer.state_dict()["lngd"]), flat(resumed.state_dict()["lngd"])
    assert {name: t.dtype for name, t in first.items()} == {name: t.dtype for name, t in second.items()}
    for seed in range(4, 9):
        core_step(model, optimizer, core_batch(seed))
        core_step(other, resumed, core_batch(seed))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def flat(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in items:
        name = f"{prefix}.{key}"
        found.update({name: value} if isinstance(value, torch.Tensor) else flat(value, name))
    return found


def test_an_empty_state_goes_round() -> None:
    model = core_marian()
    optimizer = LNGD(model, lr=1e-2)
    optimizer.load_state_dict(optimizer.state_dict())  # accelerate's wrapper does this
    core_step(model, optimizer, core_batch())
    plain = core_marian()
    core_step(plain, LNGD(plain, lr=1e-2), core_batch())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def trained(model: nn.Module | None = None, **fields: Any) -> tuple[nn.Module, LNGD]:
    model = model or core_marian()
    optimizer = LNGD(model, lr=1e-2, **fields)
    core_step(model, optimizer, core_batch())
    return model, optimizer


def refused(state: dict[str, Any], told: str, **fields: Any) -> None:
    """Loading raises, names what differs, and changes nothing."""
    _, optimizer = trained(**fields)
    before = {name: t.clone() for name, t in flat(optimizer.state_dict()).items()}
    with pytest.raises(ValueError, match=told):
        optimizer.load_state_dict(state)
    after = flat(optimizer.state_dict())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_other_configs_models_and_optimizers_are_refused() -> None:
    model, optimizer = trained()
    refused(optimizer.state_dict(), "damping_rho: checkpoint 1.0, here 0.5", damping_rho=0.5)
    _, wide = trained(core_marian(encoder_ffn_dim=32))
    refused(wide.state_dict(), r"fc1.weight: checkpoint \[32, 16\], here \[24, 16\]")
    _, deep = trained(core_marian(encoder_layers=3))
    refused(deep.state_dict(), "layers.2.*here none")
    adamw = torch.optim.AdamW(model.parameters())
    refused(adamw.state_dict(), "another optimizer")
    newer = copy.deepcopy(optimizer.state_dict())
    newer["lngd"]["version"] = 99
    refused(newer, "version 99")


KEYS = list(LNGD(core_marian()).state_dict()["lngd"])


@pytest.mark.parametrize("key", KEYS)
def test_a_state_that_lacks_a_key_is_refused(key: str) -> None:
    _, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    del state["lngd"][key]
    refused(state, key if key != "version" else "another optimizer")


@pytest.mark.parametrize(
    "path",
    [
        ("groups", "model.encoder.layers.0.fc1", "phi"),
        ("layers", "model.encoder.layers.0.fc1", "momentum"),
        ("fallback", "model.encoder.layers.0.fc1.bias", "exp_avg"),
        ("embeddings", "model.shared.weight", "mean"),
    ],
    ids=str,
)
@pytest.mark.parametrize("damage", ["gone", "cut", "no tensor"])
def test_a_damaged_tensor_is_refused(path: tuple[str, str, str], damage: str) -> None:
    _, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    kind, name, key = path
    tensors = state["lngd"][kind][name]
    if damage == "gone":
        del tensors[key]
    else:
        tensors[key] = tensors[key].flatten()[:-1].clone() if damage == "cut" else 3.0
    refused(state, name)


def test_memory_is_what_the_state_takes() -> None:
    model, optimizer = trained()
    usage = optimizer.memory_usage()
    assert usage["total"] == sum(value for key, value in usage.items() if key != "total")
    weights = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.endswith("proj.weight") or ".fc" in name and p.dim() > 1
    )
    assert usage["momentum"] == 8 * weights
    assert usage["embeddings"] >= 16 * model.model.shared.weight.numel()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda s: s["flags"].pop("started"), "flags.started"),
        (lambda s: s["flags"]["inverted"].pop(), "flags.inverted"),
        (lambda s: s["random"].update(cpu=torch.zeros(3)), "damaged"),
        (lambda s: s["random"].update(cpu=None), "damaged"),
        (lambda s: s["fallback"].update(strange={}), "strange"),
        (lambda s: s["embeddings"].clear(), "model.shared.weight"),
        (lambda s: s["topology"][0].pop("members"), "damaged"),
        (lambda s: s["topology"].pop(), "layers differ"),
        (lambda s: s.update(groups=None), "groups: got None, accepted: a dict"),
        (lambda s: s.update(steps=None), "steps"),
    ],
)
def test_damage_within_is_refused_whole(spoil: Any, told: str) -> None:
    _, optimizer = trained(fisher="sampled")
    state = copy.deepcopy(optimizer.state_dict())
    state["lngd"]["steps"] = 77
    spoil(state["lngd"])
    _, other = trained(fisher="sampled")
    refused(state, told, fisher="sampled")
    with pytest.raises(ValueError):
        other.load_state_dict(state)
    assert other._steps == 1


def test_random_states_of_devices_that_are_not_here_are_left_out() -> None:
    _, optimizer = trained(fisher="sampled")
    state = copy.deepcopy(optimizer.state_dict())
    state["lngd"]["random"]["xpu:7"] = torch.zeros(16, dtype=torch.uint8)
    _, other = trained(fisher="sampled")
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["lngd"]["random"]["cpu"], state["lngd"]["random"]["cpu"])


@pytest.mark.parametrize("embedding", ["rotated", "exact", "fallback"])
def test_a_fresh_state_makes_a_trained_optimizer_fresh(embedding: str) -> None:
    fresh = LNGD(core_marian(), lr=1e-2, embedding=embedding).state_dict()
    model, optimizer = trained(embedding=embedding)
    optimizer.load_state_dict(reload(fresh))
    with torch.no_grad():
        for p, start in zip(model.parameters(), core_marian().parameters(), strict=True):
            p.copy_(start)
    core_step(model, optimizer, core_batch())
    plain, _ = trained(embedding=embedding)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_moments_of_parameters_added_later_are_kept() -> None:
    def make() -> tuple[nn.Module, nn.Parameter, LNGD]:
        torch.manual_seed(0)
        model, extra = nn.Sequential(nn.Linear(3, 3)), nn.Parameter(torch.ones(3))
        optimizer = LNGD(model, lr=1e-2)
        optimizer.add_param_group({"params": [extra]})
        return model, extra, optimizer

    def step(model: nn.Module, extra: nn.Parameter, optimizer: LNGD, scale: float) -> None:
        optimizer.zero_grad()
        (model(torch.ones(2, 3)).square().mean() + (extra * scale).square().sum()).backward()
        optimizer.step()

    one, two = make(), make()
    step(*one, 1.0)
    two[0].load_state_dict(one[0].state_dict())
    two[1].data.copy_(one[1].data)
    two[2].load_state_dict(reload(one[2].state_dict()))
    for run in (one, two):
        step(*run, 3.0)
    assert torch.equal(one[1], two[1]) and torch.equal(one[0][0].weight, two[0][0].weight)
