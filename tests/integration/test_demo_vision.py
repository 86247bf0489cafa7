"""`make demo-vision`: its data, that its runs differ in optimizer and rate alone, what it prints and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, ResNetForImageClassification

from hf_lngd import LNGDTrainingArguments
from hf_lngd.integrations.usage import UsageParser
from scripts import demo, demo_vision
from scripts.run_image_classification import DataArguments, ModelArguments


def commands() -> list[list[str]]:
    return [demo_vision.command(run, Path("in"), Path("out"), 1, []) for run in demo_vision.RUNS.values()]


def test_the_runs_differ_in_optimizer_and_rate_alone() -> None:
    one, other = commands()
    different = {before for before, a, b in zip(one, one[1:], other[1:], strict=False) if a != b}
    assert len(one) == len(other)
    assert different <= {"--optim", "--learning_rate"} and "--optim" in different


def test_digits_are_not_mirrored_and_the_arguments_are_the_scripts() -> None:
    parser = UsageParser([ModelArguments, DataArguments, LNGDTrainingArguments])
    for given in commands():
        assert given[given.index("--augment") + 1] == "crop"
        assert {part[2:] for part in given if part.startswith("--")} <= {action.dest for action in parser._actions}


def test_the_data_are_all_digits_each_once(tmp_path: Path) -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    demo_vision.write_digits(tmp_path)
    demo_vision.write_digits(tmp_path)
    files = {part: sorted((tmp_path / part).glob("*/*.png")) for part in ("train", "test")}
    assert (len(files["train"]), len(files["test"])) == (1437, 360)
    assert sorted(int(path.stem) for part in files.values() for path in part) == list(range(1797))
    digits = load_digits()
    for path in [*files["train"][::100], *files["test"][::50]]:
        with Image.open(path) as image:
            assert np.abs(np.asarray(image) / (255 / 16) - digits.images[int(path.stem)]).max() < 0.05
        assert path.parent.name == str(digits.target[int(path.stem)])
    shares = [len(list((tmp_path / "test" / str(number)).iterdir())) for number in range(10)]
    assert max(shares) - min(shares) <= 3
    assert "scikit-learn" in (tmp_path / "ATTRIBUTION.md").read_text(encoding="utf-8")


def test_the_model_is_small(tmp_path: Path) -> None:
    demo_vision.write_config(tmp_path)
    model = ResNetForImageClassification(AutoConfig.from_pretrained(tmp_path))
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 200_000


@pytest.fixture
def results() -> dict[str, dict[str, Any]]:
    """What two runs could leave."""
    curves = {
        "lngd": {"train": [(10, 1.0, 2.0), (20, 2.0, 0.02)], "validation": [(10, 1.0, 1.0), (20, 2.0, 0.1)]},
        "adamw": {"train": [(10, 1.0, 2.0), (20, 2.0, 0.05)], "validation": [(10, 1.0, 1.0), (20, 2.0, 0.1)]},
    }
    common = {"predict_accuracy": 0.9875, "eval_accuracy": 0.98, "eval_loss": 0.1}
    return {name: {**common, "curves": curve} for name, curve in curves.items()}


def test_scores_and_picture(
    results: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo_vision.show_scores(results)
    out = capsys.readouterr().out
    assert out.count("98.75%") == 2
    assert "LNGD is at AdamW's final validation loss after 2.0 s; AdamW took 2.0 s." in out
    demo.draw(results, tmp_path / "loss.png", demo_vision.LABELS)
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.width >= 1000 and len(picture.convert("RGB").getcolors(1 << 24) or []) > 20


def test_both_runs_and_where_things_are(
    results: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[list[str]] = []

    def execute(label: str, arguments: list[str], output: Path) -> dict[str, Any]:
        asked.append(arguments)
        return results[output.name.removeprefix("tune-")]

    monkeypatch.setattr(demo, "execute", execute)
    demo_vision.main(["--output", str(tmp_path / "out"), "--seed", "3", "--max_steps", "4"])
    assert [arguments[-2:] for arguments in asked] == [["--max_steps", "4"]] * 2
    assert all(arguments[arguments.index("--seed") + 1] == "3" for arguments in asked)
    assert (tmp_path / "out" / "loss.png").is_file() and "README.md" in capsys.readouterr().out
    demo_vision.main(["--output", str(tmp_path / "out"), "--tune"])
    assert len(asked) == 2 + sum(len(run.rates) for run in demo_vision.RUNS.values())


@pytest.mark.slow
def test_the_whole_demo_in_short(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    demo_vision.main(["--output", str(tmp_path / "out"), "--max_steps", "4", "--logging_steps", "1"])
    assert "accuracy, test" in capfd.readouterr().out
    for path in ("lngd/README.md", "adamw/README.md", "loss.png", "lngd/confusion_matrix.png", "lngd/predictions.csv"):
        assert (tmp_path / "out" / path).is_file(), path
