"""`scripts/run_image_classification.py` on tiny models: what it writes, that it resumes exactly."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import image_helpers
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from image_helpers import ALL, BASE, CLASSES, ROOT, numbers, picture, png, write_folder
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
)

from hf_lngd.integrations.image_batches import ImageSet
from scripts import run_image_classification

configs, cache, run = image_helpers.configs, image_helpers.cache, image_helpers.run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of images."""
    root = tmp_path_factory.mktemp("images")
    each = {"train": 6, "validation": 2, "test": 2}
    (root / "ATTRIBUTION.md").write_text("# Made up\n\nBy nobody.\n", encoding="utf-8")
    return {f"{part}_dir": str(write_folder(root / part, count, 100)) for part, count in each.items()}


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_from_end_to_end(
    family: str, configs: dict[str, str], folders: dict[str, str], tmp_path: Path, run: Callable[..., list[str]]
) -> None:
    folder = tmp_path / "my-model"
    size = {"image_size": 8} if family == "resnet" else {}
    options = {"config_name": configs[family], "output_dir": folder, **folders, **size, "optim_args": "damping_rho=0.7"}
    argv = run({**options, "hub_token": "hf_secret"}, *ALL)
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
    check_card(folder, result, argv)


def check_card(folder: Path, result: dict[str, Any], argv: list[str]) -> None:
    card = ModelCard.load(folder / "README.md")
    found = {(r.dataset_split, r.metric_name): r for r in card.data.eval_results}
    assert all(isinstance(entry, EvalResult) and entry.metric_type == "accuracy" for entry in found.values())
    assert found["validation", "Accuracy"].metric_value == result["eval_accuracy"]
    assert found["test", "Accuracy"].metric_value == result["predict_accuracy"]
    assert found["validation", "Top-5 accuracy"].metric_value == result["eval_top5_accuracy"]
    assert card.data.model_name == "my-model" and card.data.pipeline_tag == "image-classification"
    assert '"damping_rho": 0.7' in card.text and "By nobody." in card.text and "| pillow" not in card.text
    command = " ".join(card.text.split("```bash\n")[2].split("```")[0].replace("\\\n", " ").split())
    assert command == " ".join(["python scripts/run_image_classification.py", *argv]).replace(
        " --hub_token hf_secret", ""
    )
    compile(card.text.split("```python\n")[1].split("```")[0], "card", "exec")
    for name in ("confusion_matrix.png", "worst_mistakes.png"):
        assert (folder / name).is_file() == (f"({name})" in card.text)
    with Image.open(folder / "confusion_matrix.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(1 << 24) or []) > 20


def write_file(path: Path, each: int, kind: str) -> Path:
    """A file of images in one of the forms that are read."""
    rows: list[dict[str, Any]] = []
    for number in range(3):
        for index in range(each):
            pixels = picture(number, index)
            name = f"{path.stem}-{number}-{index}.png"
            (path.parent / name).write_bytes(png(pixels))
            forms = {"struct": {"bytes": png(pixels), "path": None}, "bytes": png(pixels), "path": name}
            forms |= {"struct-path": {"path": name}, "pixels": pixels.tolist(), "image": {"bytes": png(pixels)}}
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
        *((".parquet", kind) for kind in ("struct", "bytes", "image", "pixels")),
        *((".jsonl", kind) for kind in ("path", "struct-path")),
        (".json.gz", "pixels"),
    ],
)
def test_files_of_images(
    ending: str, kind: str, configs: dict[str, str], tmp_path: Path, run: Callable[..., list[str]]
) -> None:
    files = {f"{part}_file": write_file(tmp_path / f"{part}{ending}", 3, kind) for part in ("train", "validation")}
    options = {"config_name": configs["resnet"], "output_dir": tmp_path / "out", "image_size": 8, **files}
    run({**options, "max_steps": 1}, "--do_train", "--do_eval", "--use_cpu")
    result = numbers(tmp_path / "out")
    assert result["train_samples"] == 9 and "eval_accuracy" in result and "eval_top5_accuracy" not in result
    names = ["0", "1", "2"] if kind == "pixels" else list(CLASSES[:3])
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label == dict(enumerate(names))


def test_overrides_a_split_and_another_optimizer(
    configs: dict[str, str], folders: dict[str, str], tmp_path: Path, run: Callable[..., list[str]]
) -> None:
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


