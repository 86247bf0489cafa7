"""The paper's direction: sums of Φ and Ψ, their inverses, and D itself against the dense definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_lngd import LNGD
from hf_lngd.paper.natural import WeightedStatistics, estimates_psi, output_statistic, psi_inverse
from tests.reference import blockwise, damping_of, factors


def test_sums_are_those_of_the_tokens_that_count() -> None:
    torch.manual_seed(0)
    a, g, mask = torch.randn(2, 9, 5).double(), torch.randn(2, 9, 4).double(), torch.arange(9) % 3 > 0
    whole, pieces = WeightedStatistics(2, (2, 3), 4), WeightedStatistics(2, (2, 3), 4)
    whole.add(a, g.square(), mask)
    for part in (slice(0, 4), slice(4, 9)):
        pieces.add_gradient(a[:, part], g[:, part], mask[part], 1)
    pieces.seen, pieces.kept = 8, 2
    for unit in range(2):
        phi, psi = factors(a[unit, mask], g[unit, mask].square())
        for one in (whole, pieces):
            found = torch.block_diag(*one.factors(None)["phi"][unit])[:5, :5]
            torch.testing.assert_close(found, blockwise(phi, 2, 3))
            torch.testing.assert_close(one.factors(None)["psi"][unit], psi)
        scaled = torch.block_diag(*pieces.factors(0.5)["phi"][unit])[:5, :5]  # of two samples in eight
        torch.testing.assert_close(scaled, blockwise(phi * mask.sum() * 0.5 * 4, 2, 3))
        torch.testing.assert_close(
            output_statistic(a[unit], g[unit].square())[None], a[unit].square().sum(1)[None] @ g[unit].square()
        )
    assert int(whole.n) == int(pieces.n) == int(mask.sum())


def test_psi_of_zeros_is_uniform_and_of_an_overflow_not_used() -> None:
    zeros, large = WeightedStatistics(1, (1, 3), 4), WeightedStatistics(1, (1, 3), 4)
    zeros.add(torch.ones(1, 2, 3), torch.zeros(1, 2, 4))
    assert torch.equal(zeros.factors(None)["psi"], torch.full((1, 4), 0.25))
    large.add(torch.full((1, 2, 3), 1e18), torch.full((1, 2, 4), 30.0))  # v is finite, its sum is not
    assert large.factors(None)["psi"].isnan().all()


@pytest.mark.parametrize("kind", ["relative", "paper"])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_psi_is_damped_by_its_mean(kind: str, size: float) -> None:
    psi = torch.tensor([[0.1, 0.2, 0.7], [0.0, 0.0, 1.0]]).double() * size
    found = psi_inverse(psi, kind, 0.3, (1e-4, 1e-1))
    for row, value in zip(psi, found, strict=True):
        lam = damping_of(float(row.mean()), kind, 0.3, 1e-4, 1e-1)
        torch.testing.assert_close(value, 1 / (row + lam))


@pytest.mark.parametrize("damping", [{}, {"damping": "paper", "damping_bounds": (1e-4, 1e-1)}], ids=str)
@pytest.mark.parametrize("rate", ["none", "rms"])
def test_the_direction_solves_the_damped_factors(damping: dict[str, object], rate: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    fields = {"direction": "natural", "fisher": "empirical", "momentum": 0.0, "weight_decay": 0.0, "rate": rate}
    optimizer = LNGD(model, lr=1e-2, max_factor_dim=99, **fields, **damping)
    x, before = torch.randn(6, 5).double(), model[0].weight.detach().clone()
    (s := model(x)).exp().sum(1).mean().backward()
    phi, psi = factors(x, s.detach().exp().square())
    grad, c = model[0].weight.grad.clone(), optimizer.config
    optimizer.step()
    torch.testing.assert_close(optimizer.factors("0")["phi"][: len(phi)], phi)
    torch.testing.assert_close(optimizer.factors("0")["psi"], psi)
    lam, lam_psi = (
        damping_of(float(m), c.damping, c.damping_rho, *c.damping_bounds) for m in (phi.trace() / 5, psi.mean())
    )
    expected = torch.diag(1 / (psi + lam_psi)) @ grad @ torch.linalg.inv(phi + lam * torch.eye(5).double())
    if rate == "rms":
        expected = expected / expected.square().mean().sqrt()
    torch.testing.assert_close((before - model[0].weight.detach()) / 1e-2, expected)


@pytest.mark.parametrize(
    ("follows", "fisher", "expected"),
    [((), "expected", False), (("relu",), "expected", True), ((), "sampled", True), ((), "empirical", True)],
)
def test_psi_is_estimated_where_it_is_not_uniform(follows: tuple[str, ...], fisher: str, expected: bool) -> None:
    assert estimates_psi(follows, fisher) is expected
