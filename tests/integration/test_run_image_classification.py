"""`scripts/run_image_classification.py` on tiny models: what it writes, that it resumes exactly, what it raises."""

from __future__ import annotations

import csv
import gzip
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

from scripts import run_image_classification
from scripts.run_image_classification import ImageSet
from tests.image_helpers import CLASSES, needs_image_processor, picture, png, write_folder

Files = dict[str, str]
Run = Callable[..., list[str]]
Ends = Callable[..., str]

CONFIGS: dict[str, Callable[[], Any]] = {
    "resnet": lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"),
    "vit": lambda: ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.1,
    ),
    "swin": lambda: SwinConfig(
        image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, mlp_ratio=2.0
    ),
}


BASE = {
    "max_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.01,
    "save_strategy": "no",
    "report_to": "none",
}
ALL = ["--do_train", "--do_eval", "--do_predict", "--use_cpu"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder with a configuration for each family."""
    root = tmp_path_factory.mktemp("configs")
    for family, config in CONFIGS.items():
        config().save_pretrained(root / family)
    return {family: str(root / family) for family in CONFIGS}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, cache: str) -> Run:
    """The script's main function in this process; returns its arguments. Options that are None are left out."""

    def start(options: dict[str, Any], *flags: str) -> list[str]:
        given = {**BASE, "cache_dir": cache, **options}
        argv = [*flags, *(part for k, v in given.items() if v is not None for part in (f"--{k}", str(v)))]
        monkeypatch.setattr(sys, "argv", ["scripts/run_image_classification.py", *argv])
        run_image_classification.exit_on_usage_error(run_image_classification.main)
        return argv

    return start


@pytest.fixture
def refused(run: Run, capsys: pytest.CaptureFixture[str]) -> Ends:
    """The last line of a run that ends with status 2."""

    def start(options: dict[str, Any], *flags: str) -> str:
        with pytest.raises(SystemExit) as caught:
            run(options, *flags)
        assert caught.value.code == 2
        return capsys.readouterr().err.rstrip("\n").split("\n")[-1]

    return start


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Folders of images."""
    root = tmp_path_factory.mktemp("images")
    each = {"train": 6, "validation": 2, "test": 2}
    (root / "ATTRIBUTION.md").write_text("# Made up\n\nBy nobody.\n", encoding="utf-8")
    return {f"{part}_dir": str(write_folder(root / part, count, 100)) for part, count in each.items()}


@needs_image_processor
@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_from_end_to_end(family: str, configs: Files, folders: Files, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "my-model"
    size = {"image_size": 8} if family == "resnet" else {}
    options = {"config_name": configs[family], "output_dir": folder, **folders, **size, "optim_args": "damping=0.7"}
    run({**options, "hub_token": "hf_secret"}, *ALL)
    result = numbers(folder)
    wanted = ("eval_accuracy", "eval_top5_accuracy", "eval_loss", "train_loss", "train_runtime", "predict_accuracy")
    assert all(math.isfinite(result[key]) for key in wanted)
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    right = [line["predicted"] == line["label"] for line in lines]
    assert len(lines) == 12 and sum(right) / 12 == pytest.approx(result["predict_accuracy"], abs=1e-6)
    assert all(Path(line["image"]).parent.name == line["label"] for line in lines)
    routing = json.loads((folder / "routing.json").read_text(encoding="utf-8"))
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
    )
    assert {r["parameter"] for r in routing["parameters"]} == {name for name, _ in model.named_parameters()}
    assert model.config.id2label == dict(enumerate(CLASSES)) and model.config.label2id["owl"] == 5
    with Image.open(lines[0]["image"]) as image, torch.no_grad():
        logits = model(**processor(image, return_tensors="pt")).logits[0]
    best = int(logits.argmax())
    assert CLASSES[best] == lines[0]["predicted"]
    assert float(logits.softmax(0)[best]) == pytest.approx(float(lines[0]["probability"]), abs=1e-4)
    card = ModelCard.load(folder / "README.md")
    assert "By nobody." in card.text and "hf_secret" not in card.text and "(worst_mistakes.png)" in card.text
    assert all((folder / name).is_file() for name in ("confusion_matrix.png", "worst_mistakes.png"))


def write_file(path: Path, each: int, kind: str) -> Path:
    """A file of images in one of the forms that are read."""
    rows: list[dict[str, Any]] = []
    for number in range(3):
        for index in range(each):
            pixels = picture(number, index)
            name = f"{path.stem}-{number}-{index}.png"
            (path.parent / name).write_bytes(png(pixels))
            forms = {"bytes": png(pixels), "path": name, "pixels": pixels.tolist(), "image": {"bytes": png(pixels)}}
            rows.append({"image": forms[kind], "label": number if kind == "pixels" else CLASSES[number]})
    if path.suffix == ".parquet":
        made = datasets.Dataset.from_list(rows)
        if kind == "image":
            made = made.cast_column("image", datasets.Image())
            made = made.cast_column("label", datasets.ClassLabel(names=list(CLASSES[:3])))
        made.to_parquet(path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (".parquet", "bytes"),
        (".parquet", "image"),
        (".jsonl", "path"),
        (".json.gz", "pixels"),
    ],
)
def test_files_of_images(ending: str, kind: str, configs: Files, tmp_path: Path, run: Run) -> None:
    files = {f"{part}_file": write_file(tmp_path / f"{part}{ending}", 3, kind) for part in ("train", "validation")}
    options = {"config_name": configs["resnet"], "output_dir": tmp_path / "out", "image_size": 8, **files}
    run({**options, "max_steps": 1}, "--do_train", "--do_eval", "--use_cpu")
    result = numbers(tmp_path / "out")
    assert result["train_samples"] == 9 and "eval_accuracy" in result and "eval_top5_accuracy" not in result
    names = ["0", "1", "2"] if kind == "pixels" else list(CLASSES[:3])
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label == dict(enumerate(names))


@needs_image_processor
def test_overrides_a_split_and_another_optimizer(configs: Files, folders: Files, tmp_path: Path, run: Run) -> None:
    overrides = "depths=[1,1,2],hidden_sizes=[8,8,16],embedding_size=6,hidden_act=silu"
    options = {"config_name": configs["resnet"], "output_dir": tmp_path, "train_dir": folders["train_dir"]}
    options |= {"config_overrides": overrides, "image_size": 10, "optim": "adamw_torch", "train_val_split": 0.5}
    (tmp_path / "routing.json").write_text("{}", encoding="utf-8")
    run({**options, "max_train_samples": 9, "augment": "none", "max_steps": 1}, "--do_train", "--do_eval", "--use_cpu")
    assert not (tmp_path / "routing.json").exists()
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.depths, config.hidden_sizes, config.hidden_act) == ([1, 1, 2], [8, 8, 16], "silu")
    assert config.stage_names[-1] == "stage3" and config.out_features == ["stage3"]
    assert AutoImageProcessor.from_pretrained(tmp_path).size == {"height": 10, "width": 10}
    assert numbers(tmp_path)["train_samples"] == 9
    assert "eval_samples_per_second" in numbers(tmp_path)
    with open(tmp_path / "predictions.csv", encoding="utf-8", newline="") as file:  # of the validation images
        lines = list(csv.DictReader(file))
    right = [line["predicted"] == line["label"] for line in lines]
    assert len(lines) == 18 and sum(right) / 18 == pytest.approx(numbers(tmp_path)["eval_accuracy"], abs=1e-6)


def test_a_type_of_model_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", None)
    args = run_image_classification.ModelArguments(config_name="resnet", config_overrides="depths=[1,1,2]")
    factory = AutoModelForImageClassification
    config = run_image_classification.run_shared.load_config(args, factory, "image classification")
    assert (config.model_type, config.depths, len(config.stage_names)) == ("resnet", [1, 1, 2], 4)


@pytest.mark.parametrize(("family", "stop"), [("swin", 5), ("resnet", 2)])
def test_resume_goes_on_to_the_same_end(
    family: str, stop: int, configs: Files, folders: Files, tmp_path: Path, run: Run
) -> None:
    """An epoch has three steps: resumed within the first, and within the second."""

    def weights(folder: str, **more: Any) -> dict[str, torch.Tensor]:
        options = {"config_name": configs[family], "output_dir": tmp_path / folder, "train_dir": folders["train_dir"]}
        options |= {"save_strategy": "steps", "save_steps": stop, "max_steps": stop + 2}
        options |= {"optim_args": "factor_interval=3", **({"image_size": 8} if family == "resnet" else {})}
        run({**options, "per_device_train_batch_size": 12, "augment": "crop_flip", **more}, "--do_train", "--use_cpu")
        return AutoModelForImageClassification.from_pretrained(tmp_path / folder).state_dict()

    whole = weights("whole")
    resumed = weights("resumed", resume_from_checkpoint=tmp_path / "whole" / f"checkpoint-{stop}")
    if family == "resnet":
        plain = weights("plain", augment="none")
        assert any(not torch.equal(value, plain[name]) for name, value in whole.items()), "augmentation was on"
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_resume_from_the_last_and_what_epoch_the_images_are_told(
    configs: Files, folders: Files, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    begin = ImageSet.begin_epoch
    monkeypatch.setattr(ImageSet, "begin_epoch", lambda self, epoch: (told.append(epoch), begin(self, epoch)))
    options = {"config_name": configs["vit"], "output_dir": tmp_path, "train_dir": folders["train_dir"]}
    options |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "per_device_train_batch_size": 12}
    run(options, "--do_train", "--use_cpu")
    run({**options, "max_steps": 7, "resume_from_checkpoint": "last"}, "--do_train", "--use_cpu")
    history = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5, 6, 7]
    assert told == [0, 0, 1, 0, 1, 2]  # the first of each run when it is made


@needs_image_processor
def test_fine_tuning_evaluation_and_prediction_without_labels(
    configs: Files, folders: Files, tmp_path: Path, run: Run, refused: Ends
) -> None:
    first = tmp_path / "first"
    options = {"config_name": configs["vit"], "train_dir": folders["train_dir"], "output_dir": first}
    run({**options, "max_steps": 1}, "--do_train", "--use_cpu")
    larger = {**options, "config_name": None, "model_name_or_path": first, "output_dir": tmp_path / "larger"}
    last = refused({**larger, "image_size": 12}, "--do_train", "--use_cpu")
    assert last.startswith("error: image_size: got images [3, 12, 12], which the model does not take")
    flat = tmp_path / "flat"
    flat.mkdir()
    for index in range(3):
        (flat / f"{index}.png").write_bytes(png(picture(index, index)))
    part = write_folder(tmp_path / "part", 2, 5, CLASSES[1:3])  # classes keep the numbers that the model knows
    options = {"model_name_or_path": first, "output_dir": tmp_path / "second", "validation_dir": part, "test_dir": flat}
    run(options, "--do_eval", "--do_predict", "--use_cpu")
    result = numbers(tmp_path / "second")
    assert "eval_accuracy" in result and "predict_accuracy" not in result
    lines = (tmp_path / "second" / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "image,predicted,probability" and len(lines) == 4
    options = {"model_name_or_path": first, "output_dir": tmp_path / "third", "train_dir": part, "max_steps": 1}
    last = refused(options, "--do_train", "--use_cpu")
    assert last.startswith(f"error: ignore_mismatched_sizes: got false, but {first} has other sizes than 2 classes")
    run({**options, "ignore_mismatched_sizes": "true"}, "--do_train", "--use_cpu")
    assert AutoConfig.from_pretrained(tmp_path / "third").id2label == {0: "cat", 1: "dog"}
    options = {"model_name_or_path": tmp_path / "third", "output_dir": tmp_path / "fourth"}
    last = refused({**options, "validation_dir": folders["validation_dir"]}, "--do_eval", "--use_cpu")
    assert "label 'bird' is not in the model: cat, dog" in last


def test_answers_that_are_held_back(configs: Files, tmp_path: Path, run: Run) -> None:
    train = write_file(tmp_path / "train.parquet", 2, "image")
    held = datasets.Dataset.from_dict({"image": [picture(0, 1).tolist()] * 2, "label": [-1, -1]})
    held.to_parquet(tmp_path / "test.parquet")
    options = {"config_name": configs["vit"], "output_dir": tmp_path / "out", "max_steps": 1, "train_file": train}
    run({**options, "test_file": tmp_path / "test.parquet"}, "--do_train", "--do_predict", "--use_cpu")
    assert "predict_accuracy" not in numbers(tmp_path / "out")
    lines = (tmp_path / "out" / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and lines[1].startswith(f'"{tmp_path}/test.parquet, row 1",')


@pytest.mark.parametrize("name", ["data set", "a [b] c"])
def test_a_data_set_in_a_folder_and_odd_names(name: str, configs: Files, tmp_path: Path, run: Run) -> None:
    root = tmp_path / name
    for part, each in (("train", 3), ("validation", 1), ("test", 1)):
        write_folder(root / part, each)
    source = {"dataset_name": root} if name == "data set" else {"train_dir": root / "train", "test_dir": root / "test"}
    options = {"config_name": configs["vit"], "output_dir": tmp_path / "out", "max_steps": 1, "train_val_split": 0.34}
    run({**options, **source}, *ALL)
    result = numbers(tmp_path / "out")
    assert result["train_samples"] == (18 if name == "data set" else 11)
    assert "eval_accuracy" in result and "predict_accuracy" in result
    assert not [line for line in result if "loss" in line and not math.isfinite(result[line])]


# Each: what is done to a copy of the data, options, what the last line says.
def _empty_class(root: Path) -> None:
    (root / "train" / "zebra").mkdir()


def _unknown_class(root: Path) -> None:
    write_folder(root / "validation", 1, classes=("zebra",))


def _corrupt(root: Path) -> None:
    (root / "train" / "cat" / "test_1.png").write_bytes(b"no picture")


def _one_class(root: Path) -> None:
    for name in CLASSES[1:]:
        for file in (root / "train" / name).iterdir():
            file.unlink()
        (root / "train" / name).rmdir()


def _table(**columns: Any) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        datasets.Dataset.from_dict(columns).to_parquet(root / "t.parquet")

    return write


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(text, encoding="utf-8") and None


PIXELS = [[[0, 1], [2, 3]]] * 2
FILE = {"train_dir": None, "train_file": "t.parquet"}
SHARED = {"validation_dir": None, "train_val_split": 0.5}
REFUSED: dict[str, tuple[Callable[[Path], None] | None, dict[str, Any], str]] = {
    "empty class": (_empty_class, {}, "train_dir: {root}/train/zebra has no images"),
    "class of validation": (_unknown_class, {}, "validation_dir: {root}/validation/zebra/test_0.png: label 'zebra' is"),
    "corrupt image": (_corrupt, {}, "train_dir: {root}/train/cat/test_1.png: cannot be read as an image"),
    "one class": (_one_class, {}, "train_dir: {root}/train has one class, 'bird', accepted: at least two"),
    "no classes": (None, {"train_dir": "train/cat"}, "train_dir: got '{root}/train/cat', which has no folders"),
    "no folder": (None, {"train_dir": "nowhere"}, "train_dir: got '{root}/nowhere', accepted: a folder"),
    "no data": (None, {"train_dir": None}, "train_dir: got none, accepted: a folder, --train_file, or --dataset_name"),
    "both": (_table(image=PIXELS, label=[0, 1]), {"train_file": "t.parquet"}, "train_dir: got '{root}/train' and"),
    "no image column": (_table(img=PIXELS, label=[0, 1]), FILE, "image_column_name: got 'image', {root}/t.parquet has"),
    "no label column": (
        _table(image=PIXELS, fine=[0, 1]),
        FILE,
        "label_column_name: got 'label', {root}/t.parquet has",
    ),
    "floats": (_table(image=PIXELS, label=[0.5, 1.5]), FILE, "label_column_name: got 'label', which has float64, acc"),
    "null label": (_table(image=PIXELS, label=["a", None]), FILE, "train_file: {root}/t.parquet, row 2: no label in"),
    "one number": (_table(image=PIXELS, label=[3, 3]), FILE, "train_file: {root}/t.parquet has one class, '3'"),
    "pixels": (
        _table(image=[[[0, 999]]] * 4, label=[0, 1] * 2),
        {**FILE, **SHARED},
        "train_file: {root}/t.parquet, row ",
    ),
    "empty table": (_table(image=[], label=[]), FILE, "train_file: {root}/t.parquet is empty"),
    "no parquet": (_text("t.parquet", "x"), FILE, "train_file: {root}/t.parquet: cannot be read as parquet"),
    "augment": (None, {"augment": "spin"}, "augment: got 'spin', accepted: none, crop, flip, crop_flip"),
    "share": (None, {"train_val_split": 1.5}, "train_val_split: got 1.5, accepted: a fraction in (0, 1)"),
    "few for a share": (
        None,
        {"validation_dir": None, "train_val_split": 0.01},
        "train_val_split: got 0.01 for 12 images",
    ),
    "lengths": (None, {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: got 'group_by_length'"),
    "no size": (None, {"image_size": None}, "image_size: got none, and the configuration has none"),
    "no image model": (None, {"config_name": "marian"}, "config_name: got 'marian' (a marian), accepted: a model for"),
    "channels": (None, {"config_overrides": "num_channels=4"}, "config_overrides: num_channels: got 4, accepted: 3"),
    "override list": (
        None,
        {"config_overrides": "depths=[1,x]"},
        "config_overrides: depths: got '[1,x]': accepted: a list",
    ),
    "processor": (None, {"image_processor_name": "no/where"}, "image_processor_name: got 'no/where', from which no"),
    "data set": (None, {"dataset_name": "cifar10"}, "dataset_name: got 'cifar10' and files or folders"),
}
PATHS = ("train_dir", "validation_dir", "train_file")


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_wrong_ends_it_before_training(case: str, configs: Files, tmp_path: Path, refused: Ends) -> None:
    prepare, changes, words = REFUSED[case]
    write_folder(tmp_path / "train", 2)
    write_folder(tmp_path / "validation", 1)
    if prepare:
        prepare(tmp_path)
    options = {"config_name": configs["resnet"], "output_dir": tmp_path / "out", "image_size": 8}
    options |= {"train_dir": "train", "validation_dir": "validation", **changes}
    options |= {name: tmp_path / options[name] for name in PATHS if options.get(name)}
    last = refused(options, "--do_train", "--do_eval", "--use_cpu")
    assert last.startswith("error: " + words.format(root=tmp_path)), last
    assert not (tmp_path / "out" / "train_results.json").exists()
