"""The forecast of a step that a run prints at its start, against the steps that were timed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.cost.small_batches import CASES, RESULTS
from hf_lngd import LNGD
from hf_lngd.integrations.forecast import counting, step_to_adamw

ROWS = {row["model"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]}


@pytest.mark.parametrize("name", ROWS)
def test_it_is_within_a_quarter_of_what_was_timed(name: str) -> None:
    make, feed = CASES[name][0]
    torch.manual_seed(0)
    model = make().train()
    optimizer = LNGD(model)
    optimizer.eval()
    with counting(model, optimizer) as work:
        model(**feed(torch.Generator().manual_seed(0)))
    found = step_to_adamw(optimizer, work)
    print(f"{name}: forecast {found:.2f}, timed {ROWS[name]['step_to_adamw']:.2f}")
    assert found == pytest.approx(ROWS[name]["step_to_adamw"], rel=0.25)
    assert found - 1 == pytest.approx(ROWS[name]["step_to_adamw"] - 1, rel=0.6)  # a forecast of 1 would not do