@pytest.mark.parametrize("family", ["vit", "swin", "resnet"])
@pytest.mark.parametrize("stop", [2, 5])
def test_resume_goes_on_to_the_same_end(
    stop: int,
    family: str,
    configs: dict[str, str],
    folders: dict[str, str],
    tmp_path: Path,
    run: Callable[..., list[str]],
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
    plain = weights("plain", augment="none")
    assert any(not torch.equal(value, plain[name]) for name, value in whole.items()), "augmentation was on"
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_resume_from_the_last_and_what_epoch_the_images_are_told(
    configs: dict[str, str],
    folders: dict[str, str],
    tmp_path: Path,
    run: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[int] = []
    monkeypatch.setattr(ImageSet, "begin_epoch", lambda self, epoch: told.append(epoch))
    options = {"config_name": configs["vit"], "output_dir": tmp_path, "train_dir": folders["train_dir"]}
    options |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "per_device_train_batch_size": 12}
    run(options, "--do_train", "--use_cpu")
    run({**options, "max_steps": 7, "resume_from_checkpoint": "last"}, "--do_train", "--use_cpu")
    history = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5, 6, 7]
    assert told == [0, 1, 1, 2]


def test_fine_tuning_evaluation_and_prediction_without_labels(
    configs: dict[str, str], folders: dict[str, str], tmp_path: Path, run: Callable[..., list[str]], capsys: Any
) -> None:
    first = tmp_path / "first"
    options = {"config_name": configs["vit"], "train_dir": folders["train_dir"], "output_dir": first}
    run({**options, "max_steps": 1}, "--do_train", "--use_cpu")
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
    with pytest.raises(SystemExit):
        run(options, "--do_train", "--use_cpu")
    last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert last.startswith(f"error: ignore_mismatched_sizes: got false, but {first} has other sizes than 2 classes")
    run({**options, "ignore_mismatched_sizes": "true"}, "--do_train", "--use_cpu")
    assert AutoConfig.from_pretrained(tmp_path / "third").id2label == {0: "cat", 1: "dog"}
    options = {"model_name_or_path": tmp_path / "third", "output_dir": tmp_path / "fourth"}
    with pytest.raises(SystemExit):
        run({**options, "validation_dir": folders["validation_dir"]}, "--do_eval", "--use_cpu")
    assert "label 'bird' is not in the model: cat, dog" in capsys.readouterr().err


def test_grey_models_and_json_arguments(
    configs: dict[str, str], folders: dict[str, str], tmp_path: Path, run: Callable[..., list[str]], cache: str
) -> None:
    options = {**BASE, "config_name": configs["resnet"], "config_overrides": "num_channels=1", "image_size": 8}
    options |= {"train_dir": folders["train_dir"], "output_dir": str(tmp_path / "out"), "use_cpu": True}
    options |= {"do_train": True, "max_steps": 1, "cache_dir": cache}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(options), encoding="utf-8")
    sys.argv = ["scripts/run_image_classification.py", str(file)]
    run_image_classification.main()
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean) == [0.5]
    assert 'convert("L")' in (tmp_path / "out" / "README.md").read_text(encoding="utf-8").replace("'", '"')


def test_answers_that_are_held_back(configs: dict[str, str], tmp_path: Path, run: Callable[..., list[str]]) -> None:
    train = write_file(tmp_path / "train.parquet", 2, "image")
    held = datasets.Dataset.from_dict({"image": [picture(0, 1).tolist()] * 2, "label": [-1, -1]})
    held.to_parquet(tmp_path / "test.parquet")
    options = {"config_name": configs["vit"], "output_dir": tmp_path / "out", "max_steps": 1, "train_file": train}
    run({**options, "test_file": tmp_path / "test.parquet"}, "--do_train", "--do_predict", "--use_cpu")
    assert "predict_accuracy" not in numbers(tmp_path / "out")
    lines = (tmp_path / "out" / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and lines[1].startswith(f'"{tmp_path}/test.parquet, row 1",')


@pytest.mark.parametrize("name", ["data set", "a [b] c"])
def test_a_data_set_in_a_folder_and_odd_names(
    name: str, configs: dict[str, str], tmp_path: Path, run: Callable[..., list[str]]
) -> None:
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


def test_the_script_as_a_command(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "scripts/run_image_classification.py"]
    asked = subprocess.run([*command, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert asked.returncode == 0 and "--optim_args" in asked.stdout and "--train_val_split" in asked.stdout
    argv = ["--config_name", "x", "--output_dir", str(tmp_path), "--do_train", "--train_dir", "nowhere"]
    done = subprocess.run([*command, *argv], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    expected = "error: train_dir: got 'nowhere', accepted: a folder with one folder of images a class"
    assert done.stderr.rstrip("\n").split("\n")[-1] == expected
