"""What torch asks of any of its optimizers: closures, zeroed gradients, hooks, printing; and no copies of this one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import CASES, Case, backward, equal, loss_of, train_step


def test_zero_grad_to_none_and_to_zeros_are_the_same_training(case: Case) -> None:
    plain, (model, optimizer) = case.make(), case.make()
    for seed in range(3):
        optimizer.zero_grad(set_to_none=False)
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        backward(model, optimizer, case.batch(seed))
        optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    case.train(*plain)
    assert equal(plain[0], model)


def test_a_closure_is_called_once_with_gradients_and_its_loss_is_returned(case: Case) -> None:
    model, optimizer = case.make()
    calls: list[Tensor] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        calls.append(loss_of(model, case.batch()))
        calls[-1].backward()
        return calls[-1]

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert len(calls) == 1 and loss is calls[0]
    plain = case.make()
    backward(*plain, case.batch())
    assert plain[1].step() is None
    assert equal(plain[0], model)


def test_hooks_of_steps_and_states(case: Case) -> None:
    model, optimizer = case.make()
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append("saved") or state)
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append("loading") or state)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    train_step(model, optimizer, case.batch())
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saving", "saved", "loading", "loaded"]


def test_it_can_be_printed_and_profiled(case: Case) -> None:
    model, optimizer = case.make()
    assert "LNGD" in repr(optimizer) and "lngd" in repr(optimizer)
    with torch.profiler.profile() as profile:
        train_step(model, optimizer, case.batch())
    assert any(event.key == "Optimizer.step#LNGD.step" for event in profile.key_averages())


def test_what_it_tells_before_the_first_step() -> None:
    model, optimizer = CASES["images"].make()
    with pytest.raises(KeyError, match="before the first step"):
        optimizer.factors("head")
    with pytest.raises(KeyError, match="no LNGD layer 'other'; there are: first, grouped, head"):
        optimizer.factors("other")
    assert "head.weight" in optimizer.routing_table()
    CASES["images"].train(model, optimizer)
    numbers = optimizer.diagnostics()
    assert numbers["skipped_gradients"] == numbers["skipped_factors"] == numbers["failed_inverses"] == 0
