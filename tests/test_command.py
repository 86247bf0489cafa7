"""`python -m hf_lngd`: a stock Trainer's script runs unchanged with --optim lngd; `doctor` says what that costs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FSMTConfig, MarianConfig, ResNetConfig, TrainingArguments, ViTConfig

import hf_lngd
from hf_lngd import LNGD, LNGDConfig
from hf_lngd.estimate import estimate
from hf_lngd.integrations import launching
from hf_lngd.integrations import stock as stock_module
from hf_lngd.integrations.command import main
from hf_lngd.integrations.doctor_model import build, look
from tests.hf_helpers import SIZES, hf_images, hf_pairs, hf_seq2seq_model, hf_tokenizer, hf_vit, hf_write_pairs

ROOT = Path(__file__).resolve().parent.parent

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


def test_a_stock_script_runs_unchanged(tmp_path: Path) -> None:
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
    command = [sys.executable, "-m", "hf_lngd", str(folder / "run_stock.py"), "--use_cpu"]
    command += [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"ran as __main__ {folder / 'run_stock.py'} LNGD" in done.stdout
    assert done.stdout.count("lngd      linear") == 1  # the routing table, once
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
    assert line.startswith("error: transformers: register: got transformers 6.1.0, accepted: 5.23 up to 6.0")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "python -m hf_lngd doctor MODEL" in capsys.readouterr().out
    main(["doctor", "--help"])
    assert "[--batch_size 8] [--length 128]" in capsys.readouterr().out


# Doctor


def saved(folder: Path, config: Any) -> str:
    config.save_pretrained(folder)
    return str(folder)


def vit_config() -> ViTConfig:
    return hf_vit().config


def test_doctor_tells_what_training_will_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Owners and bytes are those of an optimizer that has made steps on real tensors."""
    main(["doctor", saved(tmp_path, vit_config()), "--optim_args", "factor_interval=4,lr=0.1", "--batch_size", "2"])
    text = capsys.readouterr().out
    model = hf_vit()
    optimizer = LNGD(model, factor_interval=4)
    images = hf_images(8)
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in images]) for name in images[0]}
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
    assert optimizer.routing_table() in text
    total, adamw = optimizer.memory_usage()["total"], sum(8 * p.numel() + 4 for p in model.parameters())
    assert f"state: {total / 2**20:.1f} MiB, {total / adamw:.2f} × AdamW's" in text
    assert "ViTForImageClassification" in text and "2 images of 8 × 8" in text and "each 4 for factors" in text
    assert re.search(r"factors: \d+ for \d+ layers, width 16\n", text)


@pytest.mark.parametrize(
    "fields",
    [{}, {"direction": "gram"}, {"direction": "natural"}, {"preset": "paper"}, {"preset": "lngd_lr"},
     {"family": "ekfac"}, {"family": "ng+"}, {"embedding": "exact"}],
    ids=str,
)  # fmt: skip
def test_estimates_are_those_of_real_steps(fields: dict[str, Any]) -> None:
    tokens = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = MarianConfig(**{**SIZES, **tokens, "decoder_vocab_size": 40, "forced_eos_token_id": None})
    settings = LNGDConfig(**fields)
    found = look(config, "translation", 2, 5, lambda subject: estimate(subject.model, subject.loss, settings))
    subject = build(config, "translation", 2, 5, "cpu")
    optimizer = LNGD(subject.model, settings)
    output = subject.model(**subject.inputs)
    if optimizer.needs_fisher_pass:
        optimizer.fisher_backward(output.logits)
    output.loss.backward()
    optimizer.step()
    real = optimizer.memory_usage()
    assert found.memory == real
    assert [r.owner for r in found.routes] == [r.owner for r in optimizer.routing()]
    assert sum(size.layers for size in found.factors) == len(optimizer._routing.layers)


