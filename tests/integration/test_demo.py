"""`make demo`: its runs differ in optimizer and rate alone, the rates are those of the committed tuning."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import trainer

from scripts import demo, stopwatch

TRAINER_SCRIPT = """
import sys
import time
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

class Rows(Dataset):
    def __len__(self):
        return 16
    def __getitem__(self, index):
        return {"x": torch.ones(3) * index, "labels": torch.ones(1)}

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)
    def forward(self, x, labels):
        time.sleep(0.2 if not self.training else 0.01)
        output = self.linear(x)
        return {"loss": ((output - labels) ** 2).mean(), "logits": output}

assert sys.argv[1:] == ["--flag", "value"], sys.argv
arguments = TrainingArguments("out", max_steps=8, logging_steps=2, eval_strategy="steps", eval_steps=4, use_cpu=True,
                              per_device_train_batch_size=4, save_strategy="no", report_to="none", disable_tqdm=True)
trainer = Trainer(Model(), arguments, train_dataset=Rows(), eval_dataset=Rows())
trainer.train()
trainer.evaluate()
"""


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The stopwatch's command in this process."""

    def start(*argv: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["scripts/stopwatch.py", *argv])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", list(trainer.DEFAULT_CALLBACKS))
        stopwatch.main()

    return start


def test_stopwatch_notes_losses_with_seconds_of_training(tmp_path: Path, timed: Callable[..., None]) -> None:
    script = tmp_path / "script.py"
    script.write_text(TRAINER_SCRIPT, encoding="utf-8")
    timed("curve/c.json", str(script), "--flag", "value")
    curves = json.loads((tmp_path / "curve" / "c.json").read_text(encoding="utf-8"))
    assert [step for step, _, _ in curves["train"]] == [2, 4, 6, 8]
    assert [step for step, _, _ in curves["validation"]] == [4, 8]
    seconds = [point[1] for point in curves["train"]]
    assert seconds == sorted(seconds) and seconds[0] > 0
    # Each evaluation sleeps for at least 0.4 s; of it the clock of training sees next to nothing.
    at_four = {name: next(point[1] for point in points if point[0] == 4) for name, points in curves.items()}
    assert abs(at_four["validation"] - at_four["train"]) < 0.3


def test_the_runs_differ_in_optimizer_and_rate_alone() -> None:
    own, other = (demo.command(run, Path("out"), 1, []) for run in demo.RUNS.values())
    decay = other.index("--weight_decay")
    del other[decay : decay + 2]
    different = {before for before, a, b in zip(own, own[1:], other[1:], strict=False) if a != b}
    assert len(own) == len(other) and {"--optim"} <= different <= {"--optim", "--learning_rate"}


def test_both_were_tuned_alike_and_run_at_their_best() -> None:
    """AdamW no less than LNGD, whose decay is its own."""
    assert len({len(run.rates) for run in demo.RUNS.values()}) == 1
    assert demo.RUNS["lngd"].weight_decay == 0 and not demo.RUNS["lngd"].decays
    rows = json.loads(demo.TUNING.read_text(encoding="utf-8"))
    for name, run in demo.RUNS.items():
        losses = {(r["learning_rate"], r["weight_decay"]): r["loss"] for r in rows if r["optimizer"] == name}
        assert sorted(losses) == sorted((trial.learning_rate, trial.weight_decay) for trial in run.trials())
        assert (run.learning_rate, run.weight_decay) == min(losses, key=lambda settings: losses[settings])
        assert run.learning_rate not in (min(run.rates), max(run.rates)), "the best rate is not bracketed"


@pytest.fixture
def results() -> dict[str, dict[str, Any]]:
    """What two runs could leave."""
    curves = {
        "lngd": {"train": [(10, 1.0, 6.0), (20, 2.0, 3.0)], "validation": [(10, 1.0, 5.0), (20, 2.0, 3.0)]},
        "adamw": {"train": [(10, 1.0, 7.0), (20, 2.0, 4.0)], "validation": [(10, 1.0, 6.0), (20, 2.0, 4.0)]},
    }
    common = {"predict_bleu": 40.0, "predict_chrf": 60.0, "eval_bleu_signature": "nrefs:1"}
    return {name: {**common, "eval_loss": 3.0, "curves": curve} for name, curve in curves.items()}


def test_scores(results: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    demo.show_scores(results)
    out = capsys.readouterr().out
    assert "LNGD" in out and "AdamW" in out and "nrefs:1" in out
    assert "LNGD is at AdamW's final validation loss after 2 s; AdamW took 2 s." in out


def test_ten_translations_stand_beside_their_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = demo.read_test()
    for name in demo.RUNS:
        (tmp_path / name).mkdir()
        lines = [f"{name} {index}" for index in range(len(test))]
        (tmp_path / name / "generated_predictions.txt").write_text("\n".join(lines), encoding="utf-8")
    demo.show_translations({name: tmp_path / name for name in demo.RUNS})
    out = capsys.readouterr().out
    assert out.count("English ") == out.count("reference ") == 10
    assert test[0]["de"] in out and "lngd 0" in out and "adamw 0" in out


@pytest.mark.slow
def test_the_whole_demo_in_short(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    short = ["--max_steps", "4", "--max_eval_samples", "20", "--max_predict_samples", "20", "--warmup_steps", "1"]
    demo.main(["--output", str(tmp_path / "out"), *short, "--logging_steps", "1", "--num_beams", "1"])
    out = capfd.readouterr().out
    assert out.count("English ") == 10 and "BLEU" in out
    for path in ("lngd/README.md", "adamw/README.md", "loss.png", "results.json", "lngd/model.safetensors"):
        assert (tmp_path / "out" / path).is_file(), path


def test_a_run_that_logged_no_loss_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "all_results.json").write_text("{}", encoding="utf-8")
    (tmp_path / "loss_curve.json").write_text('{"train": [], "validation": []}', encoding="utf-8")
    monkeypatch.setattr(demo.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=0))
    with pytest.raises(SystemExit, match="no loss was logged.*--logging_steps"):
        demo.execute("LNGD", [], tmp_path)
