"""Tables of a study: on one clock, of the seeds that compare, with what diverged."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_helpers import row_of

from benchmarks.report import clocks, result_tables, tables
from benchmarks.studies import runs, spec
from benchmarks.studies.rivals import Settings, label


def test_time_to() -> None:
    curve = [(10.0, 5.0), (20.0, 4.0), (30.0, 3.5)]
    assert clocks.time_to(curve, 4.5) == pytest.approx(15)
    assert clocks.time_to(curve, 3.5) == pytest.approx(30)
    assert clocks.time_to(curve, 6.0) == clocks.time_to(curve, 5.5) == 10
    assert clocks.time_to(curve, 3.0) is None


def test_tables(tmp_path: Path) -> None:
    results = runs.Results(tmp_path / "r.json")
    for seed in (1, 2):
        results.add(row_of("adamw", seed, [(50, 10.0, 5.0), (100, 20.0, 4.0 + seed / 10)]))
        results.add(row_of("lngd", seed, [(50, 12.0, 4.5 + seed / 10), (100, 24.0, 3.5 + seed / 10)]))
        results.add(row_of("lngd", seed, [(25, 6.0, 5.0), (50, 12.0, 4.1 + seed / 10)]))
    results.add(row_of("muon", 1, [(50, 11.0, 5.0), (100, 22.0, None)]))  # type: ignore[list-item]

    def cells_of(text: str) -> list[list[str]]:
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:] if line]

    adamw, muon, lngd = cells_of(tables.results_table(results, ["adamw", "muon", "lngd"], label))
    assert adamw[1:5] == ["4.150 ± 0.071", "20.0 ± 0.0", "20.0", "100"]
    assert lngd[1:5] == ["3.650 ± 0.071", "24.0 ± 0.0", "18.0", "75"]
    assert muon[1:5] == ["–", "–", "never", "never"] and muon[-2:] == ["0", "1"]
    adamw, lngd = cells_of(tables.ratio_table(results, ["adamw", "muon", "lngd"], label))
    assert adamw[1:] == ["1.00", "–"]
    # On its own schedules: 12 s give 4.25, 24 s give 3.65, so 4.15 takes 14 of AdamW's 20 s.
    assert lngd[1:] == ["0.90", "0.70"]


def test_runs_of_several_lengths_compare_on_the_seeds_that_have_them_all(tmp_path: Path) -> None:
    """A seed that ended lower or on a slower day, and has no shorter run, makes neither side better."""
    results = runs.Results(tmp_path / "r.json")
    for seed, loss, slower in ((1, 4.0, 1.0), (2, 5.0, 2.0)):
        results.add(row_of("adamw", seed, [(50, slower * 10.0, 6.0), (100, slower * 20.0, loss)]))
    results.add(row_of("lngd", 1, [(25, 6.0, 5.0), (50, 10.0, 4.5)]))
    results.add(row_of("lngd", 1, [(50, 10.0, 5.0), (100, 20.0, 3.5)]))
    results.add(row_of("lngd", 2, [(50, 10.0, 4.0), (100, 20.0, 3.0)]))
    assert tables.seeds_of_all_lengths(results, "lngd") == {1}
    found = tables.ratio(results, "lngd", "adamw", "loss")
    assert (found.own, found.seeds) == (pytest.approx(0.75), 1)  # 4.0 between 4.5 after 10 s and 3.5 after 20
    assert found.texts()[1] == "0.75 (one seed)"
    results.add(row_of("lngd", 2, [(25, 6.0, 5.0), (50, 10.0, 4.5)]))
    found = tables.ratio(results, "lngd", "adamw", "loss")
    # the mean of both: 4.5 is reached after 10 of 30 s
    assert (found.own, found.seeds, found.texts()[1]) == (pytest.approx(1 / 3), 2, "≤ 0.33")
    results.add(row_of("adamw", 1, [(25, 5.0, 6.0), (50, 10.0, 5.0)]))
    assert tables.ratio(results, "adamw", "adamw", "loss").own == pytest.approx(1.0)  # whatever the other seeds took


def test_diverged_runs_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No goal is met by the seeds that were lucky, and the table of results counts the others."""
    results = runs.Results(tmp_path / "r.json")
    for name in ("adamw", "lngd"):
        results.add(row_of(name, 1, [(50, 5.0, 5.0), (100, 20.0, 4.0)]))
    monkeypatch.setattr(result_tables, "results_of", lambda name: (spec.named(name), results))
    assert result_tables._goal(results, "lngd", "adamw", "loss", 1.0) == "**(1.00)**"
    assert "diverged" not in result_tables.study("multi30k")
    results.add(row_of("lngd", 2, [(50, 5.0, None)]))  # type: ignore[list-item]
    assert result_tables._goal(results, "lngd", "adamw", "loss", 1.0) == "diverged"
    lines = result_tables.study("multi30k").splitlines()
    at = [cell.strip() for cell in lines[0].split("|")].index("diverged")
    counts = {line.split("|")[1].strip(" *"): line.split("|")[at].strip() for line in lines[2:]}
    assert counts == {"AdamW (two rates)": "0", "LNGD (two rates)": "1"}


