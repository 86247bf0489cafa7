"""Tables with a rule of their own: AdamW in the gradients' eigenbasis, and exact token frequencies."""

from __future__ import annotations

import pytest
import torch
from core_helpers import core_batch, core_marian, core_step
from torch import Tensor, nn

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.curvature.embeddings import ROW_CAP, embedding_direction

RATE = 1e-2 * LNGDConfig().fallback_lr_scale  # of tables, where lr is 1e-2


class Bag(nn.Module):
    """A table whose rows are summed, maybe tied to a head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.linear = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.linear(self.table(ids).sum(1))))


def ids(seed: int) -> Tensor:
    return torch.randint(0, 7, (12, 3), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [False, True])
def test_rotated_is_adam_in_the_eigenbasis(tied: bool) -> None:
    model = Bag(tied).double()
    optimizer = LNGD(model, lr=1e-2, factor_interval=2, early_factors=False, weight_decay=0.1, betas=(0.8, 0.9))
    gram, mean, square, basis = torch.zeros(4, 4).double(), torch.zeros(7, 4).double(), torch.zeros(7, 4).double(), None
    for step in range(5):
        expected = model.table.weight.detach().clone()
        model(ids(step)).square().mean().backward()
        g = model.table.weight.grad.clone()
        if step % 2 == 0:
            fresh = g.T @ g / (g.T @ g).trace()
            gram = fresh if step == 0 else 0.95 * gram + 0.05 * fresh
            back = mean if basis is None else mean @ basis.T  # the mean as it is without rotation
            old, basis = torch.eye(4).double() if basis is None else basis, torch.linalg.eigh(gram).eigenvectors
            mean = back @ basis
            square = torch.stack([((old.T @ basis).T ** 2) @ row for row in square])
        mean = 0.8 * mean + 0.2 * (g @ basis)
        square = 0.9 * square + 0.1 * (g @ basis) ** 2
        root = (square / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8
        expected *= 1 - RATE * 0.1
        expected -= RATE * (mean / (1 - 0.8 ** (step + 1)) / root) @ basis.T
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(model.table.weight.detach(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("tied", [False, True])
def test_exact_divides_by_token_frequency(tied: bool) -> None:
    model = Bag(tied).double()
    fields = {"embedding": "exact", "momentum": 0.0, "nesterov": False, "damping_rho": 0.5, "weight_decay": 0.0}
    optimizer = LNGD(model, lr=1e-2, **fields)
    before = model.table.weight.detach().clone()
    tokens = ids(1)
    model(tokens).square().mean().backward()
    g = model.table.weight.grad.clone()
    optimizer.step()
    counts = torch.bincount(tokens.flatten(), minlength=7).double()
    counts[0] = 0
    frequency = counts / counts.sum()
    direction = g / (frequency + 0.5 / 7)[:, None]
    direction = direction / direction.square().mean().sqrt()
    rows = direction.square().mean(1, keepdim=True).sqrt()
    direction = direction * (ROW_CAP / rows).clamp(max=1)
    torch.testing.assert_close(before - model.table.weight.detach(), RATE * direction, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("on", "nesterov"), [("gradient", False), ("gradient", True), ("update", False), ("update", True)]
)
def test_exact_over_several_steps(on: str, nesterov: bool) -> None:
    model = Bag(False).double()
    fields = {"embedding": "exact", "momentum": 0.7, "momentum_on": on, "nesterov": nesterov, "weight_decay": 0.1}
    optimizer = LNGD(model, lr=1e-2, ema_decay=0.9, damping_rho=0.3, **fields)
    average, seen, momentum = torch.zeros(7).double(), 0.0, torch.zeros(7, 4).double()
    for step in range(4):
        w, tokens = model.table.weight.detach().clone(), ids(step)
        model(tokens).square().mean().backward()
        g = model.table.weight.grad.clone()
        counts = torch.tensor([float((tokens == i).sum()) if i else 0.0 for i in range(7)]).double()
        average, seen = 0.9 * average + 0.1 * counts / counts.sum(), 0.9 * seen + 0.1
        if on == "gradient":
            momentum = 0.7 * momentum + 0.3 * g
            g = 0.7 * momentum + 0.3 * g if nesterov else momentum
        direction = g / (average / seen + 0.3 * (average / seen).mean())[:, None]
        direction = direction / direction.square().mean().sqrt()
        direction = direction * (ROW_CAP / direction.square().mean(1, keepdim=True).sqrt()).clamp(max=1)
        update = RATE * direction
        if on == "update":
            momentum = 0.7 * momentum + update
            update = update + 0.7 * momentum if nesterov else momentum
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(model.table.weight.detach(), w * (1 - RATE * 0.1) - update, rtol=1e-6, atol=1e-9)


def test_no_row_is_moved_further_than_the_cap() -> None:
    grad = torch.zeros(100, 4)
    grad[3] = 1.0  # one rare token: all the update would be its own
    direction = embedding_direction(grad, torch.zeros(100), torch.tensor(1e-9), 0.2)
    torch.testing.assert_close(direction[3].square().mean().sqrt(), torch.tensor(0.2 * ROW_CAP))


def test_a_table_without_gradient_rests() -> None:
    for embedding in ("rotated", "exact"):
        model = Bag(False)
        optimizer = LNGD(model, lr=1e-2, embedding=embedding)
        before = model.table.weight.detach().clone()
        model.head(torch.tanh(model.linear(torch.randn(3, 4)))).sum().backward()
        optimizer.step()
        assert torch.equal(model.table.weight, before)


@pytest.mark.parametrize("embedding", ["rotated", "exact", "fallback"])
def test_tied_marian_trains_all_its_uses(embedding: str) -> None:
    model = core_marian()
    optimizer = LNGD(model, lr=1e-2, embedding=embedding)
    before = model.model.shared.weight.detach().clone()
    core_step(model, optimizer, core_batch())
    assert not torch.equal(model.model.shared.weight, before)
    assert model.lm_head.weight is model.model.shared.weight


def test_a_turn_of_the_basis_makes_no_large_step_of_a_rare_row() -> None:
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8, bias=False))
    optimizer = LNGD(table, lr=1e-3, weight_decay=0.0)
    for step in range(20):
        before = table[0].weight.detach().clone()
        seen = torch.randint(50, (4,)) if step else torch.arange(50)  # after the first step most rows are seen rarely
        (table(seen) * torch.randn(8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (table[0].weight.detach() - before).abs().max() < 5 * 3e-3  # a few of its rate
