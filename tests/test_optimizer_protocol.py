"""What PyTorch asks of any of its optimizers (ideas of its own tests): groups, rates, closures, hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from hf_lngd import LNGD
from hf_lngd.groups import OWN_GROUPS

FIELDS: dict[str, Any] = {"factor_interval": 2, "inverse_interval": 2, "early_factors": False}


def make(**fields: Any) -> tuple[nn.Sequential, LNGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    return model, LNGD(model, **{"lr": 1e-2, **FIELDS, **fields})


def backward(model: nn.Module, seed: int = 0) -> Tensor:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: LNGD, steps: int = 3, set_to_none: bool = True) -> list[Tensor]:
    for seed in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        backward(model, seed)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_zero_grad_to_none_and_to_zeros_are_the_same_training() -> None:
    assert same(train(*make(), set_to_none=True), train(*make(), set_to_none=False))
    model, optimizer = make()
    backward(model)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    backward(model)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_closure_is_called_once_with_gradients_and_its_loss_is_returned() -> None:
    model, optimizer = make()
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        calls.append(backward(model))
        return calls[-1]

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert len(calls) == 1 and loss is calls[0]
    other, plain = make()
    assert same(train(other, plain, steps=1), [p.detach() for p in model.parameters()])


@pytest.mark.parametrize("direction", ["polar", "gram", "natural"])
def test_a_rate_in_a_tensor_is_a_rate(direction: str) -> None:
    plain = train(*make(direction=direction))
    model, optimizer = make(direction=direction, lr=torch.tensor(1e-2))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, train(model, optimizer), strict=True))
    optimizer.param_groups[0]["lr"].fill_(0.0)  # changed in place, as a compiled loop does
    before = model[0].weight.clone()
    train(model, optimizer, 1)
    assert torch.equal(before, model[0].weight)
    state = copy.deepcopy(optimizer.state_dict())
    again, resumed = make(direction=direction, lr=torch.tensor(0.5))
    resumed.load_state_dict(state)
    assert isinstance(resumed.param_groups[0]["lr"], Tensor) and float(resumed.param_groups[0]["lr"]) == 0.0


def test_a_rate_is_one_number() -> None:
    for bad in (None, "x", torch.ones(2), float("inf"), torch.tensor(-1.0)):
        with pytest.raises(ValueError, match="lr: got .*accepted: a number"):
            make(lr=bad)
    make(lr=torch.ones(1))


def test_groups_that_are_added_late() -> None:
    model, optimizer = make()
    train(model, optimizer, 1)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "weight_decay": 0.0})
    optimizer.zero_grad()
    (backward(model) + extra.square().sum()).backward()
    optimizer.step()
    assert torch.allclose(extra.detach(), torch.full((3,), 0.5))  # AdamW's first step
    assert optimizer.param_groups[-1]["name"] == "added"
    for bad, error in (
        ([extra], TypeError),
        ({"params": [extra]}, ValueError),
        ({"params": [torch.ones(1)[0] * extra]}, ValueError),
    ):
        with pytest.raises(error):
            optimizer.add_param_group(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*OWN_GROUPS, "copied"])
def test_a_group_by_the_name_of_an_own_one_is_refused(name: str) -> None:
    """Whether or not there is one: its parameters would rest, and LNGD's layers take its rate."""
    model, optimizer = make()
    group = {**optimizer.param_groups[0], "params": list(nn.Linear(2, 2).parameters()), "lr": 1e-9}
    if name != "copied":
        group["name"] = name
    groups = list(optimizer.param_groups)
    with pytest.raises(ValueError, match=f"name: got '{group['name']}'.*accepted: another name or none.*AdamW's"):
        optimizer.add_param_group(group)
    assert optimizer.param_groups == groups
    optimizer.add_param_group({**group, "name": "mine"})
    assert optimizer.param_groups[-1]["name"] == "mine"
    assert same(train(model, optimizer), train(*make()))