def test_whether_the_goal_in_time_is_met(tmp_path: Path) -> None:
    """Bold: met; in brackets: within runs, as no shorter ones were made; what was not run has a dash."""
    results = runs.Results(tmp_path / "r.json")
    results.add(row_of("adamw", 1, [(50, 10.0, 5.0), (100, 20.0, 4.0)]))
    results.add(row_of("muon", 1, [(50, 10.0, 5.0), (100, 20.0, 3.9)]))
    results.add(row_of("lngd", 1, [(50, 9.0, 4.0), (100, 18.0, 3.8)]))
    results.add(row_of("lngd-same", 1, [(50, 9.0, 5.0), (100, 22.0, 4.0)]))

    def goal(ours: str, other: str, most: float) -> str:
        return result_tables._goal(results, ours, other, "loss", most)

    assert goal("lngd", "adamw", 0.5) == "**(0.45)**" and goal("lngd", "adamw", 0.4) == "(0.45)"
    assert goal("lngd-same", "adamw", 0.5) == "(1.10)" and goal("lngd-same", "muon", 0.9) == "never"
    assert goal("lngd", "soap", 0.9) == "–"
    results.add(row_of("lngd", 1, [(25, 4.0, 4.1)]))  # 3.8 after 18 s, 4.1 after 4
    assert goal("lngd", "muon", 0.7) == "0.67 (one seed)"
    results.add(row_of("muon", 2, [(50, 10.0, 5.0), (100, 20.0, 3.9)]))
    for curve in ([(50, 9.0, 4.0), (100, 18.0, 3.8)], [(25, 4.0, 4.1)]):
        results.add(row_of("lngd", 2, curve))
    assert goal("lngd", "muon", 0.7) == "**0.67**"
    for seed in (1, 2):
        results.add(row_of("lngd", seed, [(12, 2.0, 3.9)]))
    assert goal("lngd", "muon", 0.7) == "**≤ 0.10**"


def test_rows_of_two_kinds_of_hardware_are_on_one_clock(tmp_path: Path) -> None:
    """Seconds are those of the hardware with most of AdamW's rows: a rival's elsewhere are scaled as AdamW's are."""
    results = runs.Results(tmp_path / "r.json")
    slow = {"hardware": "CPU, 1 threads, bfloat16 emulated"}
    for seed in (1, 2):
        results.add({**row_of("adamw", seed, [(50, 10.0, 5.0), (100, 20.0, 4.0)]), "hardware": "CPU, 1 threads"})
    results.add({**row_of("adamw", 3, [(50, 20.0, 5.0), (100, 40.0, 4.0)]), **slow})
    results.add({**row_of("lngd", 1, [(50, 30.0, 4.0), (100, 60.0, 3.0)]), **slow})
    results.add({**row_of("muon", 1, [(50, 7.0, 4.0), (100, 14.0, 3.0)]), "hardware": "another"})
    assert [row["seconds"] for row in tables.reported(results, "adamw")] == [20.0, 20.0, 20.0]
    (lngd,) = tables.reported(results, "lngd")
    assert (lngd["seconds"], lngd["validation_curve"]) == (30.0, [(50, 15.0, 4.0), (100, 30.0, 3.0)])
    assert tables.reported(results, "muon")[0]["seconds"] == 14.0  # AdamW was not run there
    # a step of AdamW's takes as long with one rate, in a run of any length: half as long there
    results.add({**row_of("adamw-one", 1, [(25, 2.5, 5.0), (50, 5.0, 4.0)]), "hardware": "another"})
    assert tables.reported(results, "muon")[0]["seconds"] == 28.0
    assert results.find("report", "lngd")[0]["seconds"] == 60.0  # the file keeps what was measured
    body = tables.ratio_table(results, ["adamw", "lngd"], label).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in body if line] == ["1.00", "0.75"]


def test_the_best_settings_are_the_best_over_tuning_seeds(tmp_path: Path) -> None:
    results = runs.Results(tmp_path / "r.json")
    for rate, values in ((1e-3, (3.0, 3.6)), (2e-3, (3.2, 3.2)), (4e-3, (2.9, None))):
        for seed, loss in enumerate(values):
            row = row_of("lngd", seed, [(10, 1.0, loss)], "tune")  # type: ignore[list-item]
            results.add({**row, "settings": Settings(rate, 1e-2).to_dict()})
    assert results.best("lngd").lr == 2e-3
    assert tables.tuning_table(results, ["lngd"], label).count("**0.002/") == 2  # what is reported, of each seed
    assert "**0.004/" not in tables.tuning_table(results, ["lngd"], label)
    with pytest.raises(ValueError, match="no tuning run of soap"):
        results.best("soap")
