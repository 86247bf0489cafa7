"""The adaptive rate (Eq. 12, 13) against the gradients of single rows.

With U = α D, what a step at lr = 1 subtracts, α = ⟨D, M⟩ / (DᵀFD + μ) means T Σ_n ⟨U, ∇_n⟩² + μ α² = ⟨U, M⟩, where ∇_n
is the gradient of row n: but for μ each layer's step ends where the quadratic model along D is least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from hf_lngd import LNGD
from hf_lngd.paper.rate import EVERY, FIRST_ROWS, MU, adaptive_rate, rows_read
from tests.helpers import backward, layers_of, loss_of, marian_batch, seeded, tiny_marian

FIELDS: dict[str, Any] = {
    "direction": "natural", "rate": "adaptive", "bias": "factor", "momentum_on": "update", "momentum": 0.0,
    "weight_decay": 0.0, "embedding": "fallback",
}  # fmt: skip


class Twice(nn.Module):
    """A layer that is called twice, on [rows, positions, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


class Convolutions(nn.Module):
    """Convolutions of several kinds on images; no batch norm, which would mix the images."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.depthwise = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 3, padding="same", groups=4)
        self.grouped, self.pointwise = nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.depthwise(torch.tanh(self.patches(x))))
        return self.pointwise(self.grouped(x).permute(0, 2, 3, 1))


def row_gradients(model: nn.Module, optimizer: LNGD, x: Tensor) -> dict[str, Tensor]:
    """Each row's gradient of the mean over rows of the summed squares of the model's outputs."""
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, p, (row[None],)).square().sum() / len(x)

    optimizer.eval()
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    optimizer.train()
    return found


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def rates_of(optimizer: LNGD) -> dict[str, float]:
    """α of each layer in the last step."""
    return {y.name: float(r) for b in optimizer.core.batches for y, r in zip(b.layers, b.rate, strict=True)}


@contextmanager
def checked(model: nn.Module, optimizer: LNGD, rows: dict[str, Tensor], terms: int) -> Iterator[None]:
    """The rates of what is stepped here are those of these rows; rows: name → [rows, …]."""
    before = values(model)
    yield
    rates = rates_of(optimizer)
    for layer in layers_of(optimizer):
        slope, products = 0.0, torch.zeros(()).double()
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in rows:
                update = before[name] - model.get_parameter(name).detach()
                per_row = (rows[name] * update).flatten(1).sum(1)
                slope, products = slope + float(per_row.sum()), products + per_row
        curvature = terms * float(products.square().sum())
        assert slope > 0 and curvature + MU * rates[layer] ** 2 == pytest.approx(slope, rel=1e-7, abs=0), layer


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("fisher", ["expected", "true"])
@pytest.mark.parametrize(("make", "shape"), [(Twice, (6, 5, 4)), (Convolutions, (6, 3, 8, 8))], ids=["twice", "images"])
def test_a_sample_is_a_row_of_the_batch(
    make: Callable[[], nn.Module], shape: tuple[int, ...], fisher: str, parts: int
) -> None:
    """Also of a layer that is called twice, and with a second pass, which adds no rows."""
    model = seeded(make).double()
    optimizer = LNGD(model, lr=1.0, **FIELDS, fisher=fisher)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = row_gradients(model, optimizer, x)
    with checked(model, optimizer, rows, len(x)):
        for part in x.chunk(parts):
            y = model(part)
            if optimizer.needs_fisher_pass:
                optimizer.fisher_backward(y)
            (y.square().sum() / len(x)).backward()
        optimizer.step()


def test_rows_of_a_transformer_with_padding() -> None:
    model, batch = tiny_marian(init_std=0.5), marian_batch()  # else queries and keys have gradients next to zero
    optimizer = LNGD(model, lr=1.0, **FIELDS)
    terms = int((batch["labels"] != -100).sum())
    gradients: dict[str, list[Tensor]] = {}
    optimizer.eval()
    for i in range(8):
        loss_of(model, {name: value[i : i + 1] for name, value in batch.items()}, terms).backward()
        for name, p in model.named_parameters():
            gradients.setdefault(name, []).append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
        model.zero_grad()
    optimizer.train()
    with checked(model, optimizer, {name: torch.stack(rows) for name, rows in gradients.items()}, terms):
        backward(model, optimizer, batch)
        optimizer.step()


def test_work_in_place_on_an_output_hides_no_gradient() -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace), nn.Linear(8, 3)).double()
        optimizer, before = LNGD(model, lr=1e-3, **FIELDS), values(model)
        model(torch.randn(6, 2, 4, dtype=torch.float64)).square().mean().backward()  # a view: three dimensions
        optimizer.step()
        found.append(values(model))
        assert not any(torch.equal(before[name], value) for name, value in found[-1].items())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_a_rate_is_never_negative_and_that_of_no_finite_curvature_zero() -> None:
    slope, curvature = torch.tensor([-1.0, 0.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 0.5, torch.inf, torch.nan])
    torch.testing.assert_close(adaptive_rate(slope, curvature, 0.5), torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0]))


def test_of_a_momentum_the_slope_is_that_of_the_momentum() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    fields = {**FIELDS, "momentum_on": "gradient", "momentum": 0.9, "factor_interval": 1, "inverse_interval": 1}
    optimizer = LNGD(model, lr=1.0, **fields)
    momentum = torch.zeros(3, 4).double()
    for seed in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        s, before = model(x), model[0].weight.detach().clone()
        g = s.detach().exp() / 15
        (s.exp().mean(1).sum() / 5).backward()
        momentum = 0.9 * momentum + 0.1 * model[0].weight.grad
        ahead = 0.9 * momentum + 0.1 * model[0].weight.grad
        optimizer.step()
        optimizer.zero_grad()
        update = before - model[0].weight.detach()
        q = torch.einsum("no,oi,ni->n", g, update, x)
        found = 5 * q.square().sum() + MU * rates_of(optimizer)["0"] ** 2
        torch.testing.assert_close(found, (update * ahead).sum(), rtol=1e-8, atol=0)


def test_of_a_large_batch_some_rows_stand_for_all() -> None:
    rows, weights = rows_read(0, 40)
    assert rows == (*range(FIRST_ROWS), 16, 24, 32) and weights == (1,) * FIRST_ROWS + (EVERY,) * 3
    assert sum(weights) == 40
    first, second = rows_read(0, 21), rows_read(21, 19)
    assert (*first[0], *(21 + i for i in second[0])) == rows and first[1] + second[1] == weights


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_rates_of_a_large_batch(parts: int) -> None:
    """Of the rows that are read, whatever the micro-batches; also of a layer that is called twice in each."""
    model = seeded(Twice).double()
    optimizer = LNGD(model, lr=1.0, **FIELDS)
    x = torch.randn(40, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, weights = rows_read(0, 40)
    before, gradients = values(model), row_gradients(model, optimizer, x)
    for part in x.chunk(parts):
        (model(part).square().sum() / len(x)).backward()
    optimizer.step()
    rates = rates_of(optimizer)
    for layer in layers_of(optimizer):
        names = [name for name in (f"{layer}.weight", f"{layer}.bias") if name in gradients]
        products = sum(
            (gradients[name] * (before[name] - model.get_parameter(name).detach())).flatten(1).sum(1) for name in names
        )
        curvature = 40 * (products[list(rows)].square() @ torch.tensor(weights).double())
        torch.testing.assert_close(curvature + MU * rates[layer] ** 2, products.sum(), rtol=1e-7, atol=0)


def test_one_token_without_a_batch_is_one_row() -> None:
    model = seeded(Twice).double()
    optimizer = LNGD(model, lr=1.0, **FIELDS)
    model(torch.linspace(-1, 1, 4).double()).square().sum().backward()
    optimizer.step()
    assert all(rate > 0 for rate in rates_of(optimizer).values())


def test_without_rows_there_is_no_rate() -> None:
    part = seeded(Twice)
    optimizer, before = LNGD(part, lr=1e-3, **FIELDS), values(part)
    part.a(torch.randn(3, 5, 4)).sum().backward()  # a part of it: how many rows there are is not known
    with pytest.raises(RuntimeError, match="saw no gradients of a "):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in values(part).items())
