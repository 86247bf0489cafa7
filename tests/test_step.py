"""The optimizer against the naive reference over several steps, in float64."""

from __future__ import annotations

import pytest
import torch
from reference import NaiveLayer
from torch import Tensor, nn

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.curvature.layer_bank import polar_interval

EXACT = {"factor_interval": 1, "inverse_interval": 1, "polar_interval": 1, "stagger": False, "fallback_lr": 0.02}

CONFIGS = [
    {"direction": direction, "rate": rate, "momentum_on": on, "nesterov": nesterov, "row_decay": rows}
    for direction in ("natural", "polar", "gram")
    for rate in ("rms", "trust", "none")
    for on, nesterov, rows in (("gradient", True, 0.9), ("gradient", False, 0.0), ("update", False, 0.0))
] + [
    {"direction": "natural", "damping": "paper", "rate": "none"},
    {"direction": "gram", "damping": "paper"},
    {"direction": "natural", "momentum_on": "update", "nesterov": True},
    {"preset": "paper", "fisher": "expected", "rate": "none", "nesterov": False},
]


class Net(nn.Module):
    """Three layers of one shape, one wide, one tall; sometimes without the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.wide, self.tall, self.act = nn.Linear(5, 3), nn.Linear(3, 6), nn.Tanh()

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x if skip and i == 1 else self.act(layer(x)) if i == 0 else layer(x)
        return self.tall(self.wide(x))


def observed(model: Net, x: Tensor, bias: bool, skip: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and g² of every layer."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str):
        def see(module: nn.Linear, args: tuple, output: Tensor) -> None:
            a = args[0].detach()
            a = torch.cat((a, torch.ones(len(a), 1).double()), 1) if bias else a
            g2 = (1 - torch.tanh(output.detach()) ** 2) ** 2 if name == "layers.0" else torch.ones_like(output)
            seen[name] = (a, g2.detach())

        return see

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        model(x, skip)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("bias", ["fallback", "factor"])
@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_steps_are_those_of_the_reference(fields: dict[str, object], bias: str) -> None:
    config = LNGDConfig(**{**EXACT, **fields, "bias": bias, "weight_decay": 0.05, "max_factor_dim": 99})
    model = Net().double()
    optimizer = LNGD(model, config, lr=1e-2)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}

    def matrix(name: str, gradient: bool = False) -> Tensor:
        parts = [layers[name].weight, *([layers[name].bias] if bias == "factor" else [])]
        picked = [(p.grad if gradient else p).detach() for p in parts]
        return torch.cat([p.reshape(len(p), -1) for p in picked], 1)

    naive = {name: NaiveLayer(matrix(name), config) for name in layers}
    for i in range(5):
        x = torch.randn(12, 5, dtype=torch.float64)
        skip = i in (1, 3)  # the second layer has no gradient then
        for name, (a, g2) in observed(model, x, bias == "factor", skip).items():
            naive[name].observe(a, g2)
        model(x, skip).square().mean().backward()
        for name, layer in naive.items():
            if skip and name == "layers.1":
                continue
            gradient = matrix(name, gradient=True)
            decayed = layer.w.clone()
            decay = 0.05 * config.weight_decay_scale
            layer.step(gradient, 1e-2, decay)
            if bias == "factor":  # no decay on the bias
                layer.w[:, -1] += 1e-2 * decay * decayed[:, -1]
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in naive.items():
            gap = (matrix(name) - layer.w).norm() / layer.w.norm()
            assert gap < 1e-9, (i, name, float(gap))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)], ids=["gram left", "gram right"])
@pytest.mark.parametrize("interval", [2, 3])
def test_roots_of_gram_matrices_are_made_every_so_often(shape: tuple[int, int], interval: int) -> None:
    config = LNGDConfig(**{**EXACT, "polar_interval": interval, "early_factors": False, "gram_decay": 0.8})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)).double()
    optimizer, naive = LNGD(model, config, lr=1e-2), NaiveLayer(model[0].weight.detach(), config)
    for step in range(8):
        x = torch.randn(12, shape[1], dtype=torch.float64)
        model(x).exp().mean().backward()
        naive.observe(x, torch.ones(12, shape[0]))
        naive.step(model[0].weight.grad, 1e-2, config.weight_decay * config.weight_decay_scale)
        optimizer.step()
        optimizer.zero_grad()
        assert (model[0].weight - naive.w).norm() < 1e-9 * naive.w.norm(), step


def test_the_interval_between_roots_grows() -> None:
    auto, fixed = (
        LNGDConfig(polar_interval="auto", early_factors=True),
        LNGDConfig(polar_interval=3, early_factors=True),
    )
    settled = LNGDConfig(polar_interval="auto", early_factors=False)
    assert [polar_interval(step, 128, auto) for step in (0, 7, 8, 16, 24, 32, 1000)] == [1, 1, 1, 2, 3, 4, 4]
    assert [polar_interval(step, 129, auto) for step in (0, 32, 64, 1000)] == [1, 4, 8, 8]
    assert [polar_interval(step, 999, fixed) for step in (0, 16, 24, 1000)] == [1, 2, 3, 3]
    assert [polar_interval(step, 129, settled) for step in (0, 1000)] == [8, 8]


def test_a_layer_without_gradient_rests() -> None:
    fields = {**EXACT, "weight_decay": 0.1}
    model, other = Net().double(), Net().double()
    optimizer, plain = LNGD(model, lr=1e-2, **fields), LNGD(other, lr=1e-2, **fields)
    x = torch.randn(12, 5, dtype=torch.float64)
    for net, own in ((model, optimizer), (other, plain)):
        net(x).square().mean().backward()
        own.step()
        own.zero_grad()
    before = model.layers[1].weight.clone()
    model(x, skip=True).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.layers[1].weight, before)
    assert not torch.equal(model.layers[2].weight, other.layers[2].weight)
    optimizer.zero_grad()
    optimizer.step()  # nothing has a gradient: nothing moves
    assert torch.equal(model.layers[1].weight, before)


@pytest.mark.parametrize("direction", ["natural", "polar", "gram"])
@pytest.mark.parametrize(("fields", "scale"), [({}, 1.0), ({"rate_scale": 0.2}, 0.2)], ids=["default", "Muon's"])
def test_size_of_the_update(direction: str, fields: dict[str, float], scale: float) -> None:
    model = Net()
    optimizer = LNGD(model, lr=1e-2, direction=direction, weight_decay=0.0, **fields)
    for _ in range(3):
        before = [layer.weight.detach().clone() for layer in model.layers]
        model(torch.randn(12, 5)).square().mean().backward()
        optimizer.step()
        for old, layer in zip(before, model.layers, strict=True):
            rms = (layer.weight - old).square().mean().sqrt()
            torch.testing.assert_close(rms, torch.tensor(scale * 1e-2), rtol=2e-2, atol=0)


def test_fallback_is_torchs_adamw() -> None:
    model, other = Net(), Net()
    optimizer = LNGD(model, lr=1e-3, exclude=".", betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    decayed = [p for p in other.parameters() if p.dim() > 1]
    rest = [p for p in other.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    rate = 1e-3 * optimizer.config.fallback_lr_scale
    adamw = torch.optim.AdamW(groups, lr=rate, betas=(0.8, 0.95), eps=1e-6, fused=True)
    for _ in range(4):
        x = torch.randn(12, 5)
        for net, own in ((model, optimizer), (other, adamw)):
            net(x).square().mean().backward()
            own.step()
            own.zero_grad()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_schedulers_closures_and_rates_as_tensors() -> None:
    model = Net()
    optimizer = LNGD(model, lr=0.1, fallback_lr_scale=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 5)).square().mean()
        loss.backward()
        return loss

    assert isinstance(optimizer.step(closure), Tensor)
    scheduler.step()
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {"lngd": 0.05, "fallback_no_decay": 0.1}
    first, second = Net(), Net()
    own = [LNGD(first, lr=0.01), LNGD(second, lr=torch.tensor(0.01))]
    for net, one in zip((first, second), own, strict=True):
        net(torch.ones(4, 5)).square().mean().backward()
        one.step()
    torch.testing.assert_close(first.wide.weight, second.wide.weight)


def test_parameters_added_later_are_adamws() -> None:
    model, extra = Net(), nn.Parameter(torch.ones(3))
    optimizer = LNGD(model, lr=1e-2)
    optimizer.add_param_group({"params": [extra], "lr": 1e-1})
    (model(torch.ones(4, 5)).square().mean() + extra.sum()).backward()
    optimizer.step()
    torch.testing.assert_close(extra.detach(), torch.full((3,), 0.9))


def test_early_factors_are_looked_at_in_powers_of_two() -> None:
    model = Net()
    optimizer = LNGD(model, lr=1e-3, factor_interval=16)
    looked = []
    for step in range(35):
        looked += [step] if optimizer._is_factor_step() else []
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
    assert looked == [0, 1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("direction", "other", "tolerance"),
    [
        ("polar", {"matrix_dtype": "full", "inverse_root": "newton"}, 1e-3),
        ("gram", {"matrix_dtype": "full", "inverse_root": "newton"}, 1e-3),
        ("polar", {}, 0.3),  # what carries less than the rounding of bfloat16, 0.4 %, is lifted all the same
        ("gram", {}, 0.05),
    ],
    ids=str,
)
def test_both_ways_to_a_root_and_half_precision_agree(direction: str, other: dict[str, str], tolerance: float) -> None:
    results = []
    for fields in ({"matrix_dtype": "full", "inverse_root": "eigh"}, other):
        model = Net()
        optimizer = LNGD(model, lr=2e-3, fallback_lr=1e-2, direction=direction, **fields)
        for seed in range(4):
            torch.manual_seed(seed)
            model(torch.randn(64, 5)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in Net().parameters()])
    assert (results[0] - results[1]).norm() < tolerance * (results[0] - start).norm()
