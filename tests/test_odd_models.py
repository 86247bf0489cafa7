"""Models and loops that do what most do not: the statistics are right all the same, and nothing is left behind."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from reference import factors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_lngd import LNGD

FULL = {"chain": "full", "factor_interval": 1, "ema_decay": 0.0}


def modes() -> int:
    return len(torch.overrides._get_current_function_mode_stack())


@pytest.fixture(autouse=True)
def nothing_is_left() -> None:
    before = modes()
    yield
    assert modes() == before


class Recursive(nn.Module):
    """Calls itself, as with self-conditioning; with or without gradients inside."""

    def __init__(self, grad: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.grad = nn.Linear(4, 4, bias=False), grad

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        if depth:
            with torch.set_grad_enabled(self.grad):
                inner = self(10 * x, depth - 1)
            x = x + inner.detach()
        return torch.tanh(self.linear(x))


@pytest.mark.parametrize("grad", [True, False])
def test_a_model_that_calls_itself(grad: bool) -> None:
    model, x = Recursive(grad).double(), torch.randn(6, 4, dtype=torch.float64)
    optimizer = LNGD(model, lr=0.0, **FULL)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
        with torch.no_grad():
            inner = 10 * x
            outer = x + torch.tanh(model.linear(inner))
            calls = [inner, outer] if grad else [outer]  # without gradients it is not trained
            a = torch.cat(calls)
            g2 = (1 - torch.tanh(model.linear(a)).square()).square()
        torch.testing.assert_close(optimizer.factors("linear")["phi"], factors(a, g2)[0])


def test_inference_within_a_training_forward_does_not_count() -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                self.linear(100 * x)
            return self.linear(x)

    model, x = Teacher().double(), torch.randn(6, 4, dtype=torch.float64)
    optimizer = LNGD(model, lr=0.0, **FULL)
    model(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.factors("linear")["phi"], factors(x, torch.ones(6, 4))[0])


def test_transforms_of_torch_func_are_not_watched() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 2)).double(), torch.randn(6, 4).double()
    optimizer = LNGD(model, lr=0.0, **FULL)
    torch.func.vmap(torch.func.jacrev(model))(x)
    torch.func.jvp(model, (x,), (torch.ones_like(x),))
    torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(x)
    model(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.factors("2")["phi"], factors(model[:2](x).detach(), torch.ones(6, 2))[0])


@pytest.mark.parametrize("fields", [{"fisher": "empirical"}, {"rate": "adaptive", "rate_rows": 1}], ids=str)
def test_gradients_that_are_only_looked_at_do_not_count(fields: dict[str, object]) -> None:
    found = []
    for penalty in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(6, 4).double()
        optimizer = LNGD(model, lr=0.0, direction="natural", **fields)
        output = model(x.requires_grad_(penalty))
        if penalty:
            torch.autograd.grad(100 * output.sum(), x, retain_graph=True)
        output.square().mean().backward()
        optimizer.step()
        phi = optimizer.factors("0")["phi"]
        found.append((phi, [float(bank.rate[0]) for bank in optimizer._preconditioner.layer_banks]))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_chain_that_is_finished_holds_nothing() -> None:
    alive: list[list[weakref.ref]] = []
    counts: list[int] = []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            s = self.up(x)
            y = torch.nn.functional.gelu(self.norm(s))
            alive[-1] += [weakref.ref(s), weakref.ref(y)]
            return self.down(y)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            gc.collect()
            counts.append(sum(ref() is not None for ref in alive[-1]))
            return x

    model = Net()
    optimizer = LNGD(model, lr=0.0, **FULL)
    for _ in range(2):
        alive.append([])
        model(torch.randn(5, 8)).sum().backward()
        optimizer.step()
    assert {r.follows for r in optimizer.routing() if r.layer.endswith("up") and r.follows} == {"layer_norm → gelu"}
    assert counts == [6, 0]  # the first step finds out what follows, and holds on until it knows


def test_an_interrupt_leaves_no_mode_behind() -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.stop = nn.Linear(4, 4), True

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            if self.stop:
                raise KeyboardInterrupt
            return y

    model, x = Stopped().double(), torch.randn(3, 4, dtype=torch.float64)
    optimizer = LNGD(model, lr=0.0, **FULL)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert modes() == 1  # no hook sees an interrupt
    optimizer.close()
    assert modes() == 0
    optimizer = LNGD(model, lr=0.0, **FULL)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.stop = False
    for _ in range(2):
        model(x).sum().backward()
        assert modes() == 0 and optimizer._capture.rows_seen == 3
        optimizer.step()
    torch.testing.assert_close(optimizer.factors("linear")["phi"], factors(x, torch.ones(3, 4))[0])


def test_gradients_of_parameters_by_hand() -> None:
    found = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double(), torch.randn(6, 4).double()
        optimizer = LNGD(model, lr=0.0, fisher="empirical", rate="adaptive", rate_rows=1, direction="natural")
        loss = model(x).square().mean()
        if by_hand:
            parameters = list(model.parameters())
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = g
        else:
            loss.backward()
        optimizer.step()
        found.append(optimizer.factors("0")["phi"])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("fields", [{"fisher": "empirical"}, FULL], ids=str)
def test_a_forward_that_raises_is_not_counted(fields: dict[str, object]) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.last, self.fails = nn.Linear(4, 4), nn.Linear(4, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            if self.fails:
                self.fails -= 1
                raise MemoryError
            return self.last(torch.tanh(y))

    x, found = torch.randn(6, 4, dtype=torch.float64), []
    for fails in (0, 1):
        model = Fails().double()
        optimizer = LNGD(model, lr=0.0, direction="natural", **fields)
        model.fails = fails
        try:
            loss = model(x).square().mean()
        except MemoryError:
            loss = model(x).square().mean()  # the retry, within the handler
        loss.backward()
        optimizer.step()
        found.append((optimizer.factors("linear")["phi"], optimizer._capture.topology.of_layer["linear"].links))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_layers_whose_gradients_are_hidden_are_named(fisher: str) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.seen = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.seen(checkpoint(self.hidden, x, use_reentrant=True))

    model = Half()
    optimizer = LNGD(model, lr=1e-3, fisher=fisher, direction="natural")
    logits = model(torch.randn(5, 4, requires_grad=True))
    if fisher == "true":
        optimizer.fisher_backward(logits)
    logits.square().mean().backward()
    with pytest.raises(RuntimeError, match=f"fisher: '{fisher}' saw no gradients of hidden.*use_reentrant=False"):
        optimizer.step()


def test_two_optimizers_on_one_model() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double(), torch.randn(6, 4).double()
    both = [LNGD(model, lr=0.0, **FULL) for _ in range(2)]
    for _ in range(2):
        model(x).sum().backward()
        assert modes() == 0
        for optimizer in both:
            optimizer.step()
    torch.testing.assert_close(both[0].factors("0")["phi"], both[1].factors("0")["phi"])


def test_frames_of_a_video_are_rows_of_their_own() -> None:
    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(2, 4, 3, bias=False), nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:  # [B, T, C, H, W]
            frames = self.conv(x.flatten(0, 1)).mean((2, 3))
            return self.head(frames).unflatten(0, x.shape[:2]).mean(1)

    x = torch.randn(4, 1, 2, 5, 5, dtype=torch.float64).expand(4, 8, 2, 5, 5).contiguous()  # frames alike in a video
    x = x[:1].expand(4, 8, 2, 5, 5).contiguous()
    found = []
    for rows in (1, 4):
        model = Video().double()
        optimizer = LNGD(model, lr=0.0, fisher="empirical", conv_rows=rows, direction="natural")
        model(x).square().sum(1).mean().backward()
        optimizer.step()
        found.append(optimizer.factors("conv")["phi"])
    torch.testing.assert_close(found[0], found[1])


class Logits(nn.Module):
    """A convolution makes the logits of each pixel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, classes, 1, bias=False)
        self.scale = 1.0

    def forward(self, x: Tensor) -> SimpleNamespace:
        logits = self.conv(x)
        return SimpleNamespace(logits=logits if self.scale == 1 else logits.mul_(self.scale))


