"""`scripts/run_translation.py` on tiny models: what it writes, what it raises, languages, the order of predictions."""

from __future__ import annotations

import gzip
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel, MBart50Tokenizer, NllbTokenizer

from hf_lngd.integrations.usage import UsageError
from scripts import run_translation
from scripts.run_translation import set_languages
from tests.hf_helpers import HF_FAMILIES, hf_mbart_tokenizer, hf_pairs, hf_seq2seq_model, hf_tokenizer, hf_write_pairs

SAMPLE = Path(__file__).resolve().parents[2] / "examples" / "data" / "tatoeba-en-de"


Files = dict[str, str]
Run = Callable[[list[str]], None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Files of pairs, one of them gzipped."""
    folder = tmp_path_factory.mktemp("data")
    files = {"train": "train.json.gz", "validation": "validation.jsonl", "test": "test.json"}
    for seed, (part, name) in enumerate(files.items()):
        hf_write_pairs(folder / name, hf_pairs(32 if part == "train" else 6, seed))
    (folder / "ATTRIBUTION.md").write_text("# Made up\n\nBy nobody.\n", encoding="utf-8")
    return {f"{part}_file": str(folder / name) for part, name in files.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A saved model with its tokenizer for each family."""
    folders = {}
    for family in HF_FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        extra = ("__en__", "__de__") if family == "m2m100" else ()
        tokenizer = hf_mbart_tokenizer() if family == "mbart" else hf_tokenizer(extra)
        hf_seq2seq_model(family, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[family] = str(folder)
    return folders


BASE = {
    "source_lang": "en",
    "target_lang": "de",
    "max_source_length": 16,
    "max_target_length": 16,
    "max_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.01,
    "save_strategy": "no",
    "report_to": "none",
}
FLAGS = ["--use_cpu", "--predict_with_generate"]


def arguments(options: dict[str, Any], *flags: str) -> list[str]:
    """A command line; options that are None are left out."""
    given = {**BASE, **options}
    return [*flags, *(part for k, v in given.items() if v is not None for part in (f"--{k}", str(v)))]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """The script in this process."""

    def start(argv: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["scripts/run_translation.py", *argv])
        run_translation.exit_on_usage_error(run_translation.main)

    return start


@pytest.fixture
def refused(run: Run, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """The last line of a run that ends with status 2."""

    def start(argv: list[str]) -> str:
        with pytest.raises(SystemExit) as caught:
            run(argv)
        assert caught.value.code == 2
        return capsys.readouterr().err.rstrip("\n").split("\n")[-1]

    return start


ALL = ["--do_train", "--do_eval", "--do_predict", *FLAGS]


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))


OF_FAMILY: dict[str, dict[str, Any]] = {
    "marian": {"num_beams": 2, "data_license": "cc-by-2.0"},
    "t5": {"source_prefix": "translate English to German: ", "pad_to_max_length": "true"},
    "bart": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "mbart": {"source_lang": "en_XX", "target_lang": "de_DE"},
    "m2m100": {"forced_bos_token": "__de__"},
}


@pytest.mark.parametrize("family", list(HF_FAMILIES))
def test_each_family_from_end_to_end(family: str, models: Files, data: Files, tmp_path: Path, run: Run) -> None:
    options = {"model_name_or_path": models[family], "output_dir": tmp_path, **data, **OF_FAMILY[family]}
    run(arguments({**options, "optim_args": "factor_interval=2,preset=fast"}, *ALL))
    result = numbers(tmp_path)
    wanted = ("train_loss", "train_runtime", "eval_loss", "eval_bleu", "eval_chrf", "predict_bleu", "predict_chrf")
    assert all(math.isfinite(result[key]) for key in wanted)
    assert "tok:13a" in result["eval_bleu_signature"] and "nc:6" in result["eval_chrf_signature"]
    lines = (tmp_path / "generated_predictions.txt").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 7 and lines[-1] == ""
    routing = json.loads((tmp_path / "routing.json").read_text(encoding="utf-8"))
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert {r["parameter"] for r in routing["parameters"]} == {name for name, _ in model.named_parameters()}
    assert {"lngd", "fallback"} <= {r["owner"] for r in routing["parameters"]}
    assert routing["config"]["factor_interval"] == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    output = model.generate(**tokenizer(["the dog sees the cat"], return_tensors="pt", return_token_type_ids=False))
    assert output.shape[0] == 1
    # what the card tells of results and of the command: tests/integration/test_hub.py
    card = ModelCard.load(tmp_path / "README.md")
    (bleu,) = (r for r in card.data.eval_results if (r.dataset_split, r.metric_type) == ("test", "bleu"))
    assert bleu.metric_args == {"signature": result["predict_bleu_signature"]} and "By nobody." in card.text
    if family == "marian":
        assert card.data.license == "cc-by-2.0" and card.data.language == ["en", "de"]
        assert "(`train.json.gz`): 32 examples, of which 24 were seen." in card.text  # in three steps of eight
    if family == "m2m100":
        assert model.generation_config.forced_bos_token_id == tokenizer.convert_tokens_to_ids("__de__")
    if family == "mbart":
        assert model.config.decoder_start_token_id == tokenizer.convert_tokens_to_ids("de_DE")


@pytest.mark.parametrize(
    "given", [{"num_beams": 3}, {"generation_num_beams": 2, "generation_max_length": 5, "val_max_target_length": 9}]
)
def test_scores_during_training_and_at_its_end_are_the_same(
    given: dict[str, int], models: Files, data: Files, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []
    generate = MarianMTModel.generate

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append((kwargs["num_beams"], kwargs["max_length"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(MarianMTModel, "generate", watched)
    more = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, **given}
    run(from_scratch(models, data, tmp_path, ["--do_train", "--do_eval", *FLAGS], **more))
    beams, length = given.get("num_beams", 2), given.get("generation_max_length", 16)
    assert set(made) == {(beams, length)} and len(made) == 2
    history = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    (during,) = (entry for entry in history if "eval_bleu" in entry)
    result = numbers(tmp_path)
    assert all(during[key] == result[key] for key in ("eval_bleu", "eval_chrf", "eval_gen_len", "eval_loss"))
    assert f"num_beams={beams}, max_length={length}" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_lengths_count_words_alone() -> None:
    """Not the start, the end, the language, padding of either kind; unknown words do count."""
    tokenizer = hf_tokenizer(("__de__",))
    pad, end, unknown = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    start, language = tokenizer.convert_tokens_to_ids(["<s>", "__de__"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["__de__"], "bos_token": "<s>"})
    dog = tokenizer.convert_tokens_to_ids("dog")
    rows = [[end, language, dog, unknown, dog, end], [start, dog, end, pad, -100, -100]]
    scores = run_translation.TranslationScores(tokenizer)
    labels = np.full((2, 2), dog)
    assert scores(SimpleNamespace(predictions=np.array(rows), label_ids=labels))["gen_len"] == 2.0


def from_scratch(models: Files, data: Files, folder: Path, flags: list[str], **more: Any) -> list[str]:
    options = {"config_name": models["marian"], "tokenizer_name": models["marian"], "output_dir": folder}
    return arguments({**options, **data, **more}, *flags)


def test_from_scratch_with_changes(models: Files, data: Files, tmp_path: Path, run: Run) -> None:
    overrides = "dropout=0.25,encoder_layers=2,activation_function=gelu"
    run(from_scratch(models, data, tmp_path, ALL, config_overrides=overrides, max_train_samples=9))
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    config = model.config
    assert (config.dropout, config.encoder_layers, config.activation_function) == (0.25, 2, "gelu")
    assert model.generation_config.max_length == 16
    assert numbers(tmp_path)["train_samples"] == 9


@pytest.mark.parametrize("kind, start", [("marian", "pad"), ("bart", "eos"), ("t5", "pad")])
def test_a_type_of_model_takes_its_tokens_from_the_tokenizer(kind: str, start: str, tmp_path: Path) -> None:
    tokenizer = hf_tokenizer()
    sizes = "d_model=16,d_ff=24,num_layers=1,num_heads=2" if kind == "t5" else "d_model=16,encoder_layers=1"
    args = SimpleNamespace(
        **dict.fromkeys(("model_name_or_path", "cache_dir", "model_revision", "token")), config_name=kind,
        config_overrides=sizes, trust_remote_code=False,
    )  # fmt: skip
    model = run_translation.load_model(args, tokenizer)  # type: ignore[arg-type]
    config = model.config
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert config.decoder_start_token_id == getattr(tokenizer, f"{start}_token_id")
    assert config.d_model == 16


def test_an_optimizer_that_cannot_be_made_is_one_line(
    models: Files, data: Files, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    for more, words in (
        ({"optim_target_modules": "none_such"}, "error: optim_target_modules: got 'none_such', which is no module of"),
        ({"optim": "adamw_bnb_8bit"}, "error: optim: You need to install `bitsandbytes`"),
    ):
        assert refused(from_scratch(models, data, tmp_path, ["--do_train", *FLAGS], **more)).startswith(words)


def test_a_seed_gives_one_model_and_another_optimizer_works(
    models: Files, data: Files, tmp_path: Path, run: Run
) -> None:
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = tmp_path / name
        (folder).mkdir()
        (folder / "routing.json").write_text("{}", encoding="utf-8")
        run(from_scratch(models, data, folder, ["--do_train", *FLAGS], seed=seed, optim="adamw_torch"))
        assert not (folder / "routing.json").exists()
        weights.append(AutoModelForSeq2SeqLM.from_pretrained(folder).model.encoder.layers[0].fc1.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_resume_goes_on_to_the_same_end(models: Files, data: Files, tmp_path: Path, run: Run) -> None:
    def weights(folder: str, **more: Any) -> dict[str, torch.Tensor]:
        options = {"model_name_or_path": models["marian"], "output_dir": tmp_path / folder, **data}
        options |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim_args": "factor_interval=3"}
        run(arguments({**options, **more}, "--do_train", *FLAGS))
        return AutoModelForSeq2SeqLM.from_pretrained(tmp_path / folder).state_dict()

    whole = weights("whole", resume_from_checkpoint="last")  # there is none yet
    resumed = weights("resumed", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    last = weights("whole", resume_from_checkpoint="last")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]) and torch.equal(value, last[name]), name


def test_a_checkpoint_of_another_optimizer_or_other_settings_is_one_line(
    models: Files, data: Files, tmp_path: Path, refused: Callable[[list[str]], str], run: Run
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    for optim in ("lngd", "adamw_torch"):
        run(from_scratch(models, data, tmp_path / optim, ["--do_train", *FLAGS], optim=optim, **saving))
    lngd, adamw = (tmp_path / name / "checkpoint-2" for name in ("lngd", "adamw_torch"))
    for checkpoint, more, words in (
        (adamw, {}, "state_dict: got the state of another optimizer"),
        (adamw, {"optim": "muon"}, "another optimizer's (with amsgrad, betas, "),
        (adamw, {"optim": "sgd"}, "another optimizer's (with amsgrad, betas, "),
        (lngd, {"optim": "adamw_torch"}, "optimizer.pt is LNGD's"),
        (lngd, {"optim_args": "momentum=0.5"}, "the config differs: momentum: checkpoint 0.8, here 0.5"),
    ):
        options = {**saving, "max_steps": 3, "resume_from_checkpoint": checkpoint, **more}
        last = refused(from_scratch(models, data, tmp_path / "other", ["--do_train", *FLAGS], **options))
        assert last.startswith("error: resume_from_checkpoint: ") and "optimizer.pt" in last and words in last, last


def test_another_runs_model_and_results_are_replaced_with_consent_alone(
    models: Files, data: Files, tmp_path: Path, run: Run, refused: Callable[[list[str]], str]
) -> None:
    folder = tmp_path / "out"
    saving = {"save_strategy": "steps", "save_steps": 2}
    run(from_scratch(models, data, folder, ALL, **saving))
    before = (folder / "model.safetensors").read_bytes()
    for more in ({}, {"resume_from_checkpoint": tmp_path / "out" / ".." / "copy" / "checkpoint-2"}):
        if more:
            shutil.copytree(folder / "checkpoint-2", tmp_path / "copy" / "checkpoint-2")
        last = refused(from_scratch(models, data, folder, ["--do_train", *FLAGS], **more))
        assert last.startswith(f"error: output_dir: got '{folder}', which has checkpoint-3, checkpoint-2, model.safe")
        assert "--overwrite_output_dir" in last and (folder / "model.safetensors").read_bytes() == before
    assert "predict_bleu" in numbers(folder)

    run(from_scratch(models, data, folder, ["--do_eval", *FLAGS]))  # needs no consent, and says nothing of training
    assert "eval_bleu" in numbers(folder) and not {"train_loss", "predict_bleu"} & set(numbers(folder))
    assert (folder / "train_results.json").is_file() and (folder / "checkpoint-2").is_dir()

    run(from_scratch(models, data, folder, ["--do_train", *FLAGS], overwrite_output_dir="true", seed=5))
    assert "train_loss" in numbers(folder) and "eval_bleu" not in numbers(folder)
    left = {path.name for path in folder.iterdir()}
    assert not left & {"checkpoint-2", "eval_results.json", "predict_results.json", "generated_predictions.txt"}
    assert (folder / "model.safetensors").read_bytes() != before


def test_arguments_from_a_json_file_and_a_data_set_in_a_folder(
    models: Files, data: Files, tmp_path: Path, run: Run
) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for part in ("train", "validation", "test"):
        pairs = hf_pairs(6) + ([{"en": "the dog", "de": " "}] if part == "train" else [])
        hf_write_pairs(folder / f"{part}.json", pairs)
    options = {**BASE, "model_name_or_path": models["marian"], "output_dir": str(tmp_path / "out")}
    options |= {"dataset_name": str(folder), "cache_dir": str(tmp_path / "cache"), "use_cpu": True}
    options |= {"do_train": True, "do_eval": True, "predict_with_generate": True}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(options), encoding="utf-8")
    run([str(file)])
    result = numbers(tmp_path / "out")
    assert result["train_samples"] == 6 and "eval_bleu" in result


# What is refused. Each: options, lines of a training file (None: the whole one), what the last line says.
GOOD = json.dumps({"translation": {"en": "the dog", "de": "Hund"}})
REFUSED: dict[str, tuple[dict[str, Any], list[str] | None, str]] = {
    "unknown option": ({"num_beems": 2}, None, "num_beems: unknown argument; did you mean --num_beams"),
    "not positive": ({"max_source_length": 0}, None, "max_source_length: got 0, accepted: an integer, at least 1"),
    "optimizer": (
        {"optim": "lngdd"},
        None,
        "optim: got 'lngdd' (did you mean lngd?), accepted: lngd, muon, soap, adamw",
    ),
    "settings name": ({"optim_args": "factor_intervall=3"}, None, "optim_args: unknown name 'factor_intervall'; did"),
    "no translation model": (
        {"config_name": "resnet"},
        None,
        "config_name: got 'resnet' (a resnet), accepted: a model for translation",
    ),
    "two strategies": (
        {"load_best_model_at_end": "true", "save_strategy": "epoch"},
        None,
        "load_best_model_at_end: --load_best_model_at_end",
    ),
    "no language": ({"source_lang": None}, None, "source_lang: got none, accepted: a language"),
    "unknown language": ({"target_lang": "fr"}, None, "target_lang: got 'fr', "),
    "same language": ({"target_lang": "en"}, None, "target_lang: got 'en', which is the source"),
    "no model": ({"model_name_or_path": None}, None, "model_name_or_path: got none, accepted: a model"),
    "model not there": ({"model_name_or_path": "no/where"}, None, "model_name_or_path: got 'no/where'"),
    "no tokenizer": ({"tokenizer_name": "no/where"}, None, "tokenizer_name: got 'no/where'"),
    "override name": ({"config_overrides": "dropuot=0"}, None, "config_overrides: unknown name 'dropuot'; did you"),
    "override value": ({"config_overrides": "dropout=much"}, None, "config_overrides: dropout: got 'much'"),
    "override sense": ({"config_overrides": "d_model=17"}, None, "config_overrides: got 'd_model=17'"),
    "first token": ({"forced_bos_token": "__xx__"}, None, "forced_bos_token: got '__xx__', accepted: a token"),
    "no file": ({"train_file": None}, None, "train_file: got none, accepted: a file of sentence pairs"),
    "file not there": ({"train_file": "nowhere.json"}, None, "train_file: got 'nowhere.json', which is no file"),
    "kind of file": ({"train_file": "pairs.txt"}, None, "train_file: got 'pairs.txt', accepted: a file that ends in"),
    "files and set": ({"dataset_name": "wmt16"}, None, "dataset_name: got 'wmt16' and files"),
    "beams twice": ({"num_beams": 2, "generation_num_beams": 3}, None, "num_beams: got 2 and --generation_num_beams 3"),
    "no checkpoint": ({"resume_from_checkpoint": "true"}, None, "resume_from_checkpoint: got 'true', but"),
    "empty file": ({}, [], "which is empty, accepted: at least one line"),
    "broken line": ({}, [GOOD, GOOD, '{"translation": {"en": '], "train.json, line 3: not JSON"),
    "name of a column": ({"target_column": "du"}, ['{"en": "a", "de": "b"}'], "got 'du', "),
    "no column": ({}, [GOOD, '{"en": "a", "de": "b"}'], "line 2: no column 'translation', found: en, de"),
    "no object": ({}, ["[1]"], "line 1: got a JSON list, accepted: an object"),
    "no pair": ({}, ['{"translation": "a"}'], "line 1: column 'translation': accepted: an object"),
    "no target": ({}, [GOOD, '{"translation": {"en": "a"}}'], "line 2: a source 'en' without a target 'de'"),
    "no source": ({}, [GOOD, '{"translation": {"de": "a"}}'], "line 2: no source 'en'"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_wrong_ends_it_before_training(
    case: str, models: Files, data: Files, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    changes, lines, words = REFUSED[case]
    options = {"model_name_or_path": models["marian"], "output_dir": tmp_path / "out", **data}
    if lines is not None:
        options["train_file"] = hf_write_pairs(tmp_path / "train.json", lines)
    last = refused(arguments({**options, **changes}, "--do_train", *FLAGS))
    own = lines is None or "target_column" in changes
    assert last.startswith("error: " if own else "error: train_file: ") and words in last, last
    assert not (tmp_path / "out" / "train_results.json").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(f"{GOOD}\n".encode() * 400)[:-20], "cannot be read"),
        (b"no gzip", "cannot be read"),
        (gzip.compress(GOOD.encode() + b"\n\xff\xfe\n"), "line 2: got invalid start byte, accepted: UTF-8"),
    ],
    # gzip writes the time of day into its bytes: as a name they would differ from one test process to the next
    ids=["cut short", "no gzip", "no UTF-8"],
)
def test_damaged_files(content: bytes, words: str, tmp_path: Path, refused: Callable[[list[str]], str]) -> None:
    file = tmp_path / "train.json.gz"
    file.write_bytes(content)
    options = {"model_name_or_path": "unread", "output_dir": tmp_path / "out", "train_file": file}
    last = refused(arguments(options, "--do_train", *FLAGS))
    assert last.startswith("error: train_file: ") and words in last


def pairs_in(path: Path, part: str = "train", **options: Any) -> dict[str, list[str]]:
    given = run_translation.DataArguments(source_lang="en", target_lang="de", **options)
    return run_translation.from_file(f"{part}_file", str(path), given).to_dict()


PAIRS = {"source": ['say "a, b"', "c"], "target": ["sag a,\nb", "d"]}
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "a.csv": ('en,x,de\n"say ""a, b""",1,"sag a,\nb"\nc,2,d\n', {}),
    "b.csv": ('\ufeffwords,x,de\r\n"say ""a, b""",1,"sag a,\nb"\r\nc,2,d\r\n', {"source_column": "words"}),
    "c.json": (
        json.dumps({"s": 'say "a, b"', "t": "sag a,\nb"}) + '\n\n{"s": "c", "t": "d"}\n',
        {"source_column": "s", "target_column": "t"},
    ),
}


@pytest.mark.parametrize("name", list(TABLES))
@pytest.mark.parametrize("zipped", [False, True])
def test_tables_and_columns(name: str, zipped: bool, tmp_path: Path) -> None:
    text, options = TABLES[name]
    path = tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    assert pairs_in(path, **options) == PAIRS


def test_tables_with_tabs_have_no_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('de\ten\n"gut\tgood, "well"\n', encoding="utf-8")
    assert pairs_in(path) == {"source": ['good, "well"'], "target": ['"gut']}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("en,de\na,b,c\n", "train_file: {}, line 2: more values than the header has columns: ['c']"),
        ("en,de\na\n", "train_file: {}, line 2: a source 'en' without a target 'de'"),
        ("en,fr\na,b\n", "target_column: got 'de', {}, line 2 has: en, fr"),
        ('en,de\n"a,b\n', "train_file: {}, after line 1: cannot be read as a table"),
        ("en,de\n", "which is empty"),
    ],
)
def test_damaged_tables(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(words.format(path))):
        pairs_in(path)


def test_what_is_predicted_needs_no_translations_and_some_are_no_accident(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for text in ("en\na\nb\n", "en,de\na,\nb,\n"):
        path.write_text(text, encoding="utf-8")
        assert pairs_in(path, "test") == {"source": ["a", "b"]}
        with pytest.raises(UsageError, match="target"):
            pairs_in(path)
    path.write_text("en,de\na,\nb,c\n", encoding="utf-8")
    with pytest.raises(UsageError, match="line 2: a source 'en' without a target 'de'"):
        pairs_in(path, "test")


@pytest.mark.parametrize("kind", ["a file", "a data set"])
def test_sources_alone_are_translated(
    kind: str, models: Files, tmp_path: Path, run: Run, refused: Callable[[list[str]], str]
) -> None:
    rows = [{"source": pair["en"]} for pair in hf_pairs(3)]
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = {"test_file": path} if kind == "a file" else {"dataset_name": tmp_path / "set", "cache_dir": tmp_path / "c"}
    options = {"model_name_or_path": models["marian"], "output_dir": tmp_path / "out", "source_column": "source"}
    run(arguments({**options, **given}, "--do_predict", *FLAGS))
    assert (tmp_path / "out" / "generated_predictions.txt").read_text(encoding="utf-8").count("\n") == 3
    assert "predict_runtime" in numbers(tmp_path / "out") and not {"predict_bleu", "predict_loss"} & set(
        numbers(tmp_path / "out")
    )
    if kind == "a file":
        last = refused(arguments({**options, **given}, "--do_predict", "--use_cpu"))
        assert last.startswith("error: predict_with_generate: got false for test data without translations")


@pytest.mark.parametrize("pad", [False, True])
def test_cut_sentences_are_counted(pad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens and the end are four: not cut; a sentence of five is."""
    said: list[str] = []
    monkeypatch.setattr(run_translation.logger, "warning", said.append)
    data = run_translation.DataArguments(
        source_lang="en", target_lang="de", max_source_length=4, pad_to_max_length=pad, overwrite_cache=True
    )
    rows = {"source": ["dog sees cat", "dog sees cat cat", "dog"], "target": ["Hund"] * 3}
    made = run_translation.tokenize(datasets.Dataset.from_dict(rows), hf_tokenizer(), data, 2, "train")
    assert said == ["train: 1 of 3 sources have more than 4 tokens and are cut"]
    assert made.column_names == ["labels", "input_ids", "attention_mask"]
    assert [sum(mask) for mask in made["attention_mask"]] == [4, 4, 2]


def test_a_multilingual_tokenizer_knows_its_languages(
    models: Files, data: Files, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    options = {"model_name_or_path": models["mbart"], "output_dir": tmp_path / "out", **data}
    last = refused(arguments({**options, "source_lang": "en_XX", "target_lang": "de"}, "--do_train", *FLAGS))
    assert last.startswith("error: target_lang: got 'de', the tokenizer knows: ar_AR") and "de_DE" in last


def test_help_lists_every_argument(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["run_translation.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        run_translation.main()
    said = capsys.readouterr().out
    assert caught.value.code == 0 and "--optim_args" in said and "--source_prefix" in said


# tokenizer, family, languages, the target language's token, whether the target begins with it
KINDS: dict[str, tuple[Any, str, str, str, str, bool]] = {
    "mbart": (lambda folder: hf_mbart_tokenizer(), "mbart", "en_XX", "de_DE", "de_DE", False),
    "mbart50": (lambda folder: MBart50Tokenizer(), "mbart", "en_XX", "de_DE", "de_DE", True),
    "nllb": (lambda folder: NllbTokenizer(), "m2m100", "eng_Latn", "deu_Latn", "deu_Latn", True),
}


def languages(source: str, target: str, **more: Any) -> Any:
    return SimpleNamespace(**{"source_lang": source, "target_lang": target, "forced_bos_token": None, **more})


@pytest.mark.parametrize("kind", list(KINDS))
def test_both_sides_get_their_language(kind: str, tmp_path: Path) -> None:
    make, family, source, target, token, in_front = KINDS[kind]
    tokenizer = make(tmp_path)
    model = hf_seq2seq_model(family, tokenizer, decoder_start_token_id=None)
    set_languages(model, tokenizer, languages(source, target, source_prefix=""))
    number = tokenizer.convert_tokens_to_ids(token)
    labels = tokenizer(text_target="Hund")["input_ids"]
    assert number != tokenizer.unk_token_id and number in labels
    assert number not in tokenizer("the dog")["input_ids"]
    start = model.config.decoder_start_token_id
    assert model.generation_config.decoder_start_token_id == start
    if in_front:
        assert (start, model.generation_config.forced_bos_token_id) == (tokenizer.eos_token_id, number)
    else:
        assert (start, model.generation_config.forced_bos_token_id) == (number, None)


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_unknown_language_is_refused(kind: str, tmp_path: Path) -> None:
    make, family, source, target, _, _ = KINDS[kind]
    tokenizer = make(tmp_path)
    model = hf_seq2seq_model(family, tokenizer)
    with pytest.raises(UsageError, match="^source_lang: got 'xx', the tokenizer knows: .*"):
        set_languages(model, tokenizer, languages("xx", target))
    with pytest.raises(UsageError, match="^target_lang: got 'xx', the tokenizer knows: .*"):
        set_languages(model, tokenizer, languages(source, "xx"))


def test_a_first_token_of_choice() -> None:
    tokenizer = hf_tokenizer(("__de__",))
    model = hf_seq2seq_model("m2m100", tokenizer)
    set_languages(model, tokenizer, languages("en", "de", forced_bos_token="__de__", source_prefix=None))
    assert model.generation_config.forced_bos_token_id == tokenizer.convert_tokens_to_ids("__de__")


def test_a_decoder_without_a_start_is_refused() -> None:
    tokenizer = hf_tokenizer()
    model = hf_seq2seq_model("mbart", tokenizer)
    with pytest.raises(UsageError, match="decoder_start_token_id: got none"):
        set_languages(model, tokenizer, languages("en", "de", source_prefix=None))


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_predictions_keep_the_order_of_the_file(strategy: str, tmp_path: Path) -> None:
    options = {
        "config_name": SAMPLE / "model",
        "config_overrides": "d_model=16,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=16,decoder_ffn_dim=16",
        "tokenizer_name": SAMPLE / "tokenizer",
        "source_lang": "en",
        "target_lang": "de",
        "test_file": SAMPLE / "test.json.gz",
        "max_predict_samples": 60,
        "per_device_eval_batch_size": 8,
        "train_sampling_strategy": strategy,
        "report_to": "none",
        "output_dir": tmp_path,
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    parsed = run_translation.parse([*arguments, "--do_predict", "--predict_with_generate", "--use_cpu"])
    trainer, parts, _ = run_translation.prepare(*parsed)
    trainer.args.generation_max_length = 4
    result = run_translation.predict(trainer, parts["test"])
    labels = [[token for token in row.tolist() if token >= 0] for row in result.label_ids]
    pad = trainer.processing_class.pad_token_id
    assert [[t for t in row if t != pad] for row in labels] == [list(row) for row in parts["test"]["labels"]]
    assert trainer.args.train_sampling_strategy == strategy
