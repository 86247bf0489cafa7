"""`scripts/finetune_wmt.sh`: a tiny Marian on local files, offline; the Hub's data set and the push by the command."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_lngd.integrations.usage import UsageError
from scripts.run_translation import main, parse
from tests.hf_helpers import hf_pairs, hf_seq2seq_model, hf_tokenizer, hf_write_pairs

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "scripts" / "finetune_wmt.sh")


def run(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    command = ["bash", SCRIPT, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def planned(*arguments: str, cwd: Path, **variables: str) -> tuple[Any, Any, Any]:
    """What run_translation.py makes of the command that a dry run prints."""
    done = run("--dry-run", *arguments, cwd=cwd, **variables)
    assert done.returncode == 0, done.stderr
    python, script, *argv = shlex.split(done.stdout)
    assert python == sys.executable and script == str(ROOT / "scripts" / "run_translation.py")
    return parse([*argv, "--use_cpu"])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A tiny Marian and pairs."""
    tokenizer = hf_tokenizer()
    hf_seq2seq_model("marian", tokenizer).save_pretrained(tmp_path / "tiny-marian")
    tokenizer.save_pretrained(tmp_path / "tiny-marian")
    for seed, part in enumerate(("train", "validation", "test")):
        hf_write_pairs(tmp_path / f"{part}.json.gz", hf_pairs(16 if part == "train" else 4, seed))
    return {part: str(tmp_path / f"{part}.json.gz") for part in ("train", "validation", "test")}


def test_local_files_end_to_end(files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it starts is noted, and runs in this process."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" > started\n", encoding="utf-8")
    python.chmod(0o755)
    parts = [word for part, path in files.items() for word in (f"--{part}", path)]
    more = ["--", "--use_cpu", "--report_to", "none"]
    sizes = ["--model", "tiny-marian", "--steps", "2", "--batch", "8", "--accumulate", "2", "--lr", "0.01"]
    done = run(*parts, *sizes, *more, cwd=tmp_path, PYTHON=str(python))
    assert done.returncode == 0, done.stderr[-3000:]
    started = (tmp_path / "started").read_text(encoding="utf-8").splitlines()
    assert started[0] == str(ROOT / "scripts" / "run_translation.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", started)
    main()
    output = tmp_path / "runs" / "tiny-marian-wmt-en-de"
    result = json.loads((output / "all_results.json").read_text(encoding="utf-8"))
    assert {"train_loss", "eval_bleu", "predict_bleu"} <= set(result)
    assert (output / "generated_predictions.txt").read_text(encoding="utf-8").count("\n") == 4
    assert '"optim": "lngd"' in (output / "README.md").read_text(encoding="utf-8")
    assert (output / "routing.json").is_file() and (output / "model.safetensors").is_file()


def test_the_hubs_data_set_and_the_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")  # a push without any is refused
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # so is one offline, as some machines are
    model, data, training = planned(cwd=tmp_path)
    assert model.model_name_or_path == "Helsinki-NLP/opus-mt-en-de"
    assert (data.dataset_name, data.dataset_config_name) == ("wmt/wmt16", "de-en")
    assert (data.source_lang, data.target_lang) == ("en", "de")
    assert (training.optim, training.push_to_hub) == ("lngd", False)
    assert training.optim_args == "preset=fast"
    assert training.per_device_train_batch_size == 64 and training.num_train_epochs == 1
    options = ["--source", "ro", "--target", "en", "--hub-model-id", "me/mine", "--samples", "1000", "--optim-args"]
    model, data, training = planned(*options, "factor_interval=20", "--model", "some/opus-mt-ro-en", cwd=tmp_path)
    assert data.dataset_config_name == "ro-en" and data.max_train_samples == 1000
    assert training.push_to_hub and training.hub_model_id == "me/mine"
    assert training.optim_args == "factor_interval=20" and training.output_dir == "runs/opus-mt-ro-en-wmt-ro-en"
    _, _, training = planned("--push", "--output", "here", cwd=tmp_path)
    assert training.push_to_hub and training.output_dir == "here"


def test_the_environment_sets_the_same_and_options_win(tmp_path: Path) -> None:
    variables = {"MODEL": "a/b", "BATCH": "32", "OPTIM": "adamw_torch", "MAX_STEPS": "7", "LEARNING_RATE": "2e-5"}
    model, _, training = planned("--batch", "16", cwd=tmp_path, **variables)
    assert model.model_name_or_path == "a/b" and training.per_device_train_batch_size == 16
    assert (training.optim.value, training.optim_args) == ("adamw_torch", None)
    assert training.max_steps == 7 and training.learning_rate == 2e-5


def test_help_names_every_option(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    text = Path(SCRIPT).read_text(encoding="utf-8")
    known = {line.split(")")[0].strip() for line in text.splitlines() if line.strip().startswith("--") and ")" in line}
    options = {option for option in known if option.replace("-", "").isalpha()}
    assert len(options) > 18
    for option in options:
        assert f"  {option} " in done.stdout, option


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modle", "x"], "modle: unknown option"),
        (["--batch"], "batch: got no value"),
        (["--batch", "0"], "batch: got '0', accepted: a whole number, at least 1"),
        (["--batch", "8", "--accumulate", "3"], "accumulate: got 3, accepted: a divisor of --batch 8"),
        (["--train", "nowhere.json", "--validation", "x"], "train: got 'nowhere.json', which is no file"),
        (["--train", "a", "--validation", "b", "--dataset", "c"], "dataset: got 'c' and files"),
    ],
)
def test_what_is_wrong_is_the_last_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.rstrip("\n").split("\n")[-1].startswith(f"error: {words}")


def test_what_is_wrong_for_the_script_is_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="^num_beems: unknown argument; did you mean --num_beams"):
        planned("--", "--num_beems", "3", cwd=tmp_path)


def test_a_python_that_is_not_there(tmp_path: Path) -> None:
    done = run(cwd=tmp_path, PYTHON="no-such-python")
    assert done.returncode == 2 and done.stderr.startswith("error: PYTHON: got 'no-such-python'")