def test_rates_of_groups_of_their_own() -> None:
    model, optimizer = make()
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 if group["name"] == "lngd" else 0.0
    before = [p.detach().clone() for p in model.parameters()]
    after = train(model, optimizer, 2)
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [p.dim() == 2 for p in model.parameters()]


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("fields", [{"direction": "natural"}, {"momentum_on": "update"}], ids=str)
def test_biases_in_factors_have_a_rate_of_their_own(fields: dict[str, Any], kind: Any) -> None:
    moved = {}
    for share in (1.0, 0.0, 0.25):
        model, optimizer = make(bias="factor", weight_decay=0.0, lr=kind(1e-2), **fields)
        (group,) = (group for group in optimizer.param_groups if group["name"] == "lngd_bias")
        group["lr"] = kind(share * 1e-2)
        before = [p.detach().clone() for p in model.parameters()]
        moved[share] = [b - a for a, b in zip(before, train(model, optimizer, 1), strict=True)]
    for p, whole, none, part in zip(model.parameters(), *moved.values(), strict=True):
        assert whole.any()
        if any(p is bias for bias in group["params"]):
            assert not none.any()
            torch.testing.assert_close(part, 0.25 * whole, rtol=1e-3, atol=1e-7)
        else:
            assert torch.equal(none, whole) and torch.equal(part, whole)
    for group in optimizer.param_groups:  # before a warm-up
        group["lr"] = kind(0.0)
    kept = [p.detach().clone() for p in model.parameters()]
    after = train(model, optimizer, 1)
    assert all(p.isfinite().all() for p in after) and (bool(fields.get("momentum_on")) or same(kept, after))


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, 10, cycle_momentum=False),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "chained": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", [1e-2, "tensor"])
def test_schedulers(name: str, lr: Any) -> None:
    model, optimizer = make(lr=torch.tensor(1e-2) if lr == "tensor" else lr)
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
    for _ in range(4):
        train(model, optimizer, 1)
        scheduler.step()
        rates.append({group["name"]: float(group["lr"]) for group in optimizer.param_groups})
    # one cycle gives all groups one rate
    share = 1.0 if name == "one cycle" else optimizer.config.fallback_lr_scale
    for row in rates:
        assert row == {group: pytest.approx(row["lngd"] * (1 if group == "lngd" else share)) for group in row}
    assert len({row["lngd"] for row in rates}) > 1


@pytest.mark.parametrize("lr", [1e-2, "tensor", "loaded"])
def test_plateau(lr: Any) -> None:
    given = 1e-2 if lr == 1e-2 else torch.tensor(1e-2)
    _, optimizer = make(lr=given)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    if lr == "loaded":  # a state from when groups shared one tensor
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            group["lr"] = given
        optimizer.load_state_dict(state)
    before = [float(group["lr"]) for group in optimizer.param_groups]
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    scheduler.step(1.0)
    scheduler.step(2.0)
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([rate / 10 for rate in before])
    assert float(given) == pytest.approx(1e-2)  # the caller's own is left as it is


def test_hooks_of_steps_and_states() -> None:
    model, optimizer = make()
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append("saved") or state)
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append("loading") or state)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saving", "saved", "loading", "loaded"]


def test_a_state_dict_may_be_copied_and_is_left_as_it_is() -> None:
    model, optimizer = make()
    train(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    keys = list(state)
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    assert list(state) == keys  # nothing was taken out
    kept = {name: value.clone() for name, value in state["lngd"]["layers"]["0"].items()}
    train(other, resumed)
    assert all(torch.equal(kept[name], value) for name, value in state["lngd"]["layers"]["0"].items())  # nor shared


def test_it_can_be_printed_and_profiled() -> None:
    model, optimizer = make()
    assert "LNGD" in repr(optimizer) and "lngd" in repr(optimizer)
    with torch.profiler.profile() as profile:
        train(model, optimizer, 1)
    assert any(event.key == "Optimizer.step#LNGD.step" for event in profile.key_averages())


def test_averages_of_the_weights() -> None:
    model, optimizer = make()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
    assert same(train(*make(), steps=1), train(*make(), steps=1))
    assert all(p.isfinite().all() for p in averaged.parameters())
    before = optimizer._capture.rows_seen
    averaged(torch.randn(2, 4)).sum().backward()
    assert optimizer._capture.rows_seen == before


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: nn.Sequential(nn.Embedding(5, 4, sparse=True)), "0.weight: got an embedding with sparse=True"),
        (lambda: nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64)), "0.weight: got torch.complex64"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "0.weight: got a parameter without a shape yet"),
    ],
)
def test_parameters_that_cannot_be_trained_are_named(model: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LNGD(model())