@pytest.mark.parametrize("classes", [1, 3])
def test_heads_of_pixels(classes: int) -> None:
    model, x = Logits(classes).double(), torch.randn(2, 2, 3, 4, dtype=torch.float64)
    optimizer = LNGD(model, lr=0.0, head="categorical", conv_rows=1)
    logits = model(x).logits
    logits.sum().backward()
    optimizer.step()
    p = logits.detach().softmax(1).movedim(1, -1).flatten(0, -2)
    g2 = p * (1 - p) if classes > 1 else torch.ones_like(p)
    torch.testing.assert_close(optimizer.factors("conv")["phi"], factors(x.movedim(1, -1).flatten(0, -2), g2)[0])


def test_logits_that_are_changed_in_place_are_no_heads_output() -> None:
    model, x = Logits(3).double(), torch.randn(2, 2, 3, 4, dtype=torch.float64)
    model.scale = 10.0
    optimizer = LNGD(model, lr=0.0, head="categorical", conv_rows=1, factor_interval=1)
    for _ in range(2):
        model(x).logits.sum().backward()
        optimizer.step()
    assert {r.follows for r in optimizer.routing()} == {"identity"}


def test_batches_in_lists_are_counted() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 3, bias=False)

        def forward(self, batch: list[Tensor] | Tensor) -> Tensor:
            return self.linear(batch[0] if isinstance(batch, list) else batch)

    x, found = torch.randn(6, 4, dtype=torch.float64), []
    for batch in (x, [x]):
        model = Lists().double()
        optimizer = LNGD(model, lr=0.0, fisher="empirical", direction="natural")
        model(batch).square().sum(1).mean().backward()
        optimizer.step()
        found.append(optimizer.factors("linear")["phi"])
    torch.testing.assert_close(found[0], found[1])
    optimizer = LNGD(model := Lists(), lr=0.0, fisher="empirical")
    model.linear(torch.randn(2, 4)).sum().backward()  # a part of it: how many rows there are is not known
    with pytest.raises(RuntimeError, match="empirical.*set_batch"):
        optimizer.step()


