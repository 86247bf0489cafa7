"""Eq. 12-13 against per-row gradients from torch.func."""

from __future__ import annotations

import pytest
import torch
from core_helpers import core_backward, core_batch, core_marian
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from hf_lngd import LNGD
from hf_lngd.curvature.factors import adaptive_rate

FIELDS = {"direction": "natural", "rate": "adaptive", "rate_rows": 1, "bias": "factor", "momentum_on": "update"}


class Twice(nn.Module):
    """A layer that is called twice, on [rows, positions, features]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


def rates(optimizer: LNGD, gradients: dict[str, Tensor], terms: int) -> None:
    """Compares each layer's rate with one made of the rows' own gradients of the mean loss over so many terms."""
    made = optimizer._preconditioner
    assert made is not None
    for bank in made.layer_banks:
        for i, layer in enumerate(bank.layers):
            per_row = gradients[layer.weight_name]
            per_row = per_row.reshape(len(per_row), layer.units, layer.out_features, layer.in_features)
            if layer.bias_name is not None:
                bias = gradients[layer.bias_name].view(len(per_row), layer.units, -1, 1)
                per_row = torch.cat((per_row, bias), -1)
            total = per_row.sum(0)
            direction = bank.direction(total.clone(), [i], bank.rows_of([i]), 0)
            q = (per_row * direction).sum((1, 2, 3))
            expected = adaptive_rate((direction * total).sum(), terms * q.square().sum(), 1e-8)
            torch.testing.assert_close(bank.rate[i], expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("parts", [1, 3])
def test_rows_of_a_net_with_a_repeated_layer(parts: int) -> None:
    model = Twice().double()
    optimizer = LNGD(model, lr=1e-3, **FIELDS)
    x = torch.randn(6, 5, 4, dtype=torch.float64)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, p, (row[None],)).square().sum((1, 2)).sum() / 6

    optimizer.eval()
    gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    optimizer.train()
    for part in x.chunk(parts):
        (model(part).square().sum((1, 2)).sum() / 6).backward()
    optimizer.step()
    rates(optimizer, gradients, 6)


def test_rows_of_a_transformer_with_padding() -> None:
    model, batch = core_marian(), core_batch()
    optimizer = LNGD(model, lr=1e-3, **FIELDS)
    terms = (batch["labels"] != -100).sum()
    gradients: dict[str, list[Tensor]] = {}
    optimizer.eval()
    for i in range(8):
        row = {name: value[i : i + 1] for name, value in batch.items()}
        logits = model(**row).logits
        loss = F.cross_entropy(logits.flatten(0, 1), row["labels"].flatten(), ignore_index=-100, reduction="sum")
        (loss / terms).backward()
        for name, p in model.named_parameters():
            gradients.setdefault(name, []).append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
        model.zero_grad()
    optimizer.train()
    core_backward(model, optimizer, batch)
    optimizer.step()
    rates(optimizer, {name: torch.stack(rows) for name, rows in gradients.items()}, int(terms))


def test_rows_that_are_left_out_are_made_up_for() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 4, dtype=torch.float64).repeat_interleave(2, 0)  # rows in pairs: every second one tells all
    found = []
    for every, parts in ((1, 1), (2, 1), (2, 4)):
        model = Twice().double()
        optimizer = LNGD(model, lr=1e-3, **{**FIELDS, "rate_rows": every})
        for part in x.chunk(parts):
            (model(part).square().sum(1) / 8).sum().backward()
        optimizer.step()
        found.append(torch.cat([bank.rate for bank in optimizer._preconditioner.layer_banks]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(found[0], found[2], rtol=1e-10, atol=0)


class Images(nn.Module):
    """Convolutions of several kinds on images; no batch norm, which would mix the images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.depthwise = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 3, padding="same", groups=4)
        self.grouped, self.pointwise = nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.depthwise(torch.tanh(self.patches(x))))
        return self.pointwise(self.grouped(x).permute(0, 2, 3, 1))


