"""Statistics are of exactly the forward passes whose gradients a step uses, whatever else the model is called for.

Random sequences of passes, against a float64 twin that knows which of them count."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_lngd import LNGD
from tests.helpers import EVERY_STEP, factors_of, seeded

ALL = ("up", "down")


class Net(nn.Module):
    """Two layers, of which the first's input is the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)
        self.how: Callable[..., Tensor] | None = None

    def inner(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.how is None else self.how(self.inner, x)


class Offloaded(torch.autograd.Function):
    """A checkpoint function as other libraries write one: nothing of torch's own is in it."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(x)
        torch.autograd.backward(out, gradient)
        return None, x.grad


# Each pass: (model, optimizer, batch) → the layers of which it counts.


def loss(model: Net, x: Tensor) -> Tensor:
    return model(x).square().sum()


def trained(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    loss(model, x).backward()
    return ALL


def without_backward(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    loss(model, x)
    return ()


def without_gradients(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    with torch.no_grad():
        loss(model, x)
    return ()


def in_another_thread(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    """While the model runs here, too."""

    def beside(run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        model.how = None
        thread = threading.Thread(target=without_gradients, args=(model, optimizer, x * 3))
        thread.start()
        thread.join()
        return run(batch)

    model.how = beside
    return trained(model, optimizer, x)


def evaluated(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    optimizer.eval()
    loss(model, x)
    optimizer.train()
    return ()


def trained_in_evaluation_mode(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    model.eval()
    return trained(model, optimizer, x)


def one_layer_frozen(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    model.down.requires_grad_(False)
    loss(model, x).backward()
    model.down.requires_grad_(True)
    return ("up",)


def first_layer_alone(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    model.up(x).square().sum().backward()
    return ("up",)


def checkpointed(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    model.how = lambda run, batch: checkpoint(run, batch, use_reentrant=False)
    return trained(model, optimizer, x)


def checkpointed_reentrant(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    model.how = lambda run, batch: checkpoint(run, batch, use_reentrant=True)
    return trained(model, optimizer, x.clone().requires_grad_())


def whole_model_checkpointed(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    for reentrant in (True, False):
        checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    return (*ALL, *ALL)


def offloaded(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    model.how = Offloaded.apply
    return trained(model, optimizer, x.clone().requires_grad_())


def gradients_cached(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    """sentence-transformers' cached losses: outputs without a graph, and the real forward pass in a backward hook."""
    with torch.no_grad():
        outputs = model(x)
    outputs.requires_grad_()
    value = outputs.square().sum()

    def again(gradient: Tensor) -> None:
        with torch.enable_grad():
            (model(x) * (2 * outputs.detach())).sum().backward()

    value.register_hook(again)
    value.backward()
    return ALL


def two_backward_passes(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    value = loss(model, x)
    value.backward(retain_graph=True)
    value.backward()
    return ALL


def two_forward_passes(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    (loss(model, x) + loss(model, x)).backward()
    return (*ALL, *ALL)


def gradient_of_the_input(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    x = x.clone().requires_grad_()
    torch.autograd.grad(loss(model, x), x)
    return ()


def functional(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    weights = dict(model.named_parameters())
    torch.func.grad(lambda w: torch.func.functional_call(model, w, (x,)).square().sum())(weights)
    torch.func.vmap(model)(x)
    return ()


def traced(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    torch.jit.trace(model, x)
    return ()


def interrupted(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    def fails(run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        run(batch)
        raise KeyboardInterrupt

    model.how = fails
    with pytest.raises(KeyboardInterrupt):
        model(x)
    return ()


def dropped(model: Net, optimizer: LNGD, x: Tensor) -> tuple[str, ...]:
    """With everything before it in the step."""
    loss(model, x).backward()
    optimizer.zero_grad()
    return ("dropped",)


PASSES = [
    trained, without_backward, without_gradients, in_another_thread, evaluated, trained_in_evaluation_mode,
    one_layer_frozen, first_layer_alone, checkpointed, checkpointed_reentrant, whole_model_checkpointed, offloaded,
    gradients_cached, two_backward_passes, two_forward_passes, gradient_of_the_input, functional, traced, interrupted,
    dropped,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from(PASSES), max_size=5), min_size=1, max_size=3))
def test_factors_are_of_the_passes_that_the_step_uses(steps: list[list[Any]]) -> None:
    model = seeded(Net).double()
    optimizer = LNGD(model, lr=0.0, **{**EVERY_STEP, "ema_decay": 0.0})
    draw = torch.Generator().manual_seed(0)
    expected = {"up": torch.eye(4), "down": torch.eye(6)}
    for passes in steps:
        inputs: dict[str, list[Tensor]] = {"up": [], "down": []}
        for one in passes:
            x = torch.randn(5, 4, dtype=torch.float64, generator=draw)
            counted = one(model, optimizer, x)
            model.how = None
            model.train()
            if counted == ("dropped",):
                inputs = {"up": [], "down": []}
                continue
            for name in counted:
                inputs[name].append(x if name == "up" else torch.tanh(F.linear(x, model.up.weight, model.up.bias)))
        optimizer.step()
        optimizer.zero_grad()
        for name, own in inputs.items():
            if own:
                a = torch.cat(own).detach()
                expected[name] = a.T @ a / len(a)
    for name, value in expected.items():
        found = optimizer.factors(name)["phi"] if optimizer.core.batches else None
        m = optimizer.core.capture.layers[name].m
        if found is not None:
            torch.testing.assert_close(found, m * value.double(), msg=name)


def test_an_unseen_layer_trains_with_white_inputs(caplog: pytest.LogCaptureFixture) -> None:
    """Told once by name; what it then does is what a layer with Φ = I does."""

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.normalize(self.body(x)), F.normalize(self.head.weight))

    model = seeded(Normalised).double()
    optimizer, x = LNGD(model, lr=1e-2, factor_interval=1), torch.randn(6, 4, dtype=torch.float64)
    start = model.head.weight.detach().clone()
    for _ in range(3):
        model(x)[:, 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(optimizer.factors("head")["phi"], 3 * torch.eye(8).double())
    assert (model.head.weight - start).norm() > 1e-3
    assert [m for m in caplog.messages if "'head'" in m and "Φ = I" in m] == caplog.messages and len(
        caplog.messages
    ) == 1


class Dropping(nn.Module):
    """Eight layers of which each is left out at every other call, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))
        self.head, self.forgotten = nn.Linear(6, 2), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if torch.rand(()) < 0.5:
                x = torch.tanh(layer(x))
        return self.head(x)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("interval", [1, 20])
def test_layers_without_a_gradient_are_named_once_and_layerdrop_is_not(
    interval: int, set_to_none: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(Dropping)
    optimizer, said = LNGD(model, lr=1e-3, factor_interval=interval), []
    for _ in range(45):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none)
        said.append(len(caplog.messages))
    assert said[18] == 0 and said[19] == 1 == said[-1], caplog.messages
    assert "layers had no gradient in 20 steps and are as they were: 'forgotten'. The" in caplog.messages[0]


def test_many_untrained_parameters_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(Dropping)
    model.layers.requires_grad_(False)
    optimizer = LNGD(model, lr=1e-3)
    model.layers.requires_grad_(True)
    for _ in range(2):
        torch.stack([layer(torch.randn(4, 6)).sum() for layer in model.layers]).sum().backward()
        optimizer.step()
    (message,) = caplog.messages
    assert "not trained: 'layers.0.weight', 'layers.0.bias', " in message and " and 11 more. They" in message


@pytest.mark.parametrize("odd", ["sparse", "jagged"])
def test_inputs_without_strides(odd: str, caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 4), nn.Tanh()))
    optimizer = LNGD(model, lr=1e-2)
    x: Tensor = (torch.rand(16, 8) > 0.7).float().to_sparse()
    if odd == "jagged":
        x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)
    y, before = model(x), model[0].weight.detach().clone()
    (y.values() if y.is_nested else y).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert len(caplog.messages) == 1 and "'0'" in caplog.messages[0]


def test_convolutions_draw_their_samples_from_passes_that_count() -> None:
    found = []
    for beside in (False, True):
        model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))).double()
        optimizer, draw = LNGD(model, lr=0.0), torch.Generator().manual_seed(0)
        for _ in range(3):
            model(torch.randn(5, 2, 5, 5, dtype=torch.float64, generator=draw)).square().sum().backward()
            if beside:
                model(torch.ones(3, 2, 5, 5, dtype=torch.float64))
        optimizer.step()
        found.append(factors_of(optimizer))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripting_says_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    optimizer = LNGD(model)
    with pytest.raises(AttributeError, match="optimizer.close"):
        torch.jit.script(model)
    optimizer.close()
    torch.jit.script(model)
