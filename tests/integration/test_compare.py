"""`scripts/compare.py`: somebody's command with two optimizers, each in a folder of its own, and the tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import ViTConfig

from scripts import compare
from tests.image_helpers import needs_image_processor, write_folder

ROOT = Path(__file__).resolve().parents[2]


@needs_image_processor
def test_two_runs_of_one_command(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ViTConfig(**sizes, image_size=8, patch_size=4).save_pretrained(tmp_path / "vit")
    write_folder(tmp_path / "data", 4)
    script = ["scripts/run_image_classification.py", "--config_name", str(tmp_path / "vit"), "--do_train", "--do_eval"]
    data = ["--train_dir", str(tmp_path / "data"), "--max_steps", "3", "--logging_steps", "1", "--report_to", "none"]
    data += ["--validation_dir", str(tmp_path / "data"), "--save_strategy", "no", "--eval_strategy", "epoch"]
    command = [*script, *data, "--use_cpu", "--output_dir", str(tmp_path / "out")]
    found = subprocess.run(
        [sys.executable, "scripts/compare.py", "sgd --learning_rate 0.02", "muon", "--", *command],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "muon", "muon.json", "sgd-learning_rate0.02", "sgd-learning_rate0.02.json",
    }  # fmt: skip
    first, second = found.stdout.splitlines()[-2:]
    assert first.startswith("sgd --learning_rate 0.02") and first.split()[-5] == "3"
    assert second.startswith("muon ") and second.split()[1] == "3"


def test_the_losses_at_the_same_seconds() -> None:
    runs = {
        "a": {"train": [(1, 1.0, 4.0), (2, 2.0, 3.0)], "validation": []},
        "b": {"train": [(1, 2.0, 3.5), (2, 8.0, 2.0)], "validation": [(2, 8.0, 2.5)]},
    }
    lines = compare.tables(runs).splitlines()  # type: ignore[arg-type]
    rows = [line.split() for line in lines]
    assert ["1.0", "4.0000"] in rows and ["2.0", "3.0000", "3.5000"] in rows
    assert ["3.0", "3.5000"] in rows and ["8.0", "2.0000"] in rows, "a had ended"
    assert rows[-2] == ["a", "2", "2.0", "1.000", "3.0000"]
    assert rows[-1] == ["b", "2", "8.0", "4.000", "2.0000", "2.5000"]


def test_an_evaluation_after_the_last_step_is_in_the_last_row() -> None:
    runs = {
        "a": {"train": [(2, 4.0, 3.0)], "validation": [(1, 2.0, 3.5), (2, 4.1, 3.2)]},
        "b": {"train": [(2, 7.9, 2.0)], "validation": [(1, 4.0, 2.9), (2, 8.0, 2.5)]},
    }
    rows = [line.split() for line in compare.tables(runs).splitlines()]  # type: ignore[arg-type]
    assert ["4.0", "3.5000", "2.9000"] in rows and ["5.0", "3.2000", "2.9000"] in rows and ["8.0", "2.5000"] in rows


@pytest.mark.parametrize("given", [[], ["lngd", "--", "x.py"], ["lngd", "lngd", "--", "x.py"], ["lngd", "sgd", "x.py"]])
def test_what_it_needs(given: list[str]) -> None:
    with pytest.raises(SystemExit, match="error: compare: needs two optimizers, -- and a command"):
        compare.main(given)


def test_a_run_that_fails_ends_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: lngd: the run failed"):
        compare.run("lngd", [str(tmp_path / "none.py")], tmp_path)
