"""torch.compile: the same factors as without, one graph however often LNGD collects, names from before."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hf_lngd import LNGD
from hf_lngd.torch_internals import stop_running_eagerly
from tests.helpers import CASES, distance, equal, factors_of, hooks_of, seeded, tensors_of, weights_of

# A table that counts tokens runs eagerly always: see test_what_needs_every_step_runs_eagerly.
OFTEN: dict[str, Any] = {"lr": 1e-2, "factor_interval": 3, "inverse_interval": 3, "embedding": "fallback"}
EAGER, DEFAULT = "force_eager", "default"


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code, and no optimizers that other tests left."""
    stop_running_eagerly()
    torch._dynamo.reset()
    counters.clear()
    assert stance() == DEFAULT
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.encoder, self.head = nn.Embedding(9, 6), nn.Sequential(Block(), Block()), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.table(ids)))


Net = lambda: seeded(Stack)  # noqa: E731


def ids_of(step: int) -> Tensor:
    return torch.randint(0, 9, (8, 4), generator=torch.Generator().manual_seed(step))


def stepping(model: nn.Module, call: Callable[[Tensor], Tensor], optimizer: LNGD, steps: range = range(11)) -> None:
    for step in steps:
        call(ids_of(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (stance() == EAGER) == bool(hooks_of(model))


def made_before(model: nn.Module, **fields: Any) -> tuple[Any, LNGD]:
    optimizer = LNGD(model, **fields)
    return torch.compile(model, backend="aot_eager"), optimizer


def made_of_the_compiled(model: nn.Module, **fields: Any) -> tuple[Any, LNGD]:
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    return compiled, LNGD(compiled, **fields)


def made_after(model: nn.Module, **fields: Any) -> tuple[Any, LNGD]:
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.zeros(8, 4, dtype=torch.int64)).sum().backward()  # it is compiled without hooks
    model.zero_grad()
    return compiled, LNGD(model, **fields)


def in_place(model: nn.Module, **fields: Any) -> tuple[Any, LNGD]:
    model.compile(backend="aot_eager", fullgraph=True)
    return model, LNGD(model, **fields)


WAYS = [made_before, made_of_the_compiled, made_after, in_place]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_factors_and_weights_are_those_of_eager_runs_and_nothing_is_compiled_twice(way: Any) -> None:
    eager, model = Net(), Net()
    plain = LNGD(eager, **OFTEN)
    stepping(eager, eager, plain)
    plain.close()
    call, optimizer = way(model, **OFTEN)
    stepping(model, call, optimizer)
    assert counters["stats"]["unique_graphs"] == 1 and counters["frames"]["total"] <= 1
    assert not counters["graph_break"]
    expected, found = factors_of(plain), factors_of(optimizer)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    for one, two in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    optimizer.close()
    assert stance() == DEFAULT


@pytest.mark.parametrize("fields", [{}, {"preset": "paper", "fisher": "expected", "rate": "rms"}], ids=str)
def test_a_translation_model_with_its_masks(fields: dict[str, Any]) -> None:
    """With as many graphs as under another optimizer: one, or more in versions that break the model's."""
    case, found = CASES["marian"], []
    alone = case.model()
    case.train(torch.compile(alone, backend="aot_eager"), torch.optim.SGD(alone.parameters(), lr=1e-2), range(8))
    graphs = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()
    for compiled in (False, True):
        model, optimizer = case.make(**fields, **OFTEN)
        case.train(torch.compile(model, backend="aot_eager") if compiled else model, optimizer, range(8))
        found.append({**weights_of(model), **factors_of(optimizer)})
        optimizer.close()
    assert 0 < counters["stats"]["unique_graphs"] == graphs
    assert distance(found[1], found[0]) < 1e-6


@pytest.mark.parametrize("fields", [{"rate": "adaptive", "direction": "natural"}], ids=str)
def test_what_needs_every_step_runs_eagerly_and_so_is_exact(fields: dict[str, Any]) -> None:
    found = []
    for compiled in (False, True):
        model = Net()
        optimizer = LNGD(model, **{**OFTEN, **fields})
        stepping(model, torch.compile(model, backend="aot_eager") if compiled else model, optimizer, range(5))
        assert not counters["stats"]["unique_graphs"] and stance() == EAGER
        optimizer.close()
        found.append(model)
    assert equal(*found) and stance() == DEFAULT


def test_evaluation_and_what_comes_after_run_compiled() -> None:
    model = Net()
    optimizer, other = LNGD(model, lr=1e-2), LNGD(Net(), lr=1e-2)
    assert stance() == EAGER
    optimizer.eval()
    assert stance() == EAGER  # the other's
    other.close()
    assert stance() == DEFAULT
    optimizer.train()
    assert stance() == EAGER
    del optimizer, model
    gc.collect()
    assert stance() == DEFAULT
    with torch.compiler.set_stance("eager_on_recompile"):
        third = LNGD(Net(), lr=1e-2)
        assert stance() == EAGER
        third.close()
        assert stance() == "eager_on_recompile"


@pytest.mark.parametrize("close", ["within", "after"])
@pytest.mark.parametrize("each", [False, True], ids=["around all steps", "around each step"])
def test_a_stance_of_the_users_around_steps_leaves_nothing_behind(each: bool, close: str) -> None:
    """LNGD puts its stance there before, so the end of the `with` puts it back after LNGD wanted it."""
    model = Net()
    optimizer = LNGD(model, lr=1e-2, embedding="fallback", factor_interval=20)
    done = 0
    for _ in range(6 if each else 1):
        with torch.compiler.set_stance("eager_on_recompile"):
            for _ in range(1 if each else 6):
                model(ids_of(done)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                assert stance() == (EAGER if hooks_of(model) else "eager_on_recompile")
            if close == "within" and done == 6:
                optimizer.close()
                assert stance() == "eager_on_recompile"
        assert stance() == (EAGER if hooks_of(model) else DEFAULT)
    assert stance() == DEFAULT  # the next factor step is the 20th
    optimizer.close()
    assert stance() == DEFAULT
    model.compile(backend="aot_eager")
    model(torch.zeros(2, 4, dtype=torch.int64))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("at", [0, 4], ids=["in a factor step", "in another"])
def test_a_stance_that_the_user_sets_in_mid_training_stays(at: int) -> None:
    model = Net()
    optimizer = LNGD(model, **OFTEN)
    try:
        for step in range(11):
            if step == at:
                torch.compiler.set_stance("default", skip_guard_eval_unsafe=True, force_backend="eager")
            stepping(model, model, optimizer, range(step, step + 1))
        optimizer.close()
        found = torch._dynamo.eval_frame._stance
        assert (found.stance, found.skip_guard_eval_unsafe, found.backend) == (DEFAULT, True, "eager")
    finally:
        torch.compiler.set_stance(DEFAULT)


def test_a_stance_that_keeps_compiled_code_from_being_seen_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(8, 4)
    call = torch.compile(model, backend="aot_eager")
    call(x).sum().backward()
    optimizer = LNGD(model)
    with torch.compiler.set_stance("eager_on_recompile"):
        call(x).sum().backward()
        optimizer.step()
        message = next(text for text in caplog.messages if text.startswith("LNGD"))
        assert "no forward pass was seen" in message
        assert "without torch.compiler.set_stance, got 'eager_on_recompile'" in message
        call(x).sum().backward()  # from now on it is seen
        optimizer.step()
        assert not optimizer.core.capture.topology.unseen
    optimizer.close()
    assert stance() == DEFAULT


def test_names_and_states_are_those_from_before() -> None:
    def make(how: str) -> tuple[Any, LNGD]:
        model: Any = Net()
        if how == "parts":
            model.encoder = torch.compile(model.encoder, backend="aot_eager")
            model.head = torch.compile(model.head, backend="aot_eager")
        if how == "whole":
            model = torch.compile(model, backend="aot_eager")
        return model, LNGD(model, **OFTEN)

    states = {}
    for how in ("plain", "parts", "whole"):
        model, optimizer = make(how)
        for _ in range(2):
            model(torch.arange(8).view(2, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        states[how] = copy.deepcopy(optimizer.state_dict())
        assert "_orig_mod" not in str(states[how])
        assert not any("_orig_mod" in route.parameter + route.layer for route in optimizer.routing())
        optimizer.close()
    expected = tensors_of(states["plain"])
    for here in states:
        for state in states.values():
            _, optimizer = make(here)
            optimizer.load_state_dict(state)
            found = tensors_of(optimizer.state_dict())
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
            optimizer.close()


def test_a_whole_training_step_that_is_compiled() -> None:
    found = []
    for compiled in (False, True):
        model = Net()
        optimizer = LNGD(model, **OFTEN)

        def step(ids: Tensor, model: Any = model, optimizer: LNGD = optimizer) -> None:
            model(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        call = torch.compile(step, backend="aot_eager") if compiled else step
        for seed in range(8):
            call(ids_of(seed))
        optimizer.close()
        found.append(weights_of(model))
    assert counters["stats"]["unique_graphs"] == 1
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)
