"""The soak script: a short run is flat, a leak is found, the committed long run was flat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies import soak

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "soak.json"


def test_a_short_soak_is_flat_and_does_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "FAULT", 31)
    assert soak.main(["--steps", "60", "--results", str(tmp_path / "soak.json")]) == 0
    found = json.loads((tmp_path / "soak.json").read_text())
    assert [found[what] for what in ("evaluations", "checkpoints", "restarts", "faults")] == [8, 2, 1, 1]
    assert found["finite"] and len(found["samples"]) == soak.SAMPLES and found["samples"][-1][0] == 60
    assert '"flat": true' in capsys.readouterr().out


def test_a_leak_is_found() -> None:
    held: list[bytearray] = []
    assert soak.main(["--steps", "24"], lambda step: held.append(bytearray(50_000))) == 1


def test_growth_is_of_medians_between_the_last_two_thirds() -> None:
    assert soak.growth([9.0, 9.0, 9.0, 1.0, 2.0, 50.0, 4.0, 5.0, 6.0]) == 3.0


def test_too_few_steps_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        soak.main(["--steps", "3"])
    assert "--steps: got 3, accepted: an integer, at least 24" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        soak.main(["--optim_args", "dampign_rho=1"])
    assert "error: --optim_args: unknown name 'dampign_rho'" in capsys.readouterr().err


def test_the_committed_run_is_the_whole_one() -> None:
    found = json.loads(RESULT.read_text())
    assert found["steps"] == 20_000 and found["flat"] and found["finite"]
    assert min(found[what] for what in ("evaluations", "checkpoints", "restarts", "faults")) > 100
    page = " ".join((RESULT.parents[2] / "docs" / "cost.md").read_text().split())
    intervals = (found["config"]["factor_interval"], found["config"]["inverse_interval"])
    assert f"its `config` is the default of that time with intervals of {intervals[0]} and {intervals[1]}," in page
    assert found["loss_of_the_last_tenth"] < found["loss_of_the_first_tenth"]
