"""Golden runs end where their records say. See `golden` for what is recorded, and how to record anew."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.integration import golden

ALONE = [name for name, run in golden.RUNS.items() if run.ranks == 1]
TOGETHER = [name for name, run in golden.RUNS.items() if run.ranks > 1]


@cache
def distributed(ranks: int) -> dict[str, Any]:
    """Processes start once for all runs of as many."""
    return golden.train_all([name for name in TOGETHER if golden.RUNS[name].ranks == ranks], ranks)


def check(found: dict[str, Any], name: str) -> None:
    expected = golden.load_records()[name]
    gap, where = golden.deviation(found, expected)
    assert gap <= expected["tolerance"], f"{name}: {where} is off by {gap:.1e} of its norm"


def test_each_run_has_a_record() -> None:
    assert list(golden.load_records()) == list(golden.RUNS)


@pytest.mark.parametrize("name", ALONE)
def test_golden_run(name: str) -> None:
    check(golden.train(golden.RUNS[name]), name)


@pytest.mark.parametrize("name", TOGETHER)
def test_golden_run_of_processes(name: str) -> None:
    found = distributed(golden.RUNS[name].ranks)[name]
    assert not isinstance(found, str), found
    check(found, name)
