"""`python -m hf_lngd`: a stock Trainer's script runs unchanged with --optim lngd."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import hf_lngd
from hf_lngd.config import OPTIONS
from hf_lngd.integrations import launching
from hf_lngd.integrations import stock as stock_module
from hf_lngd.integrations.command import main
from tests.hf_helpers import hf_pairs, hf_seq2seq_model, hf_tokenizer, hf_write_pairs

# As transformers' own examples are written: nothing in it knows of hf_lngd.
STOCK_SCRIPT = """
import sys
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import (
    AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, HfArgumentParser, Seq2SeqTrainer,
    Seq2SeqTrainingArguments, set_seed,
)

from neighbour import COLUMN


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "a model"})


@dataclass
class DataTrainingArguments:
    train_file: str = field(default=None, metadata={"help": "JSON lines"})


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, Seq2SeqTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    raw = load_dataset("json", data_files={"train": data_args.train_file})
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path)

    def encode(examples):
        pairs = examples[COLUMN]
        texts = [pair["en"] for pair in pairs]
        return tokenizer(texts, text_target=[pair["de"] for pair in pairs], max_length=32, truncation=True)

    train = raw["train"].map(encode, batched=True, remove_columns=[COLUMN])
    trainer = Seq2SeqTrainer(
        model=model, args=training_args, train_dataset=train, eval_dataset=train, processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    # in one write: several processes share the output
    print(f"ran as {__name__} {sys.argv[0]} {type(trainer.optimizer.optimizer).__name__}\\n", end="")


if __name__ == "__main__":
    main()
"""


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the command changes for its script is put back."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(launching, "ENTRY", [])
    yield
    hf_lngd.unregister()


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The last line of what a wrong command line prints."""
    with pytest.raises(SystemExit) as exit_:
        main(list(argv))
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# Scripts


def test_a_stock_script_runs_unchanged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`test_distributed_launch` starts it as a command."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "run_stock.py").write_text(STOCK_SCRIPT)
    (folder / "neighbour.py").write_text('COLUMN = "translation"\n')
    tokenizer = hf_tokenizer()
    hf_seq2seq_model("marian", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    hf_write_pairs(tmp_path / "train.json", hf_pairs(32))
    arguments = {
        "model_name_or_path": tmp_path / "model", "train_file": tmp_path / "train.json", "output_dir": tmp_path / "out",
        "optim": "lngd", "optim_args": "factor_interval=3", "learning_rate": "1e-3", "max_steps": "4",
        "save_steps": "2", "logging_steps": "1", "report_to": "none",
    }  # fmt: skip
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = (part for name, value in arguments.items() for part in (f"--{name}", str(value)))
    main([str(folder / "run_stock.py"), "--use_cpu", *options])
    out = capsys.readouterr().out
    assert f"ran as __main__ {folder / 'run_stock.py'} LNGD" in out
    assert out.count("owner     reason") == 1  # the routing table, once
    state = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert state["lngd"]["config"]["factor_interval"] == 3


MODULE = """
import sys
from transformers import HfArgumentParser, TrainingArguments
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
print("module", __name__, sys.argv[1:], args.optim.value)
"""


def test_a_module_runs_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packaged").mkdir()
    (tmp_path / "packaged" / "__init__.py").touch()
    (tmp_path / "packaged" / "train.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="lngd is not a valid"):
        TrainingArguments(str(tmp_path), optim="lngd")
    argv = ["--output_dir", str(tmp_path), "--optim", "lngd", "--use_cpu"]
    main(["-m", "packaged.train", *argv])
    assert f"module __main__ {argv} lngd" in capsys.readouterr().out
    assert launching._launch(2, 2).startswith("torchrun --nproc_per_node 2 -m hf_lngd ")


def test_what_a_script_raises_and_exits_with_is_its_own(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(7 if sys.argv[1:] else None)\n")
    with pytest.raises(SystemExit) as exit_:
        main([str(script), "more"])
    assert exit_.value.code == 7 and sys.path[0] == str(tmp_path)
    script.write_text("raise KeyError('mine')\n")
    with pytest.raises(KeyError, match="mine"):
        main([str(script)])


def test_what_lngd_says_of_a_setting_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    for call, words in {
        "LNGDConfig(rate='fast')": "error: rate: got 'fast', accepted: rms, adaptive, none",
        "LNGDConfig.from_optim_args('dampign=1')": "error: optim_args: unknown name 'dampign'; did you mean damping",
    }.items():
        script.write_text(f"from hf_lngd import LNGDConfig\n{call}\n")
        assert failure(capsys, str(script)).startswith(words)
    script.write_text("raise ValueError('size: got 3, accepted: 4')\n")
    with pytest.raises(ValueError, match="size: got 3"):
        main([str(script)])


def test_a_folder_with_a_main_runs_as_python_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "__main__.py").write_text("print('here', __name__)\n")
    main([str(tmp_path)])
    assert capsys.readouterr().out == "here __main__\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "error: script: got none, accepted: a Python file, -m with a module, or doctor with a model"),
        (["no.py"], "error: script: got 'no.py', which is not there"),
        (["tests"], "error: script: got 'tests', a folder without a __main__.py, accepted: a Python file"),
        (["--optim", "lngd"], "error: script: got the option '--optim'"),
        (["-m"], "error: -m: got no module"),
        (["-m", "no.such.module"], "error: -m: got 'no.such.module', which is no module here"),
    ],
)
def test_wrong_command_lines_say_so(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(capsys, *argv).startswith(words)


def test_an_unknown_transformers_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").touch()
    with monkeypatch.context() as patch:
        patch.setattr(stock_module.transformers, "__version__", "6.1.0")
        line = failure(capsys, str(tmp_path / "script.py"))
    assert line.startswith("error: transformers: register: got transformers 6.1.0, accepted: 5.6 up to 6.0")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "python -m hf_lngd doctor MODEL" in capsys.readouterr().out
    main(["doctor", "--help"])
    assert "TASK: auto, or translation, image, speech" in capsys.readouterr().out
    main(["--options"])
    told = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert len(told) == len(OPTIONS) and "factor_interval (default: 20)" in told
