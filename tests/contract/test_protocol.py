"""What torch asks of any of its optimizers: closures, zeroed gradients, hooks, printing; and no copies of this one."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lngd import LNGD
from tests.helpers import CASES, Case, backward, equal, hooks_of, loss_of, train_step


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


def test_copies_and_pickles_of_the_optimizer_are_refused(case: Case) -> None:
    model, optimizer = case.make()
    train_step(model, optimizer, case.batch())
    ways = (copy.deepcopy, copy.copy, pickle.dumps, lambda o: copy.deepcopy((model, o)),
            lambda o: torch.save({"optimizer": o}, io.BytesIO()))  # fmt: skip
    for way in ways:
        with pytest.raises(TypeError, match="LNGD: got a copy or pickle of the optimizer"):
            way(optimizer)
    train_step(model, optimizer, case.batch(1))


def test_a_copy_of_the_model_holds_no_hooks_that_act(case: Case) -> None:
    """Of a deep copy and of a file: `torch.save` works in a factor step, and the file knows nothing of hf_lngd."""
    model, optimizer = case.make(factor_interval=1)
    train_step(model, optimizer, case.batch())
    assert hooks_of(model) > 0
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"hf_lngd" not in buffer.getvalue()
    buffer.seek(0)
    held = weakref.ref(optimizer)
    copies = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    for other in copies:
        loss_of(other, case.batch(1)).backward()
        again = LNGD(other, lr=1e-3, **case.fields)  # which may have an optimizer of its own
        train_step(other, again, case.batch(1))
        again.close()
    train_step(model, optimizer, case.batch(1))
    twin = case.make(factor_interval=1)
    for seed in range(2):
        train_step(*twin, case.batch(seed))
    assert equal(twin[0], model)
    del optimizer
    gc.collect()
    assert held() is None  # no copy holds it


def test_hooks_go_with_the_optimizer(case: Case) -> None:
    for how in ("closed", "dropped"):
        model, optimizer = case.make(factor_interval=1, embedding="exact")
        train_step(model, optimizer, case.batch())
        held = weakref.ref(optimizer)
        assert hooks_of(model) > 0
        if how == "closed":
            optimizer.close()
            optimizer.close()
            assert hooks_of(model) == 0
            backward(model, optimizer, case.batch(1))
            with pytest.raises(RuntimeError, match="closed"):
                optimizer.step()
        del optimizer
        gc.collect()
        assert hooks_of(model) == 0 and held() is None


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


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: nn.Sequential(nn.Embedding(5, 4, sparse=True)), "0.weight: got an embedding with sparse=True"),
        (lambda: nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64)), "0.weight: got torch.complex64"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "0.weight: got a parameter without a shape yet"),
        (lambda: nn.Sequential(nn.Linear(3, 3).half()), r"0.weight: got a weight of torch.float16.*accepted.*bfloat16"),
    ],
)
def test_parameters_that_cannot_be_trained_are_named(model: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LNGD(model())
    LNGD(nn.Sequential(nn.Linear(3, 3).half().requires_grad_(False), nn.Linear(3, 3)))
