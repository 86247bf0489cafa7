"""A step that is left out, by whomever and however its gradients are dropped, leaves nothing behind; micro-batches and
passes that only look do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.checkpoint import checkpoint

from hf_lngd import LNGD

EVERY_STEP: dict[str, Any] = {"factor_interval": 1, "inverse_interval": 1, "matrix_dtype": "full"}
CONFIGS: list[dict[str, Any]] = [
    {},
    {"fisher": "empirical", "direction": "natural"},
    {"direction": "natural", "rate": "adaptive", "rate_rows": 2},
    {"embedding": "exact"},
    {"family": "kfac"},
]
IDS = torch.arange(24).view(3, 2, 4) % 7


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up, self.down = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 3)

        self.reentrant: bool | None = None  # how its middle is checkpointed

    def middle(self, h: Tensor) -> Tensor:
        return torch.tanh(self.up(h))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        kept = self.reentrant is None
        return self.down(self.middle(h) if kept else checkpoint(self.middle, h, use_reentrant=self.reentrant))


class Hidden(torch.optim.Optimizer):
    """A wrapper that passes on what a loop calls, and none of a scaler's questions."""

    def __init__(self, inner: LNGD) -> None:
        self.inner, self.param_groups, self.state, self.defaults = (
            inner, inner.param_groups, inner.state, inner.defaults,
        )  # fmt: skip

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


def by_hand(model: Net, optimizer: LNGD) -> None:
    for p in model.parameters():
        p.grad = None


# How a loop drops gradients.
WAYS: dict[str, Callable[[Net, LNGD], None]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "by hand": by_hand,
}


def backward(call: Callable[[Tensor], Tensor], ids: Tensor, scale: float = 1.0) -> None:
    (call(ids).square().mean() * scale).backward()


def found(model: Net, optimizer: LNGD) -> list[Tensor]:
    state = [value for e in optimizer._embeddings for value in e.state().values()]
    factors = [value for name in ("up", "down") for value in optimizer.factors(name).values()]
    return [*(p.detach() for p in model.parameters()), *factors, *state]


def assert_same(one: list[Tensor], two: list[Tensor]) -> None:
    assert len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_a_loop_that_leaves_a_step_out(fields: dict[str, Any], way: str) -> None:
    results = []
    for spoil in (False, True):
        model = Net()
        optimizer = LNGD(model, lr=1e-2, **EVERY_STEP, **fields)
        for step, ids in enumerate(IDS):
            if step == 1:
                if spoil:  # two micro-batches, and the same again
                    for _ in range(2):
                        backward(model, ids)
                        backward(model, ids + 0, float("nan"))
                        WAYS[way](model, optimizer)
                continue
            backward(model, ids)
            optimizer.step()
            optimizer.zero_grad(set_to_none=way != "optimizer, zeros")
        results.append(found(model, optimizer))
    assert_same(*results)


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_a_scaler_that_sees_a_wrapper_alone(fields: dict[str, Any]) -> None:
    results = []
    for spoil in (False, True):
        model = Net()
        inner = LNGD(model, lr=1e-2, **EVERY_STEP, **fields)
        optimizer = Hidden(inner)
        scaler = GradScaler("cpu", init_scale=8.0, growth_interval=10**6)
        for step, ids in enumerate(IDS):
            if step == 1 and not spoil:
                continue
            scaler.scale(model(ids).square().mean() * (float("inf") if step == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append([value for name in ("up", "down") for value in inner.factors(name).values()])
        assert inner._steps == 2
    assert_same(*results)


@pytest.mark.parametrize("none", [True, False])
@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_micro_batches_are_of_one_step(fields: dict[str, Any], none: bool) -> None:
    results = []
    for parts in (1, 2):
        model = Net().double()
        optimizer = LNGD(model, lr=1e-2, **EVERY_STEP, **{**fields, **({"rate_rows": 1} if "rate" in fields else {})})
        for ids in IDS:
            optimizer.zero_grad(set_to_none=none)
            for part in ids.chunk(parts):
                backward(model, part, 1 / parts)
            optimizer.step()
        results.append(found(model, optimizer))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


def twice_then_back(model: Net, optimizer: LNGD) -> None:
    (model(IDS[0]).square().mean() + model(IDS[1]).square().mean()).backward()


def twice_with_old_gradients_dropped_between(model: Net, optimizer: LNGD) -> None:
    first = model(IDS[0]).square().mean()
    optimizer.zero_grad()
    (first + model(IDS[1]).square().mean()).backward()


def with_a_look_at_gradients(model: Net, optimizer: LNGD) -> None:
    first = model(IDS[0]).square().mean()
    torch.autograd.grad(first, model.up.weight, retain_graph=True)
    (first + model(IDS[1]).square().mean()).backward()


def with_a_look_at_outputs(model: Net, optimizer: LNGD) -> None:
    out = model(IDS[0])
    torch.autograd.grad(out.square().mean(), out, retain_graph=True)
    (out.square().mean() + model(IDS[1]).square().mean()).backward()


def dropped_and_taken_again(model: Net, optimizer: LNGD) -> None:
    first = model(IDS[0]).square().mean()
    first.backward(retain_graph=True)
    optimizer.zero_grad(set_to_none=False)
    first.backward()
    backward(model, IDS[1])


def checkpointed(model: Net, optimizer: LNGD, reentrant: bool = False) -> None:
    model.reentrant = reentrant
    for _ in range(2):  # and of the first two nothing is kept
        optimizer.zero_grad()
        for ids in IDS[:2]:
            backward(model, ids)


def checkpointed_reentrant(model: Net, optimizer: LNGD) -> None:
    checkpointed(model, optimizer, True)


PASSES = [twice_then_back, twice_with_old_gradients_dropped_between, with_a_look_at_gradients, with_a_look_at_outputs,
          dropped_and_taken_again, checkpointed, checkpointed_reentrant]  # fmt: skip


@pytest.mark.parametrize("passes", PASSES, ids=lambda passes: passes.__name__)
def test_passes_whose_gradients_stay_or_never_came_count(passes: Callable[[Net, LNGD], None]) -> None:
    """Both batches: Φ is that of one pass over all of it."""
    model, plain = Net(), Net()
    optimizer, other = LNGD(model, lr=0.0, **EVERY_STEP), LNGD(plain, lr=0.0, **EVERY_STEP)
    passes(model, optimizer)
    optimizer.step()
    backward(plain, IDS[:2].flatten(0, 1))
    other.step()
    for name in ("up", "down"):
        for kind, value in other.factors(name).items():
            torch.testing.assert_close(optimizer.factors(name)[kind], value, msg=f"{name} {kind}")
