"""Every image classifier and translation model of transformers trains, accumulates and resumes, or has its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.models.auto import modeling_auto

from benchmarks.coverage import check as coverage
from benchmarks.coverage import zoo
from hf_lngd import LNGD

RESULTS = coverage.RESULTS
RERUN = "run `python -m benchmarks.coverage.check` and commit its files"


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    """The committed results."""
    return json.loads((RESULTS / "coverage.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_step_and_share(name: str, committed: dict[str, Any]) -> None:
    owned, parameters = coverage.check_step(zoo.ZOO[name])
    row = next(row for row in committed["models"] if row["model"] == name)
    assert parameters <= 150_000
    assert (parameters, owned.weights) == (row["parameters"], row["weights"]), RERUN
    assert owned.share == pytest.approx(row["share"], abs=1e-4), RERUN
    weights, share = coverage.full_size(zoo.ZOO[name])
    assert (weights, round(share, 4)) == (row["full_weights"], row["full_share"]), RERUN
    rest = {part["reason"]: (part["share"], part["example"], part["has_gradient"]) for part in row["rest"]}
    assert rest == {reason: (round(n / owned.weights, 4), *more) for reason, (n, *more) in owned.rest.items()}, RERUN


@pytest.mark.parametrize("name", [name for name, entry in zoo.ZOO.items() if "accumulation" not in entry.exempt])
def test_accumulation(name: str) -> None:
    coverage.check_accumulation(zoo.ZOO[name])


@pytest.mark.parametrize("name", zoo.ZOO)
def test_resume(name: str) -> None:
    coverage.check_resume(zoo.ZOO[name])


@pytest.mark.parametrize("name", zoo.ZOO)
def test_size(name: str) -> None:
    coverage.check_size(zoo.ZOO[name])


def test_every_architecture_of_the_tables_transformers_is_built_or_has_a_reason(committed: dict[str, Any]) -> None:
    unknown = zoo.unknown()
    newer = Version(transformers.__version__) > Version(committed["transformers"])
    if unknown and newer:  # a release of transformers may not break this one
        pytest.skip(f"transformers {transformers.__version__} is newer than the table and has {', '.join(unknown)}")
    assert not unknown, (
        f"transformers {transformers.__version__} maps models that benchmarks/coverage/images.py and translation.py "
        f"neither build nor give a reason for: {', '.join(unknown)}"
    )
    assert not {entry.architecture for entry in zoo.ZOO.values()} & set(zoo.ABSENT)
    assert all(zoo.ABSENT.values())


def test_a_new_architecture_or_head_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "newnet", "NewNetForImages")
    monkeypatch.setitem(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "bart", ("New", "NewToo"))
    assert set(zoo.unknown()) == {"newnet: NewNetForImages", "bart: New", "bart: NewToo"}


def test_the_table_is_what_the_file_says(committed: dict[str, Any]) -> None:
    assert (RESULTS / "coverage.md").read_text(encoding="utf-8") == coverage.markdown(committed), RERUN
    rows = {row["model"]: row for row in committed["models"]}
    assert list(rows) == list(zoo.ZOO), RERUN
    for name, entry in zoo.ZOO.items():
        assert (rows[name]["architecture"], rows[name]["class"]) == (entry.architecture, entry.class_name), RERUN
        assert rows[name]["remark"] == coverage.remark(entry, rows[name]["share"]), RERUN
        assert rows[name]["covered"], RERUN
    assert len(coverage.covered(committed["models"])) >= 40


def test_the_models_have_no_dropout_and_no_chance() -> None:
    for name in ("prophetnet", "efficientnet", "swin", "m2m_100", "bigbird_pegasus"):
        entry = zoo.ZOO[name]
        model, tensors = coverage.make(entry), zoo.batch(entry, dtype=coverage.dtype_of(entry))
        losses = {float(coverage.loss_of(model, tensors, 1).detach()) for _ in range(3)}
        assert len(losses) == 1, name


def test_the_checks_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = zoo.ZOO["vit"]
    with monkeypatch.context() as m:
        m.setattr(LNGD, "step", lambda self: None)
        with pytest.raises(coverage.CheckFailed, match="not moved by a step"):
            coverage.check_step(vit)
    with monkeypatch.context() as m:
        m.setattr(LNGD, "load_state_dict", lambda self, state: None)
        with pytest.raises(coverage.CheckFailed, match="unlike after resuming"):
            coverage.check_resume(vit)
    with monkeypatch.context() as m:
        m.setattr(nn.BatchNorm2d, "eval", lambda self: self)
        with pytest.raises(coverage.CheckFailed, match="two micro-batches are"):
            coverage.check_accumulation(zoo.ZOO["resnet"])
    with monkeypatch.context() as m:
        m.setitem(coverage.LNGD_FIELDS, "rate_scale", 100.0)
        with pytest.raises(coverage.CheckFailed, match="times the rate"):
            coverage.check_size(vit)


def test_a_failure_is_a_row_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such luck\nand more")

    entry = zoo.ZOO["vit"]
    with monkeypatch.context() as m:
        m.setitem(coverage.MORE_CHECKS, "resume", broken)
        row = coverage.row_of(entry)
    assert (row["step"], row["resume"], row["covered"]) == ("yes", "no: RuntimeError: no such luck", False)
    monkeypatch.setattr(coverage, "make", broken)
    row = coverage.row_of(entry)
    assert row["step"] == "no: RuntimeError: no such luck" and not row["covered"]
    result = {"torch": torch.__version__, "transformers": "5", "models": [row], "absent": {"dinat": "needs natten"}}
    assert "**0 of 1 architectures**" in coverage.markdown(result) and "needs natten" in coverage.markdown(result)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coverage.main(["--models", "vit", "bit", "--results", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "bit: 1.4 %" in printed and "covered: 2 architectures" in printed
    result = json.loads((tmp_path / "coverage.json").read_text(encoding="utf-8"))
    assert (tmp_path / "coverage.md").read_text(encoding="utf-8") == coverage.markdown(result)
    with pytest.raises(ValueError, match="--models: got 'vitt', accepted: beit, "):
        coverage.main(["--models", "vitt"])
