"""Steps are those of the dense float64 reference: of a small net, and of random chains of supported layers.

``make test`` runs the same examples each time, ``make test-all`` others, and more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_lngd import LNGD, LNGDConfig
from tests.helpers import EVERY_STEP, every_sample, layers_of
from tests.reference import NaiveFamilyLayer, NaiveLayer, joint_step

ACTS: dict[str, type[nn.Module] | None] = {
    "none": None, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "softplus": nn.Softplus,
}  # fmt: skip
# What a link of a chain is; all take and give [B, T, width].
KINDS = ("linear", "convolution", "image", "shared", "twice", "gated", "norm", "residual")
# Those in which a layer's activation follows at once.
ENDED = ("linear", "convolution", "image", "twice", "residual")
ROWS, LENGTH = 5, 4
DECAY = 0.05


class Link(nn.Module):
    """One link of a chain: a layer or several, and perhaps an activation."""

    def __init__(self, kind: str, width: int, to: int, act: str, bias: bool) -> None:
        super().__init__()
        self.kind, made = kind, ACTS[act]
        self.width = width if kind in ("twice", "norm", "residual") else to
        if kind == "norm":
            self.norm = nn.LayerNorm(width)
            return
        if kind == "convolution":
            self.layer: nn.Module = nn.Conv1d(width, to, 3, padding=1, bias=bias)
        elif kind == "image":  # of 2 × 2
            self.layer = nn.Conv2d(width, to, 3, padding=1, bias=bias, groups=math.gcd(width, to))
        else:
            self.layer = nn.Linear(width, self.width, bias=bias)
        if kind in ("shared", "gated"):
            self.other = nn.Linear(width, to, bias=bias)
        self.act = nn.Identity() if made is None else made()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "norm":
            return self.norm(x)
        if self.kind == "convolution":
            return self.act(self.layer(x.mT)).mT
        if self.kind == "image":
            return self.act(self.layer(x.mT.unflatten(-1, (2, 2)))).flatten(2).mT
        if self.kind == "twice":
            return self.act(self.layer(self.act(self.layer(x))))
        y = self.act(self.layer(x))
        if self.kind == "shared":
            return y + 0.5 * self.other(x)
        if self.kind == "gated":
            return y * self.other(x)
        return x + y if self.kind == "residual" else y


class Chain(nn.Module):
    """Links one after the other."""

    def __init__(self, width: int, links: list[tuple[str, int, str, bool]]) -> None:
        super().__init__()
        made = []
        for kind, to, act, bias in links:
            made.append(Link(kind, width, to, act, bias))
            width = made[-1].width
        made.append(Link("linear", width, 3, "none", True))  # so that there is a layer, and the norms' output is used
        self.links = nn.ModuleList(made)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for link in self.links:
            x = link(x)
        return x


def layers_in(model: Chain) -> dict[str, tuple[Any, nn.Module | None]]:
    """Every layer of LNGD, and the activation that follows it."""
    found: dict[str, tuple[Any, nn.Module | None]] = {}
    for i, link in enumerate(model.links):
        if link.kind != "norm":
            found[f"links.{i}.layer"] = (link.layer, None if isinstance(link.act, nn.Identity) else link.act)
        if link.kind in ("shared", "gated"):
            found[f"links.{i}.other"] = (link.other, None)
    return found


@dataclass
class Seen:
    """A call of a layer: inputs, pre-activations and (once they came) the loss's gradients of those."""

    a: Tensor
    s: Tensor
    g: Tensor | None = None


def units_of(layer: Any) -> int:
    return getattr(layer, "groups", 1)


def inputs_of(layer: Any, a: Tensor, ones: bool) -> Tensor:
    """[units, N, d], a row a token or location: of [B, T, d] or patches of [B, C, T] and [B, C, H, W]."""
    if isinstance(layer, nn.Linear):
        rows = a.flatten(0, 1)[None]
    else:
        padded = nn.functional.pad(a, (1, 1) * (a.dim() - 2))
        for axis in range(2, a.dim()):
            padded = padded.unfold(axis, 3, 1)
        rows = padded.flatten(a.dim()).flatten(2, -2)  # [B, C, places, k]
        rows = rows.unflatten(1, (units_of(layer), -1)).permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
    return torch.cat((rows, torch.ones(*rows.shape[:-1], 1).double()), -1) if ones else rows


