"""Each row of the table of faults happens as it says, and the committed table is that of these rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contract.fault_table import FILE, Fault, happen, load_rows, table

ROWS = load_rows()


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        pytest.param(row, fields, id=f"{row.name} {','.join(f'{k}={v}' for k, v in fields.items())}".strip())
        for row in ROWS
        for fields in row.variants
    ],
)
def test_row(row: Fault, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happen(row, fields, tmp_path, monkeypatch)


def test_there_are_enough_rows_and_none_twice() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 60


def test_the_committed_table_is_this_one() -> None:
    assert FILE.read_text(encoding="utf-8") == table(), "python -m tests.contract.fault_table --write"