def test_products_are_counted_exactly() -> None:
    """A net of two layers by hand: 2·N·m·d forward and two or three times that in all, five quintics, Φ of each."""
    n, d, h, m = 12, 6, 5, 4
    with torch.device("meta"):
        model = torch.nn.Sequential(
            torch.nn.Linear(d, h, bias=False), torch.nn.ReLU(), torch.nn.Linear(h, m, bias=False)
        )
        x = torch.zeros(n, d)
    settings = LNGDConfig(factor_interval=4, inverse_interval=5)
    found = estimate(model, lambda: model(x).square().mean(), settings)
    assert found.model_flops == 2 * n * (2 * d * h + 3 * h * m)
    assert found.capture_flops == 2 * n * (d * d + h * h + h)  # the last: Ψ of the layer with an activation
    assert found.inverse_flops == d**3 + h**3
    whitening = 2 * 2 * (h * d * d + m * h * h)
    quintics = sum(5 * 2 * (2 * s * s * long + s**3) for s, long in ((5, 6), (4, 5)))
    assert found.step_flops == whitening + quintics
    assert found.lngd_flops == found.step_flops + found.capture_flops / 4 + found.inverse_flops / 5


def test_doctor_builds_on_the_cpu_what_the_meta_device_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "src_vocab_size": 20, "tgt_vocab_size": 20}
    config = FSMTConfig(langs=["en", "de"], max_position_embeddings=64, **sizes, **heads)
    devices: list[str] = []

    def see(subject: Any) -> Any:
        devices.append(next(subject.model.parameters()).device.type)
        return estimate(subject.model, subject.loss, LNGDConfig())

    assert look(config, "translation", 2, 6, see).model_flops > 0
    assert devices == ["meta", "cpu"]
    monkeypatch.setattr("hf_lngd.integrations.doctor_model.MOST_ON_CPU", 10)
    with pytest.raises(ValueError, match="parameters are too many to build"):
        look(config, "translation", 2, 6, see)


def test_doctor_says_what_it_does_not_accept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vit = saved(tmp_path / "vit", vit_config())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "odd.json").write_text(json.dumps({"model_type": "vits"}))
    cases = {
        (): "error: model: got none",
        ("--task", "image"): "error: model: got '--task', accepted: a folder",
        (str(tmp_path / "nothing"),): f"error: model: got '{tmp_path / 'nothing'}', which is not there",
        (str(tmp_path),): f"error: model: got '{tmp_path}', which has no config.json",
        (str(tmp_path / "adapter"),): f"error: model: got '{tmp_path / 'adapter'}', which holds an adapter",
        (str(tmp_path / "broken.json"),): f"error: model: got '{tmp_path / 'broken.json'}', which has no configuration",
        (str(tmp_path / "odd.json"),): "error: model: got 'vits' for auto; this one can do: none of them",
        (vit, "--task", "translation"): "error: task: got 'vit' for translation; this one can do: image",
        (vit, "--task", "sound"): "error: task: got 'sound', accepted: auto, translation, image",
        (vit, "--batch_size", "0"): "error: batch_size: got 0, accepted: an integer, at least 1",
        (vit, "--optim_args", "rate=fast"): "error: optim_args: rate: got 'fast'",
        (vit, "--optim_arguments", "x"): "error: optim_arguments: unknown argument",
    }
    for argv, words in cases.items():
        assert failure(capsys, "doctor", *argv).startswith(words), argv


def test_doctor_of_convolutions_and_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"layer_type": "basic", "depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8}
    main(["doctor", saved(tmp_path / "resnet", ResNetConfig(**sizes))])
    text = capsys.readouterr().out
    assert "ResNetForImageClassification" in text and "8 images of 224 × 224" in text and "convolution" in text
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}))
    main(["doctor", str(folder / "config.json"), "--length", "7"])
    assert "8 texts of 7 tokens" in capsys.readouterr().out
    main(["doctor", str(folder), "--task", "classification", "--batch_size", "1"])
    assert "GPT2ForSequenceClassification" in capsys.readouterr().out