def outputs_of(layer: Any, s: Tensor) -> Tensor:
    """[units, N, m] of a layer's output."""
    if not isinstance(layer, nn.Linear):
        s = s.flatten(2).mT
    return s.flatten(0, 1).unflatten(1, (units_of(layer), -1)).transpose(0, 1)


@contextmanager
def watched(model: Chain) -> Iterator[dict[str, list[Seen]]]:
    """Every call of every layer."""
    seen: dict[str, list[Seen]] = {name: [] for name in layers_in(model)}

    def see(name: str, module: nn.Module, args: Any, out: Tensor) -> None:
        call = Seen(args[0].detach(), out.detach().clone())
        seen[name].append(call)
        out.register_hook(lambda g: setattr(call, "g", g.detach().clone()))

    handles = [
        layer.register_forward_hook(functools.partial(see, name)) for name, (layer, _) in layers_in(model).items()
    ]
    yield seen
    for handle in handles:
        handle.remove()


def draw(*shape: int, generator: Any, **rest: Any) -> Tensor:
    """What ``fisher=sampled`` draws here, in place of normal numbers."""
    return torch.linspace(0.5, 2.0, shape[-1], **rest).expand(shape).clone()


def slopes(act: nn.Module | None, s: Tensor) -> Tensor:
    """φ'(s)."""
    if act is None:
        return torch.ones_like(s)
    with torch.enable_grad():
        leaf = s.clone().requires_grad_()
        return torch.autograd.grad(act(leaf).sum(), leaf)[0]


def observe(naive: list[Any], layer: Any, act: nn.Module | None, calls: list[Seen], mask: Tensor | None) -> None:
    """Give the reference what a layer was called with: its units take a and g², or g."""
    c = naive[0].c
    keep = slice(None) if mask is None or isinstance(layer, nn.Conv2d) else mask.flatten() > 0
    ones = c.bias == "factor" and layer.bias is not None
    a = torch.cat([inputs_of(layer, call.a, ones)[:, keep] for call in calls], 1)
    if c.fisher == "empirical":
        g = torch.cat([outputs_of(layer, call.g)[:, keep] for call in calls], 1)
        for size in (g.abs().amax((1, 2)), matrices(layer, "fallback", gradient=True).abs().amax((1, 2))):
            assume(size.min() > 1e-7 and size.max() < 1e7)  # what saturated functions let through is rounding: so is F
        each = torch.arange(ROWS).repeat_interleave(LENGTH)[keep]
        rows = [int(row) + ROWS * i for i in range(len(calls)) for row in each]  # the calls of a layer are apart
    else:  # with the polar direction φ' is taken as 1
        act = None if c.direction == "polar" and c.fisher == "expected" else act
        g = torch.cat([outputs_of(layer, slopes(act, call.s))[:, keep] for call in calls], 1)
        if c.fisher == "sampled":
            g = g * torch.linspace(0.5, 2.0, g.shape[-1]).double()
    for i, unit in enumerate(naive):
        if c.family != "lngd":
            unit.observe_gradients(a[i], g[i], rows, ROWS)
            if c.family == "ekfac":  # whose D depends on each eigenvector; those of one eigenvalue are anyone's
                for side in ("left", "right"):
                    values = torch.linalg.eigvalsh(unit.own.side(side))
                    assume(not len(values) > 1 or values.diff().min() > 1e-6 * values.max())
        else:  # T Σ g gᵀ of a mean over T samples, where others are means over tokens
            unit.observe(a[i], g[i].square() * (ROWS * a.shape[1] if c.fisher == "empirical" else 1))


