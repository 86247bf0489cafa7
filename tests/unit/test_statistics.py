"""Sums of one factor step: masks, pieces, steps in which nothing was seen."""

from __future__ import annotations

import torch

from hf_lngd.statistics import InputStatistics
from tests.reference import blockwise


def test_sums_of_pieces_are_those_of_the_whole_and_masked_tokens_count_for_nothing() -> None:
    torch.manual_seed(0)
    a, mask = torch.randn(2, 9, 5).double(), torch.arange(9) % 3 > 0
    whole, pieces = InputStatistics(2, (2, 3)), InputStatistics(2, (2, 3))
    whole.add(a, mask)
    for part in (slice(0, 4), slice(4, 9)):
        pieces.add(a[:, part], mask[part])
    for unit in range(2):
        own = a[unit, mask]
        expected = blockwise(own.T @ own / mask.sum(), 2, 3)
        for one in (whole, pieces):
            found = torch.block_diag(*one.factors(None)["phi"][unit])[:5, :5]
            torch.testing.assert_close(found, expected)
    assert int(whole.n) == int(pieces.n) == int(mask.sum())


def test_a_step_without_tokens_has_no_factor() -> None:
    empty = InputStatistics(1, (1, 3))
    sums = empty.all_sums(torch.empty(0).double())
    assert {name: tuple(value.shape) for name, value in sums.items()} == {"phi": (1, 1, 3, 3), "n": ()}
    empty.add(torch.randn(1, 4, 3), torch.zeros(4))
    assert empty.factors(None)["phi"].isnan().all()


def test_samples_that_were_left_out_are_made_up_for() -> None:
    one = InputStatistics(1, (1, 3))
    assert one.scale_of_samples == 1.0
    one.seen, one.kept = 8, 2
    assert one.scale_of_samples == 4.0
