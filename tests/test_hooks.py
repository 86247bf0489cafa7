"""Hooks are there when they are needed, hold nothing, and the step never waits for the device."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from core_helpers import core_batch, core_marian, core_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lngd import LNGD


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("fields", [{}, {"direction": "natural"}, {"fisher": "sampled"}, {"direction": "polar"}])
def test_hooks_live_for_factor_steps_only(fields: dict[str, object]) -> None:
    model = core_marian()
    optimizer = LNGD(model, lr=1e-3, factor_interval=3, early_factors=False, **fields)
    attached = []
    for seed in range(7):
        attached.append(hooks(model) > 0)
        core_step(model, optimizer, core_batch(seed))
    assert attached == [True, False, False, True, False, False, True]
    core_step(model, optimizer, core_batch())
    core_step(model, optimizer, core_batch())
    assert hooks(model) > 0
    optimizer.close()
    assert hooks(model) == 0


def test_adaptive_looks_at_every_step_and_exact_embeddings_count() -> None:
    model = core_marian()
    optimizer = LNGD(model, rate="adaptive", direction="natural", factor_interval=9)
    core_step(model, optimizer, core_batch())
    assert hooks(model) > 0
    optimizer.close()
    model = core_marian()
    optimizer = LNGD(model, embedding="exact", factor_interval=9, early_factors=False)
    core_step(model, optimizer, core_batch())
    assert 0 < hooks(model) <= 3
    optimizer.close()
    assert hooks(model) == 0


@pytest.mark.parametrize("fisher", ["expected", "sampled"])
def test_no_activation_is_held(fisher: str) -> None:
    model, batch = core_marian(), core_batch()
    optimizer = LNGD(model, lr=1e-3, fisher=fisher, factor_interval=1)
    for _ in range(2):  # the first forward finds who reads what, the second knows
        seen: list[weakref.ref[Tensor]] = []
        handles = [
            m.register_forward_hook(lambda m, a, o, s=seen: s.extend((weakref.ref(a[0]), weakref.ref(o))))
            for m in model.modules()
            if isinstance(m, nn.Linear)
        ]
        loss = model(**batch).loss
        for handle in handles:
            handle.remove()
        loss.backward()
        del loss
        gc.collect()
        assert seen and all(ref() is None for ref in seen)
        optimizer.step()
        optimizer.zero_grad()


def test_only_training_forwards_count() -> None:
    model, batch = core_marian(), core_batch()
    optimizer = LNGD(model, lr=1e-3)
    with torch.no_grad():
        model(**batch)
    model.generate(batch["input_ids"], max_new_tokens=2)
    optimizer.eval()
    model(**batch)
    optimizer.train()
    assert not optimizer._capture.finish()
    model(**batch)
    assert optimizer._capture.finish()


def test_a_fault_in_the_forward_leaves_capture_usable() -> None:
    model, batch = core_marian(), core_batch()
    optimizer = LNGD(model, lr=1e-3)
    with pytest.raises(IndexError):
        model(input_ids=batch["input_ids"] + 10_000, labels=batch["labels"])
    other = core_batch(1, source=9)  # must be seen with its own masks
    core_step(model, optimizer, other)
    plain = core_marian()
    again = LNGD(plain, lr=1e-3)
    core_step(plain, again, other)
    for name in again._capture.layers:
        assert torch.equal(optimizer.factors(name)["phi"], again.factors(name)["phi"]), name


def test_a_step_that_saw_nothing_says_so() -> None:
    model = nn.Linear(3, 3)
    optimizer = LNGD(model, lr=1e-3)
    optimizer.eval()
    model(torch.ones(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="no forward pass"):
        optimizer.step()
    with pytest.raises(KeyError, match="before the first step"):
        optimizer.factors("")
    with pytest.raises(KeyError, match="no LNGD layer"):
        optimizer.factors("other")


def test_closed_is_closed() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    optimizer = LNGD(model, lr=1e-3, factor_interval=3, early_factors=False)
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    state = optimizer.state_dict()
    optimizer.close()
    model(torch.ones(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.step()
    optimizer.load_state_dict(state)
    assert hooks(model) == 0


@pytest.mark.parametrize("settled", [False, True])
def test_a_copy_of_the_model_is_not_watched(settled: bool) -> None:
    model, batch = core_marian(), core_batch()
    optimizer = LNGD(model, lr=0.0, factor_interval=1)
    if settled:
        core_step(model, optimizer, batch)
    copied = copy.deepcopy(model)  # as a running average of the weights does
    copied(**core_batch(5)).loss.backward()
    assert not optimizer._capture.finish()
    core_step(model, optimizer, batch)
    again = LNGD(model, lr=0.0)
    core_step(model, again, batch)
    for name in again._capture.layers:
        torch.testing.assert_close(optimizer.factors(name)["phi"], again.factors(name)["phi"])


class Strange(nn.Module):
    """An encoder that returns what no other does."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.encoder, self.linear = nn.Module(), nn.Linear(3, 3)
        self.encoder.forward = lambda: output  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        self.encoder()
        return self.linear(x)


@pytest.mark.parametrize("output", [None, (), {}, 3, object()], ids=["none", "tuple", "dict", "number", "object"])
def test_any_encoders_output_will_do(output: object) -> None:
    model = Strange(output)
    optimizer = LNGD(model, lr=1e-3)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()


class NoWaiting(TorchDispatchMode):
    """Fails on whatever would make an accelerator's host wait."""

    waits = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "_to_copy.cpu")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(word in name for word in self.waits):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fields", [{}, {"inverse_root": "newton"}, {"direction": "polar"}, {"direction": "natural"}])
def test_the_step_does_not_wait(fields: dict[str, object]) -> None:
    model = core_marian().float()
    optimizer = LNGD(model, lr=1e-3, factor_interval=50, inverse_interval=50, **fields)
    for seed in range(4):
        model(**core_batch(seed)).loss.backward()
        if seed == 3:
            with NoWaiting():
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
