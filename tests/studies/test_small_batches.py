"""`benchmarks.cost.small_batches` on a tiny model: what it writes, and what it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.optim import _muon

from benchmarks.cost import cases, small_batches
from hf_lngd import linalg


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.text(lambda: cases.marian(16, 32, 2, 1, 50), 2, 4, 50)
    monkeypatch.setattr(small_batches, "CASES", {"tiny": (case, 1e9), "other": (case, 0.0)})
    monkeypatch.setattr(small_batches, "COUNTED", {"tiny": (case, 10_000)})


def test_rows_of_chosen_models_are_written_and_others_stay(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    for chosen in ("tiny", "other"):
        small_batches.main(["--models", chosen, "--results", str(file)])
    result = json.loads(file.read_text(encoding="utf-8"))
    assert [row["model"] for row in result["rows"]] == ["tiny", "other"]
    for row in result["rows"]:
        assert all(row[key] > 0 for key in ("adamw_ms", "muon_ms", "lngd_ms", "step_to_adamw", "optimizer_to_muon"))
        assert row["step_to_adamw"] == pytest.approx(row["lngd_ms"] / row["adamw_ms"], rel=0.02)
    assert 50 < result["calls"][0]["calls"] < 400
    lines = capsys.readouterr().out.splitlines()
    assert any("| tiny " in line and "| yes |" in line for line in lines)
    assert any("| other " in line and "| no |" in line for line in lines)
    with pytest.raises(ValueError, match="--rounds: got 30, accepted: a multiple of 20"):
        small_batches.main(["--rounds", "30", "--results", str(file)])
    with pytest.raises(ValueError, match="--models: got 'tin,', accepted: beginnings of tiny; other"):
        small_batches.main(["--models", "tin,", "--results", str(file)])


def test_views_are_no_calls() -> None:
    x = torch.randn(3, 4)
    with small_batches.Calls() as calls:
        y = x.view(4, 3).T[1:].unsqueeze(0)
        y = y * 2
        y.add_(1)
    assert calls.count == 2


@pytest.mark.parametrize("fast", [False, True])
def test_muon_is_torchs_but_for_its_precision(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_batches, "fast_bfloat16", lambda device: fast)
    own = _muon._zeropower_via_newtonschulz
    grad = torch.randn(4, 6)
    expected = own(grad, (3.4445, -4.775, 2.0315), 5, 1e-7).float()
    with small_batches.muon_in_float32():
        assert (_muon._zeropower_via_newtonschulz is own) == fast
        found = _muon._zeropower_via_newtonschulz(grad, (3.4445, -4.775, 2.0315), 5, 1e-7).float()
    assert _muon._zeropower_via_newtonschulz is own
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    assert linalg.fast_bfloat16 is not small_batches.fast_bfloat16
