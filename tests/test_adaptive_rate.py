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


def rates(model: nn.Module, optimizer: LNGD, gradients: dict[str, dict[str, Tensor]], rows: int) -> None:
    """Compares each layer's rate with one made of the rows' own gradients of the mean loss."""
    made = optimizer._preconditioner
    assert made is not None
    for bank in made.layer_banks:
        for i, layer in enumerate(bank.layers):
            weight = gradients[layer.weight_name]
            per_row = weight if layer.bias_name is None else None
            if per_row is None:
                per_row = torch.cat((weight, gradients[layer.bias_name].unsqueeze(-1)), -1)
            total = per_row.sum(0)
            direction = bank.direction(total[None], [i], torch.tensor([i]), 0)[0]
            q = (per_row * direction).sum((1, 2))
            terms = int(optimizer._capture_terms)
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
    optimizer._capture_terms = 6
    optimizer.step()
    rates(model, optimizer, gradients, 6)


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
    optimizer._capture_terms = terms
    optimizer.step()
    rates(model, optimizer, {name: torch.stack(rows) for name, rows in gradients.items()}, 8)


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


def test_a_rate_is_never_negative() -> None:
    rate = adaptive_rate(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 0.5]), 0.5)
    torch.testing.assert_close(rate, torch.tensor([0.0, 0.0, 2.0]))