def matrices(layer: Any, bias: str, gradient: bool = False) -> Tensor:
    """Weight or gradient as [units, m, columns], with the bias's column where it is in the factor."""
    parts = [layer.weight, *([layer.bias] if bias == "factor" and layer.bias is not None else [])]
    units = units_of(layer)
    return torch.cat([(p.grad if gradient else p).detach().reshape(units, len(p) // units, -1) for p in parts], -1)


def step_with_decay(naive: list[Any], layer: Any, config: LNGDConfig) -> None:
    """The reference's step; decay is of weights, and of no bias."""
    decay = DECAY
    before = [unit.w[:, -1].clone() for unit in naive]
    joint_step(naive, list(matrices(layer, config.bias, gradient=True)), 1e-3, decay)
    if config.bias == "factor" and layer.bias is not None and naive[0].is_due:
        for unit, column in zip(naive, before, strict=True):
            unit.w[:, -1] += column * naive[0].every * 1e-3 * decay


def steps_as_the_reference(
    width: int, links: list[tuple[str, int, str, bool]], fields: dict[str, Any], masked: bool = False, seed: int = 0,
    steps: int = 3, rest_at: int | None = None,
) -> None:  # fmt: skip
    """Train a chain beside the reference.

    Args:
        rest_at: a step in which the first layer has no gradient, and rests.
    """
    torch.manual_seed(seed)
    config = LNGDConfig(**{**EVERY_STEP, **fields, "max_factor_dim": 99, "weight_decay": DECAY})
    if config.fisher != "empirical" and (config.direction, config.fisher) != ("polar", "expected"):
        # φ' is that of all that follows a layer up to an activation (tests of paper.chains): here one at once
        links = [(kind if kind in ENDED else "linear", to, "tanh" if act == "none" else act, bias)
                 for kind, to, act, bias in links]  # fmt: skip
    model = Chain(width, links).double()
    optimizer = LNGD(model, config, lr=1e-3)
    found = layers_in(model)
    assert set(layers_of(optimizer)) == set(found)
    kind = NaiveLayer if config.family == "lngd" else NaiveFamilyLayer
    naive = {name: [kind(unit, config) for unit in matrices(layer, config.bias)] for name, (layer, _) in found.items()}
    for name, (layer, _) in found.items():
        for unit in naive[name]:
            unit.first_rms = float(layer.weight.detach().square().mean().sqrt())
    for step in range(steps):
        batch = {"x": torch.randn(ROWS, LENGTH, width, dtype=torch.float64)}
        if masked:
            batch["attention_mask"] = (torch.rand(ROWS, LENGTH) < 0.7).double()
            batch["attention_mask"][0] = 1.0
        target = torch.randn(ROWS, LENGTH, 3, dtype=torch.float64)
        with watched(model) as seen, pytest.MonkeyPatch.context() as patch, every_sample():
            patch.setattr(torch, "randn", draw)
            (model(**batch) - target).square().mean().backward()
        if step == rest_at:
            next(iter(found.values()))[0].weight.grad = None
        optimizer.step()
        for number, (name, (layer, act)) in enumerate(found.items()):
            observe(naive[name], layer, act, seen[name], batch.get("attention_mask"))
            for unit in naive[name]:
                unit.time, unit.turn = step, turn_of(optimizer, name)
            if step != rest_at or number != 0:
                step_with_decay(naive[name], layer, config)
        optimizer.zero_grad()
        for name, (layer, _) in found.items():
            torch.testing.assert_close(
                matrices(layer, config.bias), torch.stack([unit.w for unit in naive[name]]),
                rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}",
            )  # fmt: skip


def turn_of(optimizer: LNGD, name: str) -> int:
    """In which of `update_interval` steps a layer is updated."""
    return optimizer.core.built.turn_of[name]


# Of all pairs; the product of these is drawn below.
GRID = [
    {"direction": "natural", "rate": "rms", "momentum_on": "gradient", "bias": "factor"},
    {"direction": "natural", "rate": "none", "momentum_on": "update", "bias": "fallback"},
    {"direction": "polar", "rate": "rms", "momentum_on": "update", "bias": "factor"},
    {"direction": "polar", "rate": "none", "momentum_on": "gradient", "bias": "fallback"},
    {"direction": "natural", "damping": "paper", "rate": "none"},
    {"direction": "polar", "damping": "paper", "damping_bounds": (1e-3, 1e-1)},
    {"direction": "polar", "whiten": "inputs"},
    {"update_interval": 2},
    {"update_interval": 3, "bias": "factor"},
    {"direction": "polar", "whiten": "none"},
    {"preset": "paper", "fisher": "expected", "rate": "none"},
]


@pytest.mark.parametrize("fields", GRID, ids=str)
def test_steps_are_those_of_the_reference(fields: dict[str, Any]) -> None:
    """Of layers of one shape and of others; one of them rests in one step."""
    links = [
        ("linear", 5, "tanh", True),
        ("linear", 5, "none", True),
        ("linear", 5, "none", True),
        ("linear", 3, "none", True),
    ]
    steps_as_the_reference(5, links, fields, steps=7, rest_at=2 if fields.get("bias") != "factor" else None)


class Attention(nn.Module):
    """Projections with three heads of width 2, one of them of q, k and v together, and one layer of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 2
        self.q, self.qkv, self.o = nn.Linear(5, 6), nn.Linear(5, 12), nn.Linear(6, 4)
        self.mixed = nn.Linear(4, 3)  # three rows are no heads of width 2

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(self.o(self.q(x) * sum(self.qkv(x).chunk(2, -1))))


def test_attention_is_orthogonalised_by_head() -> None:
    torch.manual_seed(0)
    config = LNGDConfig(**EVERY_STEP | {"update_interval": 2}, weight_decay=0.0)
    model = nn.Sequential(Attention()).double()
    optimizer = LNGD(model, config, lr=1e-2)
    heads = {"0.q": 3, "0.qkv": 6, "0.o": 2, "0.mixed": 1}
    table = optimizer.routing_table()
    assert all(f"linear, {count} heads" in table for count in (2, 3, 6))
    naive = {name: NaiveLayer(model.get_submodule(name).weight.detach(), config, heads[name]) for name in heads}
    inputs: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, args: Any) -> None:
        inputs[name] = args[0].detach().flatten(0, -2)

    for name in heads:
        model.get_submodule(name).register_forward_pre_hook(functools.partial(see, name))
    for step in range(7):
        model(torch.randn(6, 4, 5).double()).square().mean().backward()
        optimizer.step()
        for name, unit in naive.items():
            unit.time, unit.turn = step, turn_of(optimizer, name)
            unit.observe(inputs[name], torch.ones(24, len(unit.w)).double())
            unit.step(model.get_submodule(name).weight.grad, 1e-2)
        optimizer.zero_grad()
        for name, unit in naive.items():
            torch.testing.assert_close(model.get_submodule(name).weight, unit.w, rtol=1e-7, atol=1e-9)


links = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(2, 5), st.sampled_from(list(ACTS)), st.booleans()),
    min_size=1,
    max_size=5,
)
COMMON = {
    "damping": st.sampled_from([0.1, 1.0, "paper"]),
    "momentum_on": st.sampled_from(["gradient", "update"]),
    "momentum": st.sampled_from([0.0, 0.8]),
    "ema_decay": st.sampled_from([0.0, 0.9]),
    "bias": st.sampled_from(["factor", "fallback"]),
}
LNGD_FIELDS = st.fixed_dictionaries(
    {
        **COMMON,
        "fisher": st.sampled_from(["expected", "sampled", "empirical"]),
        "direction": st.sampled_from(["natural", "polar"]),
        "whiten": st.sampled_from(["both", "both", "inputs", "none"]),
        "rate": st.sampled_from(["rms", "none"]),
        "update_interval": st.sampled_from([1, 2, 3]),
    }
).map(
    lambda fields: (
        fields if LNGDConfig(**fields | {"update_interval": 1}).takes_turns else fields | {"update_interval": 1}
    )
)
FAMILY_FIELDS = st.fixed_dictionaries(
    {**COMMON, "family": st.sampled_from(["kfac", "ekfac", "tkfac", "ng+"]), "rate": st.sampled_from(["rms", "none"])}
)
DRAWN = {
    "width": st.integers(2, 5),
    "links": links,
    "fields": st.one_of(LNGD_FIELDS, LNGD_FIELDS, FAMILY_FIELDS),
    "masked": st.booleans(),
    "seed": st.integers(0, 99),
}
# no shrinking: a failure is found within the time of a success, its example is small as it is
QUICK = settings(deadline=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))


@settings(QUICK, max_examples=60, derandomize=True)
@given(**DRAWN)
def test_any_chain_steps_as_the_reference(**drawn: Any) -> None:
    steps_as_the_reference(**drawn)


@pytest.mark.slow
@settings(QUICK, max_examples=300, derandomize=False, print_blob=True)
@given(**DRAWN)
def test_any_chain_steps_as_the_reference_at_random(**drawn: Any) -> None:
    steps_as_the_reference(**drawn)
