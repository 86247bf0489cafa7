"""How far `Polar` goes: lr, and at rates so low that the weights hardly move up to ten times that, for a while."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_lngd import LNGD
from hf_lngd.directions import GAIN_REACH

FIELDS = {"weight_decay": 0.0, "momentum": 0.0, "update_interval": 1}


def trained(lr: float, steps: int, falls: float = 4.0, warmup: int = 1) -> tuple[list[Tensor], list[Tensor], nn.Linear]:
    """Weights before and after each step, and gradients, of a layer that always sees the same batch; each singular
    value of the gradient is about so many times smaller than the one before."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 8, bias=False).double()
    optimizer = LNGD(layer, lr=lr, **FIELDS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    inputs, pull = torch.randn(8, 12).double(), torch.randn(8, 8).double() * falls ** -torch.arange(8.0)[:, None]
    weights, gradients = [layer.weight.detach().clone()], []
    for _ in range(steps):
        (layer(inputs) * pull).sum().backward()
        gradients.append(layer.weight.grad.clone())  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        weights.append(layer.weight.detach().clone())
    return weights, gradients, layer


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def ratio_of(step: Tensor, gradient: Tensor) -> float:
    """How much more a step of signs of this size would lower the loss, to first order."""
    return float(gradient.abs().sum() * rms(step) / (gradient * step).sum())


@pytest.mark.parametrize("falls", [1.0, 2.0, 4.0])
def test_at_low_rates_a_step_lowers_the_loss_as_one_of_signs_would(falls: float) -> None:
    lr = 1e-7
    weights, gradients, _ = trained(lr, 1, falls)
    step = weights[0] - weights[1]
    ratio = ratio_of(step, gradients[0])
    assert (ratio > 2) == (falls > 1)  # there is less to gain where nothing stands out
    assert rms(step) == pytest.approx(lr * ratio, rel=1e-4)
    assert float((gradients[0] * step).sum()) == pytest.approx(lr * float(gradients[0].abs().sum()), rel=1e-4)


def test_a_rate_that_moves_the_weights_is_what_it_says() -> None:
    """0.3 of their size in twenty steps, that is."""
    lr = 0.016 * rms(trained(0.0, 1)[0][0])
    weights, gradients, _ = trained(lr, 12)
    assert ratio_of(weights[0] - weights[1], gradients[0]) > 1.2  # there would be something to gain
    assert [rms(b - a) for a, b in zip(weights, weights[1:], strict=False)] == pytest.approx([lr] * 12, rel=1e-4)


def test_warm_up_is_not_taken_for_a_low_rate() -> None:
    lr = 0.016 * rms(trained(0.0, 1)[0][0])
    weights, _, _ = trained(lr, 12, warmup=100)
    steps = [rms(b - a) for a, b in zip(weights, weights[1:], strict=False)]
    assert steps == pytest.approx([lr * (i + 1) / 100 for i in range(12)], rel=1e-4)


def test_the_gain_ends_with_the_path() -> None:
    """It never takes the weights further than it may, and in a long run steps are lr again."""
    start = trained(0.0, 1)[0][0]
    lr, reach = 1e-3 * rms(start), GAIN_REACH * rms(start)
    weights, _, _ = trained(lr, 400)
    steps = [rms(b - a) for a, b in zip(weights, weights[1:], strict=False)]
    gained = [step for step in steps if step > 1.001 * lr]
    assert steps[0] > 1.2 * lr and steps[-1] == pytest.approx(lr, rel=1e-4)
    assert gained == steps[: len(gained)] and sum(gained) < reach
    assert all(b <= a * 1.001 for a, b in zip(steps, steps[1:], strict=False))


def test_layers_of_one_batch_have_gains_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(2))).double()
    optimizer = LNGD(model, lr=1e-6, **FIELDS)
    falling = 4.0 ** -torch.arange(6.0)[:, None].double()
    (model(torch.randn(6, 6).double()) * torch.randn(6, 6).double() * falling).sum().backward()
    before = [layer.weight.detach().clone() for layer in model]
    optimizer.step()
    for layer, old in zip(model, before, strict=True):
        step = old - layer.weight.detach()
        ratio = ratio_of(step, layer.weight.grad)
        assert ratio > 1.2
        assert float(optimizer.state[layer.weight]["gain"]) == pytest.approx(ratio, rel=1e-4)
        assert rms(step) == pytest.approx(1e-6 * ratio, rel=1e-4)


@pytest.mark.parametrize("lr", [0.0, 1e-3])
def test_weights_that_begin_with_zeros_take_steps_of_lr(lr: float) -> None:
    """As LoRA's second matrices do."""
    layer = nn.Linear(6, 6, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = LNGD(layer, lr=lr, **FIELDS)
    for _ in range(6):
        (layer(torch.randn(8, 6)) * torch.randn(8, 6)).sum().backward()
        before = layer.weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        assert rms(layer.weight.detach() - before) == pytest.approx(lr, rel=1e-4)
