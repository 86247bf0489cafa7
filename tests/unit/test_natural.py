"""Where Ψ is nothing, too large or uniform. The direction itself: tests/contract/test_step.py."""

from __future__ import annotations

import pytest
import torch

from hf_lngd.paper.natural import WeightedStatistics, estimates_psi


def test_psi_of_zeros_is_uniform_and_of_an_overflow_not_used() -> None:
    zeros, large = WeightedStatistics(1, (1, 3), 4), WeightedStatistics(1, (1, 3), 4)
    zeros.add(torch.ones(1, 2, 3), None, torch.zeros(1, 2, 4))
    assert torch.equal(zeros.factors(None)["psi"], torch.full((1, 4), 0.25))
    large.add(torch.full((1, 2, 3), 1e18), None, torch.full((1, 2, 4), 30.0))  # v is finite, its sum is not
    assert large.factors(None)["psi"].isnan().all()


@pytest.mark.parametrize(
    ("follows", "fisher", "expected"),
    [((), "expected", False), (("relu",), "expected", True), ((), "sampled", True), ((), "empirical", True)],
)
def test_psi_is_estimated_where_it_is_not_uniform(follows: tuple[str, ...], fisher: str, expected: bool) -> None:
    assert estimates_psi(follows, fisher) is expected