@pytest.mark.parametrize("parts", [1, 3])
def test_a_sample_of_images_is_an_image(parts: int) -> None:
    model = Images().double()
    optimizer = LNGD(model, lr=1e-3, **FIELDS, conv_rows=1)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, p, (image[None],)).square().sum() / 6

    optimizer.eval()
    gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    optimizer.train()
    for part in x.chunk(parts):
        (model(part).square().sum() / 6).backward()
    optimizer.step()
    rates(optimizer, gradients, 6)


def test_work_in_place_on_an_output_hides_no_gradient() -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace), nn.Linear(8, 3)).double()
        optimizer = LNGD(model, lr=1e-3, **FIELDS)
        model(torch.randn(6, 2, 4, dtype=torch.float64)).square().mean().backward()  # a view: three dimensions
        optimizer.step()
        found.append([float(bank.rate[0]) for bank in optimizer._preconditioner.layer_banks])
    assert found[0] == found[1] and all(rate > 0 for rate in found[0])


def test_a_rate_is_never_negative() -> None:
    rate = adaptive_rate(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 0.5]), 0.5)
    torch.testing.assert_close(rate, torch.tensor([0.0, 0.0, 2.0]))


@pytest.mark.parametrize("nesterov", [False, True])
def test_of_a_momentum_the_slope_is_that_of_the_momentum(nesterov: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    fields = {**FIELDS, "bias": "fallback", "momentum_on": "gradient", "momentum": 0.9, "nesterov": nesterov}
    optimizer = LNGD(model, lr=0.0, factor_interval=1, inverse_interval=1, **fields)
    momentum = torch.zeros(3, 4).double()
    for seed in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        s = model(x)
        g = s.detach().exp() / 15
        (s.exp().mean(1).sum() / 5).backward()
        gradient = model[0].weight.grad.clone()
        momentum = 0.9 * momentum + 0.1 * gradient
        m = 0.9 * momentum + 0.1 * gradient if nesterov else momentum
        optimizer.step()
        optimizer.zero_grad()
        (bank,) = optimizer._preconditioner.layer_banks
        direction = bank.direction(m[None].clone(), [0], torch.tensor([0]), 0)[0]
        q = torch.einsum("no,oi,ni->n", g, direction, x)
        expected = adaptive_rate((direction * m).sum(), 5 * q.square().sum(), 1e-8)
        torch.testing.assert_close(bank.rate[0], expected, rtol=1e-8, atol=0)


def test_without_rows_there_is_no_rate() -> None:
    model = core_marian()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    optimizer = LNGD(model, lr=1e-3, **FIELDS)
    core_backward(model, optimizer, core_batch())
    with pytest.raises(RuntimeError, match="saw no gradients of model.encoder.*use_reentrant=False"):
        optimizer.step()
    model = Twice()
    optimizer = LNGD(model, lr=1e-3, **FIELDS)
    before = [p.detach().clone() for p in model.parameters()]
    model.a(torch.randn(3, 5, 4)).sum().backward()  # a part of it: how many rows there are is not known
    with pytest.raises(RuntimeError, match="saw no gradients of a "):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_second_pass_of_the_true_fisher_adds_no_rows() -> None:
    found = []
    for fisher in ("expected", "true"):
        model = Twice().double()
        optimizer = LNGD(model, lr=1e-3, **{**FIELDS, "fisher": fisher})
        logits = model(torch.ones(3, 2, 4, dtype=torch.float64))
        optimizer.fisher_backward(logits)
        logits.square().sum().backward()
        rows = optimizer._capture.rows
        found.append({name: [(a, g) for calls in rows[name].calls.values() for a, g in calls] for name in rows})
    assert [len(found[1][name]) for name in ("a", "b")] == [2, 1]
    for name, calls in found[0].items():
        for one, two in zip(calls, found[1][name], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
