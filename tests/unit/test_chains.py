"""What follows a layer is found by the identity of tensors, and differentiated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_lngd import LNGD
from hf_lngd.paper.chains import Chain, ChainWatch, activation_derivative, is_elementwise
from tests.helpers import EVERY_STEP
from tests.reference import factors

Body = Callable[["Net", Tensor, Tensor], Tensor]


class Net(nn.Module):
    """A layer, what a case makes of its output, and a linear layer that ends every chain."""

    def __init__(self, body: Body, conv: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 4, 3, bias=False) if conv else nn.Linear(5, 4, bias=False)
        self.batch_norm = nn.BatchNorm2d(4) if conv else nn.BatchNorm1d(4)
        self.layer_norm, self.group_norm, self.rms_norm = nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)
        self.relu, self.silu, self.dropout = nn.ReLU(inplace=True), nn.SiLU(), nn.Dropout(0.0)
        self.scale = nn.Parameter(torch.linspace(1, 2, 4))
        self.other = nn.Linear(5, 4, bias=False)
        self.last = nn.Linear(4, 2)
        for norm in (self.batch_norm, self.layer_norm, self.group_norm, self.rms_norm):
            nn.init.uniform_(norm.weight, 0.5, 2)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self, x, self.layer(x))
        return self.last(y.movedim(1, -1) if isinstance(self.layer, nn.Conv2d) else y)


def gamma(norm: nn.Module, s: Tensor, over: list[int], shape: tuple[int, ...] = (-1,)) -> Tensor:
    return norm.weight.view(shape) / (s.var(over, correction=0, keepdim=True) + norm.eps).sqrt()


def silu_slope(s: Tensor) -> Tensor:
    return s.sigmoid() * (1 + s * (1 - s.sigmoid()))


def residual(net: Net, x: Tensor, s: Tensor) -> Tensor:
    y = net.batch_norm(s)
    y += x[:, :1, 1:-1, 1:-1]
    return net.relu(y)


def residual_slope(net: Net, x: Tensor, s: Tensor) -> Tensor:
    y = F.batch_norm(s, None, None, net.batch_norm.weight, net.batch_norm.bias, True)
    return gamma(net.batch_norm, s, [0, 2, 3], (1, 4, 1, 1)) * (y + x[:, :1, 1:-1, 1:-1] > 0)


def eval_norm(net: Net, x: Tensor, s: Tensor) -> Tensor:
    return F.batch_norm(s, torch.zeros(4).double(), torch.linspace(1, 2, 4).double(), net.scale, None)


def channels_last(net: Net, x: Tensor, s: Tensor) -> Tensor:
    return net.silu(net.layer_norm(s.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def channels_last_slope(net: Net, x: Tensor, s: Tensor) -> Tensor:
    y = net.layer_norm(s.permute(0, 2, 3, 1))
    slope = silu_slope(y) * gamma(net.layer_norm, s.permute(0, 2, 3, 1), [3])
    return slope.permute(0, 3, 1, 2)


def group_slope(net: Net, x: Tensor, s: Tensor) -> Tensor:
    grouped = s.unflatten(1, (2, 2))
    sigma = (grouped.var([2, 3, 4], correction=0, keepdim=True) + net.group_norm.eps).sqrt()
    return net.group_norm.weight.view(1, 4, 1, 1) / sigma.expand_as(grouped).flatten(1, 2)


# body, φ' by hand, links, convolution
CASES: dict[str, tuple[Body, Body, tuple[str, ...], bool]] = {
    "batch norm, relu": (
        lambda n, x, s: n.relu(n.batch_norm(s)),
        lambda n, x, s: (
            gamma(n.batch_norm, s, [0, 2, 3], (1, 4, 1, 1))
            * (F.batch_norm(s, None, None, n.batch_norm.weight, n.batch_norm.bias, True) > 0)
        ),
        ("batch_norm", "ReLU"),
        True,
    ),
    "residual in place": (residual, residual_slope, ("batch_norm", "sum", "ReLU"), True),
    "running statistics": (
        eval_norm,
        lambda n, x, s: (n.scale / (torch.linspace(1, 2, 4).double() + 1e-5).sqrt()).view(1, 4, 1, 1),
        ("batch_norm",),
        True,
    ),
    "channels last": (channels_last, channels_last_slope, ("layout", "layer_norm", "SiLU"), True),
    "group norm": (lambda n, x, s: n.group_norm(s), group_slope, ("group_norm",), True),
    "flattened": (
        lambda n, x, s: torch.sigmoid(s.flatten(1)).view(s.shape),
        lambda n, x, s: s.sigmoid() * (1 - s.sigmoid()),
        ("layout", "sigmoid"),
        True,
    ),
    "rms norm": (
        lambda n, x, s: n.rms_norm(s),
        lambda n, x, s: n.rms_norm.weight / (s.square().mean(1, True) + torch.finfo(s.dtype).eps).sqrt(),
        ("rms_norm",),
        False,
    ),
    "post-norm residual": (
        lambda n, x, s: n.layer_norm(n.dropout(s) + x[:, :4]),
        lambda n, x, s: gamma(n.layer_norm, s + x[:, :4], [1]),
        ("dropout", "sum", "layer_norm"),
        False,
    ),
    "functional in place": (
        lambda n, x, s: F.relu_(s * 1.0),
        lambda n, x, s: (s > 0).double(),
        ("scale", "relu"),
        False,
    ),
    "tanh method, scaled": (
        lambda n, x, s: (s / 2).tanh(),
        lambda n, x, s: (1 - (s / 2).tanh().square()) / 2,
        ("scale", "tanh"),
        False,
    ),
    "up of a gate": (lambda n, x, s: n.silu(n.other(x)) * s, lambda n, x, s: F.silu(n.other(x)), ("product",), False),
    "gate": (
        lambda n, x, s: n.silu(s) * n.other(x),
        lambda n, x, s: silu_slope(s) * n.other(x),
        ("SiLU", "product"),
        False,
    ),
    "parameter, then activation": (
        lambda n, x, s: F.gelu(n.scale * s, approximate="tanh"),
        lambda n, x, s: (
            n.scale
            * torch.func.vmap(torch.func.vmap(torch.func.grad(lambda z: F.gelu(z, approximate="tanh"))))(n.scale * s)
        ),
        ("scale", "gelu"),
        False,
    ),
    "nothing after the activation": (
        lambda n, x, s: n.layer_norm(n.silu(s) + x[:, :4]),
        lambda n, x, s: silu_slope(s),
        ("SiLU",),
        False,
    ),
    "sum at the end": (lambda n, x, s: s + x[:, :4], lambda n, x, s: torch.ones_like(s), (), False),
    "used twice": (lambda n, x, s: n.silu(s) + s, lambda n, x, s: torch.ones_like(s), (), False),
    "used twice, later": (
        lambda n, x, s: n.silu(y := n.layer_norm(s)) + y,
        lambda n, x, s: gamma(n.layer_norm, s, [1]),
        ("layer_norm",),
        False,
    ),
    "unknown function": (lambda n, x, s: s.softmax(-1), lambda n, x, s: torch.ones_like(s), (), False),
    "split in two": (
        lambda n, x, s: torch.cat([p.relu() for p in s.chunk(2, -1)], -1),
        lambda n, x, s: torch.ones_like(s),
        (),
        False,
    ),
    "itself squared": (lambda n, x, s: s * s, lambda n, x, s: torch.ones_like(s), (), False),
    "a question is no use": (
        lambda n, x, s: n.silu(s) if s.isfinite().all() and s.shape[0] and s.dim() else s,
        lambda n, x, s: silu_slope(s),
        ("SiLU",),
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_factors_follow_the_chain(case: str) -> None:
    body, slope, links, conv = CASES[case]
    model = Net(body, conv).double()
    torch.manual_seed(1)
    x = torch.rand(4, 3, 6, 6, dtype=torch.float64) - 0.5 if conv else torch.rand(9, 5, dtype=torch.float64) - 0.5
    optimizer = LNGD(model, lr=0.0, **EVERY_STEP, max_factor_dim=99, direction="natural")
    for _ in range(2):  # the first forward finds the links, the second knows them
        model(x).sum().backward()
        optimizer.step()
        assert optimizer.core.capture.topology.of_layer["layer"].follows == links
        optimizer.eval()
        s = model.layer(x).detach()
        optimizer.train()
        g2 = slope(model, x, s).detach().square().expand_as(s)
        a = nn.functional.unfold(x, 3).transpose(1, 2).flatten(0, 1) if conv else x
        phi, psi = factors(a, g2.movedim(1, -1).flatten(0, -2) if conv else g2)
        found = optimizer.factors("layer")
        torch.testing.assert_close(found["phi"], phi, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(found["psi"], psi, rtol=1e-7, atol=1e-10)
    follows = {r.parameter: r.follows for r in optimizer.routing()}
    assert follows["layer.weight"] == (" → ".join(links) or "identity") and follows["scale"] == ""
    assert ("followed by" in optimizer.routing_table()) == bool(links)
    optimizer.close()


def test_nothing_is_watched_between_factor_steps_and_after_an_error() -> None:
    def broken(net: Net, x: Tensor, s: Tensor) -> Tensor:
        raise RuntimeError("broken")

    model = Net(CASES["batch norm, relu"][0], True)
    optimizer = LNGD(model, lr=0.0, direction="natural", factor_interval=4)
    x = torch.rand(2, 3, 6, 6)
    for step in range(6):
        if step == 4:
            good, model.body = model.body, broken
            with pytest.raises(RuntimeError, match="broken"):
                model(x)
            model.body = good
        assert len(torch.overrides._get_current_function_mode_stack()) == 0
        model(x).sum().backward()
        assert len(torch.overrides._get_current_function_mode_stack()) == 0
        optimizer.step()


def test_another_way_through_the_model_is_counted_as_far_as_it_is_known() -> None:
    model = Net(lambda n, x, s: n.silu(n.layer_norm(s)), False).double()
    x = torch.rand(9, 5, dtype=torch.float64)
    optimizer = LNGD(model, lr=0.0, direction="natural", factor_interval=1, ema_decay=0.0)
    model(x).sum().backward()
    optimizer.step()
    for body, slope in (
        (lambda n, x, s: n.layer_norm(s).softmax(-1), lambda s: gamma(model.layer_norm, s, [1])),
        (lambda n, x, s: s * 1, torch.ones_like),
    ):
        model.body = body
        model(x).sum().backward()
        optimizer.step()
        s = x @ model.layer.weight.detach().T
        phi, psi = factors(x, slope(s).detach().square())
        torch.testing.assert_close(optimizer.factors("layer")["phi"], phi)
        torch.testing.assert_close(optimizer.factors("layer")["psi"], psi)


def test_an_activation_that_is_called_by_a_name_of_its_own_silences_nothing() -> None:
    class Named(nn.SiLU):
        def forward(self, values: Tensor) -> Tensor:
            return super().forward(values)

    Named.__module__ = nn.SiLU.__module__  # where activations are known by
    model = Net(lambda n, x, s: n.named(values=x[:, :4]) * 0 + n.silu(s), False).double()
    model.named = Named()
    optimizer = LNGD(model, lr=0.0, direction="natural")
    model(torch.rand(9, 5, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert optimizer.core.capture.topology.of_layer["layer"].follows == ("SiLU",)


# φ' of one activation


@pytest.mark.parametrize("name", ["ELU", "LeakyReLU", "LogSigmoid", "SELU", "Softplus", "Softsign", *sorted(ACT2FN)])
def test_derivative_of_every_activation(name: str) -> None:
    activation = ACT2FN[name] if name in ACT2FN else getattr(nn, name)()
    if name in ("prelu", "xielu", "softmax"):  # parameters of their own, or not entry by entry
        assert not is_elementwise(activation)
        return
    assert is_elementwise(activation)
    s = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activation(s).sum(), s)
    torch.testing.assert_close(activation_derivative(activation, s), slope)


# Chains and watches by themselves


def test_a_chain_that_is_expected_ends_at_once_and_lets_go() -> None:
    s, ended = torch.randn(3, 4), []
    chain = Chain(("relu",), lambda own: ended.append((own.names(), own.slope())))
    with ChainWatch() as watch:
        watch.follow(s, chain)
        y = s.relu()
        assert ended[0][0] == ("relu",) and torch.equal(ended[0][1], (s > 0).float())
        y.sin()
        chain.finish()
    assert len(ended) == 1 and not chain.links and not chain.places
