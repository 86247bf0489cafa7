"""The paper's frame: its search of rates, its tables, and readings that are gone when their run has ended."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from studies.study_helpers import row_of, write_multi30k
from torch import Tensor, nn

from benchmarks.studies import paper_frame, paper_readings, tiny
from benchmarks.studies.paper_frame import ALL, GRID, METHODS, READINGS, Study, climb
from benchmarks.studies.runs import Results
from benchmarks.tasks.registry import load_task
from hf_lngd import LNGD, LNGDConfig


@pytest.mark.parametrize("start", [1e-4, 0.03, 3.0])
@pytest.mark.parametrize(
    ("loss_of", "best"),
    [
        (lambda rate: abs(math.log(rate / 0.01)), 0.01),
        (lambda rate: rate, 1e-4),
        (lambda rate: -rate, 3.0),
        (lambda rate: -rate if rate < 0.005 else math.inf, 3e-3),
    ],
)
def test_the_search_ends_where_both_neighbours_are_worse(start: float, loss_of: object, best: float) -> None:
    losses: dict[float, float] = {}
    while (rate := climb(start, losses)) is not None:
        assert rate not in losses
        losses[rate] = loss_of(rate)  # type: ignore[operator]
    at = GRID.index(best)
    assert min(losses, key=lambda rate: losses[rate]) == best
    assert set(GRID[max(0, at - 1) : at + 2]) <= set(losses)


def test_runs_that_are_there_are_not_run_again(tmp_path: Path) -> None:
    task = load_task("multi30k", write_multi30k(tmp_path / "data"))
    results, study = Results(tmp_path / "rows.json"), Study("multi30k", 6, 3, evaluations=2)
    for _ in range(2):
        paper_frame.run_study(results, study, task, ["lngd", "adamw"])
    for name in ("lngd", "adamw"):
        rows = [row for row in results.rows if row["method"] == name]
        searched = {row["settings"]["lr"]: paper_frame.loss_of(row) for row in rows if row["phase"] == "tune"}
        best = min(searched, key=lambda rate: searched[rate])
        reported = [(row["settings"]["lr"], row["seed"], row["steps"]) for row in rows if row["phase"] == "report"]
        assert climb(ALL[name].start, searched) is None and len(rows) == len(searched) + 2
        assert reported == [(best, 1, 6), (best, 2, 6)]
        assert [step for step, _, _ in rows[-1]["validation_curve"]] == [3, 6]
    table = paper_frame.frames_table(results, study, Results(tmp_path / "none.json"))
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["Adam", "LNGD"]


def test_times_of_steps_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_frame, "INTERVAL", 2)
    task = load_task("multi30k", write_multi30k(tmp_path / "data"))
    results, study = Results(tmp_path / "rows.json"), Study("multi30k", 6, 3)
    paper_frame.time_steps(results, study, task, ["kfac", "part"])
    assert all(row["seconds"] > 0 for row in results.rows)
    ratio = results.rows[1]["seconds"] / results.rows[0]["seconds"]
    lines = paper_frame.times_table(results, study).splitlines()[2:]
    assert lines[0].startswith("| KFAC |") and lines[0].endswith("| 1.00 |") and lines[1].endswith(f"| {ratio:.2f} |")


def test_tables_of_rows(tmp_path: Path) -> None:
    results, study = Results(tmp_path / "rows.json"), Study("cifar10-resnet", 8, 4)
    for phase, rate, seed, loss in (
        ("tune", 0.1, 101, 2.0),
        ("tune", 0.03, 101, 1.5),
        ("tune", 0.3, 101, None),
        ("report", 0.03, 1, 1.0),
        ("report", 0.03, 2, 1.2),
        ("report", 0.1, 1, 0.5),  # of another rate: it was no choice of the search
    ):
        row = row_of("lngd", seed, [(4 if phase == "tune" else 8, 0.4, loss)], phase)  # type: ignore[list-item]
        settings = row["settings"] | {"lr": rate}
        accuracy = None if loss is None else 0.5
        results.add({**row, "settings": settings, "method": "lngd", "task": "cifar10-resnet", "accuracy": accuracy})
    cells = "0.03 | 1.100 ± 0.141 | 50.0 ± 0.0 |"
    assert paper_frame.frames_table(results, study, results).splitlines()[2:] == [f"| LNGD | {cells} 36 | – | – |"]
    assert paper_frame.readings_table(results, study).splitlines()[2:] == [f"| LNGD | {cells}"]


def _network() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, tiny.CLASSES)]
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(8), nn.ReLU(), *head).double()


def _train(reading: paper_readings.Reading, fields: str, images: tiny.Batch, steps: int = 5) -> list[Tensor]:
    """α of each step's layers."""
    with reading():
        model = _network()
        config = LNGDConfig.from_optim_args(f"preset=paper,factor_interval=3,inverse_interval=3{fields}")
        optimizer = LNGD(model, lr=1e-2, config=config)
        rates = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images["pixel_values"]), images["labels"])
            loss.backward()
            optimizer.step()
            rates.append(torch.cat([batch.rate for batch in optimizer.core.batches]))
        optimizer.close()
    return rates


@pytest.mark.parametrize("name", [name for name in READINGS if name != "lngd"])
def test_a_reading_changes_its_own_run_alone(name: str) -> None:
    images = tiny.images(0, 32)
    before, own = _train(paper_readings.text, "", images), _train(ALL[name].reading, _changes(name), images)
    assert not all(torch.equal(x, y) for x, y in zip(before, own, strict=True))
    after = _train(paper_readings.text, "", images)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def _changes(name: str) -> str:
    """What of a reading's fields is not the paper's own."""
    return ALL[name].fields.removeprefix(METHODS["lngd"].fields)


@pytest.mark.parametrize("reading", [paper_readings.eighth, paper_readings.as_built])
def test_a_part_of_the_images_stands_for_all(reading: paper_readings.Reading) -> None:
    one = tiny.images(0, 1)
    images = {key: value.repeat(32, *[1] * (value.dim() - 1)) for key, value in one.items()}
    fields = ",fisher=expected"  # which draws nothing
    for x, y in zip(_train(paper_readings.text, fields, images), _train(reading, fields, images), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=0)


def test_rates_are_held_between_factor_steps() -> None:
    rates = _train(paper_readings.held, "", tiny.images(0, 16))
    assert torch.equal(rates[0], rates[2]) and torch.equal(rates[3], rates[4])
    assert not torch.equal(rates[0], rates[3])


def test_gradients_of_the_batch_alone_make_the_rate_of_their_slope() -> None:
    slope = torch.tensor([2.0, -1.0, 0.0])
    with paper_readings.of_batch():
        from hf_lngd.paper import rate

        found = rate.adaptive_rate(slope, torch.ones(3), 1e-3)
    torch.testing.assert_close(found, slope / (slope.square() + 1e-3))


def test_the_tables_of_the_docs_are_those_of_the_rows() -> None:
    results, ours = Results(paper_frame.RESULTS / "paper_frame.json"), paper_frame.RESULTS / f"{paper_frame.OURS}.json"
    page = (paper_frame.RESULTS.parents[1] / "docs" / "theory.md").read_text(encoding="utf-8")
    for study in paper_frame.STUDIES.values():
        for made in (
            paper_frame.frames_table(results, study, Results(ours)),
            paper_frame.readings_table(results, study),
            paper_frame.times_table(results, study),
        ):
            assert made.count("\n") == 2 or made in page
