"""`embedding=exact`: tables stepped by exact token frequencies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_lngd import LNGD, LNGDConfig
from tests.helpers import seeded

RATE = 1e-2 * LNGDConfig().fallback_lr_scale  # of tables, where lr is 1e-2
# A row's step is at most this multiple of the table's root mean square.
ROW_CAP = 4.0


class Bag(nn.Module):
    """A table whose rows are summed, maybe tied to a head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.linear(self.table(ids).sum(1))))


def ids(seed: int) -> Tensor:
    return torch.randint(0, 7, (12, 3), generator=torch.Generator().manual_seed(seed))


def capped(direction: Tensor) -> Tensor:
    """Of root mean square 1, then each row at most `ROW_CAP`."""
    direction = direction / direction.square().mean().sqrt()
    return direction * (ROW_CAP / direction.square().mean(1, keepdim=True).sqrt()).clamp(max=1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("on", ["gradient", "update"])
def test_gradients_are_divided_by_token_frequency(on: str, tied: bool) -> None:
    """Averages, damping, momentum, decay and the cap, over several steps; padding does not count."""
    model = seeded(lambda: Bag(tied)).double()
    fields = {"embedding": "exact", "momentum": 0.7, "momentum_on": on, "weight_decay": 0.1}
    optimizer = LNGD(model, lr=1e-2, ema_decay=0.9, damping=0.3, factor_interval=1, **fields)
    average, seen, momentum = torch.zeros(7).double(), 0.0, torch.zeros(7, 4).double()
    for step in range(4):
        w, tokens = model.table.weight.detach().clone(), ids(step)
        model(tokens).square().mean().backward()
        g = model.table.weight.grad.clone()
        counts = torch.tensor([float((tokens == i).sum()) if i else 0.0 for i in range(7)]).double()
        average, seen = 0.9 * average + 0.1 * counts / counts.sum(), 0.9 * seen + 0.1
        if on == "gradient":
            momentum = 0.7 * momentum + 0.3 * g
            g = 0.7 * momentum + 0.3 * g
        update = RATE * capped(g / (average / seen + 0.3 * (average / seen).mean())[:, None])
        if on == "update":
            momentum = update = 0.7 * momentum + update
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(model.table.weight.detach(), w * (1 - RATE * 0.1) - update, rtol=1e-6, atol=1e-9)


def test_a_table_without_gradient_rests() -> None:
    model = seeded(lambda: Bag(False))
    optimizer = LNGD(model, lr=1e-2, embedding="exact")
    before = model.table.weight.detach().clone()
    model.head(torch.tanh(model.linear(torch.randn(3, 4)))).sum().backward()
    optimizer.step()
    assert torch.equal(model.table.weight, before)
