"""The state: per parameter as torch's optimizers have it, exact through files and torch's and accelerate's tools."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from tests.helpers import CASES, Case, assert_identical, equal, tensors_of, through_a_file

MORE: list[tuple[str, dict[str, Any]]] = [
    ("marian", {"direction": "natural", "factor_interval": 3}),
    ("marian", {"embedding": "exact", "momentum_on": "update", "bias": "factor"}),
    ("bfloat16", {"family": "kfac", "bias": "factor"}),
    ("marian", {"preset": "lngd_lr", "factor_interval": 3}),
    ("marian", {"family": "ekfac", "inverse_interval": 3}),
    ("marian", {"family": "tkfac", "fisher": "true", "preset": "paper", "inverse_interval": 3}),
    ("marian", {"family": "ng+", "inverse_interval": 3, "bias": "factor", "max_factor_dim": 10}),
]


@pytest.mark.parametrize(("name", "fields"), [*((name, {}) for name in CASES), *MORE], ids=str)
def test_a_saved_state_goes_on_bit_for_bit(name: str, fields: dict[str, Any]) -> None:
    case = CASES[name]
    if "inverse_interval" in fields:
        case = Case(name, case.build, case.batch_of, case.fields, torch.float32)
    model, optimizer = case.make(**fields)
    case.train(model, optimizer, range(4))
    other, resumed = case.make(seed=9, lr=0.3, **fields)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_identical(resumed.state_dict(), optimizer.state_dict())
    for run in ((model, optimizer), (other, resumed)):
        case.train(*run, range(4, 8))
    assert equal(model, other)


def test_a_loaded_state_is_left_as_it_is_and_not_shared(case: Case) -> None:
    model, optimizer = case.make()
    case.train(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    kept, keys = copy.deepcopy(state), list(state)
    other, resumed = case.make()
    resumed.load_state_dict(state)
    case.train(other, resumed)
    assert list(state) == keys
    assert_identical(state, kept)


def test_the_state_stands_with_each_parameter(case: Case) -> None:
    """As with torch's optimizers: every trained parameter has its own, of tensors."""
    model, optimizer = case.make()
    assert not optimizer.state
    case.train(model, optimizer)
    assert set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}
    assigned = {route.parameter: route for route in optimizer.routing()}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        own = optimizer.state[p]
        assert "embedding" in assigned[name].reason or int(own["step"]) == 3, name
        if assigned[name].owner != "lngd":
            assert own["exp_avg"].shape == own["exp_avg_sq"].shape == p.shape, name
        else:
            assert own["momentum"].shape == p.shape, name
        assert ("lost" in own) == (p.dtype == torch.bfloat16), name
        kinds = {value.dtype for key, value in own.items() if key not in ("lost", "whitener", "psi_whitener")}
        assert torch.bfloat16 not in kinds, name
        assert own.get("lost", p).dtype == p.dtype


def test_layers_that_share_an_input_share_their_curvature() -> None:
    model, optimizer = CASES["marian"].make()
    CASES["marian"].train(model, optimizer)
    attention = model.model.encoder.layers[0].self_attn
    query, key = (optimizer.state[layer.weight] for layer in (attention.q_proj, attention.k_proj))
    for kind in ("phi", "whitener"):
        assert query[kind].data_ptr() == key[kind].data_ptr() and query[kind].dim() == 2
    assert query["momentum"].data_ptr() != key["momentum"].data_ptr()


def test_memory_is_what_the_state_takes(case: Case) -> None:
    model, optimizer = case.make()
    assert optimizer.memory_usage()["total"] == 0
    case.train(model, optimizer)
    usage = optimizer.memory_usage()
    assert usage["total"] == sum(value for key, value in usage.items() if key != "total")
    layers = [r.parameter for r in optimizer.routing() if r.owner == "lngd" and "embedding" not in r.reason]
    wide = 4 if case.dtype == torch.bfloat16 else 8
    assert usage["momentum"] == wide * sum(model.get_parameter(name).numel() for name in layers)
    if case.dtype == torch.bfloat16:
        assert usage["rounding"] == 2 * sum(p.numel() for p in model.parameters())


# Draws belong to the step that hooks were attached for, which a cleared state cannot take back.
def undrawn(case: Case) -> dict[str, Any]:
    return {} if "family" in case.fields else {"fisher": "expected"}


@pytest.mark.parametrize("how", ["assigned", "cleared"])
def test_without_its_state_an_optimizer_begins_anew(case: Case, how: str) -> None:
    model, optimizer = case.make(**undrawn(case))
    case.train(model, optimizer, range(4))  # a factor step comes next
    twin, fresh = case.make(**undrawn(case))
    twin.load_state_dict(model.state_dict())
    if how == "assigned":
        optimizer.state = defaultdict(dict)
    else:
        optimizer.state.clear()
    for run in ((model, optimizer), (twin, fresh)):
        case.train(*run, range(5, 8))
    assert equal(model, twin)


def test_a_fresh_state_makes_a_trained_optimizer_fresh(case: Case) -> None:
    _, unused = case.make()
    model, optimizer = case.make()
    case.train(model, optimizer)
    optimizer.load_state_dict(through_a_file(unused.state_dict()))
    model.load_state_dict(case.model().state_dict())
    plain = case.make()
    for run in ((model, optimizer), plain):
        case.train(*run)
    assert equal(model, plain[0])


# torch's and accelerate's tools


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_torchs_distributed_state_dict(case: Case, flatten: bool) -> None:
    """`get_optimizer_state_dict` has all of it under names of parameters, and `set_…` brings it back."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = case.make()
    case.train(model, optimizer)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other, resumed = case.make(lr=0.3)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, state, options=options)
    assert_identical(tensors_of(resumed.state_dict()), tensors_of(optimizer.state_dict()))
    for run in ((model, optimizer), (other, resumed)):
        case.train(*run, range(3, 7))
    assert equal(model, other)


def test_accelerates_saved_states(case: Case, tmp_path: Path) -> None:
    found = []
    for resume in (False, True):
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(*case.make(seed=int(resume)))
        if resume:
            accelerator.load_state(str(tmp_path))
        else:
            case.train(model, optimizer)
            accelerator.save_state(str(tmp_path))
        case.train(model, optimizer, range(3, 6))
        found.append(accelerator.unwrap_model(model))
    assert equal(*found)
