"""AdamW that recovers, embeddings by token frequency, and what rounding takes off. In training: tests/contract."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import nn

from hf_lngd.adamw import ROW_CAP, AdamW, embedding_scale, rest_of
from hf_lngd.groups import Options
from hf_lngd.parallel.layout import Whole
from hf_lngd.parallel.ranks import Ranks

BF16 = torch.bfloat16


@pytest.mark.parametrize("kind", [torch.float32, BF16, torch.float64], ids=str)
def test_adamw_recovers_where_torchs_own_does_not(kind: torch.dtype) -> None:
    parameter, states = nn.Parameter(torch.ones(3, dtype=kind)), defaultdict(dict)
    adamw = AdamW()
    for value in (1.0, torch.nan, 1.0):
        parameter.grad = torch.full_like(parameter, value)
        adamw.step([parameter], Options(0.1, 0.0, 0.9, 0.999, 1e-8), states, Whole(Ranks()))
    assert parameter.isfinite().all() and int(adamw.skipped) == 1
    assert states[parameter]["step"] == 2
    assert states[parameter]["exp_avg"].dtype == torch.promote_types(kind, torch.float32)


def test_no_row_is_moved_further_than_the_cap() -> None:
    grad = torch.zeros(100, 4)
    grad[3] = 1.0  # one rare token: all the update would be its own
    rows = embedding_scale(grad.norm(dim=1), torch.zeros(100), torch.tensor(1e-9), 0.2, grad.shape, lambda own: own)
    direction = rows[:, None] * grad
    torch.testing.assert_close(direction[3].square().mean().sqrt(), torch.tensor(0.2 * ROW_CAP))


def test_the_rest_of_a_number_is_always_taken_for_that() -> None:
    """Of all magnitudes, powers of two and halves of gaps, whose rest is rounded to the next number's border."""
    torch.manual_seed(0)
    bits = torch.randint(0, 1 << 15, (200_000,), dtype=torch.int32) << 16
    tail = torch.randint(0, 1 << 16, (200_000,), dtype=torch.int32)
    tail[::4] = (1 << 15) + torch.randint(-200, 200, (50_000,), dtype=torch.int32)
    bits[1::4] &= 0x7F800000
    value = (bits | tail).view(torch.float32)
    value = value[value.isfinite() & value.to(BF16).isfinite() & (value.abs() > 1e-30)]
    for signed in (value, -value):
        weight = signed.to(BF16)
        lost = (signed - weight).to(BF16)
        assert torch.equal(rest_of(weight, lost), lost)
        assert not rest_of(weight, lost * 2.1)[lost.abs() > weight.abs() * 2**-9].any()