def test_parts_of_a_model_that_are_called_by_themselves_do_not_pile_up() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = LNGD(model, lr=0.0)
    for _ in range(5):
        model[2](model[1](model[0](torch.randn(6, 4)))).sum().backward()
        assert len(optimizer._capture._pending) <= 2
    optimizer.step()
    assert optimizer._capture.topology.of_layer["0"].links == ("Tanh",)
    model[1] = nn.Identity()  # what follows is gone: the chain waits for it
    optimizer._capture.arm(True)
    for _ in range(5):
        model[2](model[0](torch.randn(6, 4))).sum().backward()
        assert len(optimizer._capture._unfinished) <= 1 and len(optimizer._capture._watch._nodes) <= 1


def test_a_transpose_is_a_use_and_a_shape_is_none() -> None:
    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            s = self.linear(x)
            return torch.nn.functional.silu(s) @ s.T

    model = Gram()
    optimizer = LNGD(model, lr=0.0)
    model(torch.randn(6, 4)).sum().backward()
    optimizer.step()
    assert optimizer._capture.topology.of_layer["linear"].links == ()


def test_half_precision_slopes_are_squared_in_full() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * x.new_full((1, 4), 300.0, dtype=torch.float16)

    model, x = Gate(), torch.ones(2, 4)
    optimizer = LNGD(model, lr=0.0, chain="full")
    with torch.autocast("cpu", torch.float16):
        output = model(x)
    assert output.dtype == torch.float16
    output.float().sum().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.factors("linear")["phi"], torch.full((4, 4), 4 * 300.0**2))
