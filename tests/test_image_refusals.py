"""`scripts/run_image_classification.py` refuses what is wrong before it trains, in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import image_helpers
import pytest
from image_helpers import CLASSES, numbers, write_folder

configs, cache, run = image_helpers.configs, image_helpers.cache, image_helpers.run


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
    "lists": (_table(image=PIXELS, label=[[0], [1]]), FILE, "label_column_name: got 'label', which has List, accepted"),
    "null label": (_table(image=PIXELS, label=["a", None]), FILE, "train_file: {root}/t.parquet, row 2: no label in"),
    "one number": (_table(image=PIXELS, label=[3, 3]), FILE, "train_file: {root}/t.parquet has one class, '3'"),
    "pixels": (
        _table(image=[[[0, 999]]] * 4, label=[0, 1] * 2),
        {**FILE, **SHARED},
        "train_file: {root}/t.parquet, row ",
    ),
    "empty table": (_table(image=[], label=[]), FILE, "train_file: {root}/t.parquet is empty"),
    "empty file": (_text("t.jsonl", ""), {**FILE, "train_file": "t.jsonl"}, "train_file: got '{root}/t.jsonl', which"),
    "no parquet": (_text("t.parquet", "x"), FILE, "train_file: {root}/t.parquet: cannot be read as parquet"),
    "no json": (_text("t.json", '{"image": '), {**FILE, "train_file": "t.json"}, "train_file: {root}/t.json: cannot"),
    "kind of file": (_text("t.csv", "x"), {**FILE, "train_file": "t.csv"}, "train_file: got '{root}/t.csv', accepted"),
    "augment": (None, {"augment": "spin"}, "augment: got 'spin', accepted: none, crop, flip, crop_flip"),
    "share": (None, {"train_val_split": 1.5}, "train_val_split: got 1.5, accepted: a fraction in (0, 1)"),
    "few for a share": (
        None,
        {"validation_dir": None, "train_val_split": 0.01},
        "train_val_split: got 0.01 for 12 images",
    ),
    "lengths": (None, {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: got 'group_by_length'"),
    "size": (None, {"image_size": 0}, "image_size: got 0, accepted: an integer, at least 1"),
    "no size": (None, {"image_size": None}, "image_size: got none, and the configuration has none"),
    "channels": (None, {"config_overrides": "num_channels=4"}, "config_overrides: num_channels: got 4, accepted: 3"),
    "override list": (
        None,
        {"config_overrides": "depths=[1,x]"},
        "config_overrides: depths: got '[1,x]': accepted: a list",
    ),
    "override name": (None, {"config_overrides": "depth=[1]"}, "config_overrides: unknown name 'depth'; did you mean"),
    "override sense": (
        None,
        {"config_overrides": "hidden_act=x"},
        "config_overrides: got 'hidden_act=x', which makes no",
    ),
    "no model": (None, {"config_name": None}, "model_name_or_path: got none, accepted: a model"),
    "processor": (None, {"image_processor_name": "no/where"}, "image_processor_name: got 'no/where', from which no"),
    "option": (None, {"augmentt": "crop"}, "augmentt: unknown argument; did you mean --augment"),
    "optimizer": (None, {"optim": "lngdd"}, "optim: got 'lngdd' (did you mean lngd?)"),
    "data set": (None, {"dataset_name": "cifar10"}, "dataset_name: got 'cifar10' and files or folders"),
    "checkpoint": (None, {"resume_from_checkpoint": "true"}, "resume_from_checkpoint: got 'true', but"),
}
PATHS = ("train_dir", "validation_dir", "train_file")


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_wrong_ends_it_before_training(
    case: str,
    configs: dict[str, str],
    tmp_path: Path,
    run: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare, changes, words = REFUSED[case]
    write_folder(tmp_path / "train", 2)
    write_folder(tmp_path / "validation", 1)
    if prepare:
        prepare(tmp_path)
    options = {"config_name": configs["resnet"], "output_dir": tmp_path / "out", "image_size": 8}
    options |= {"train_dir": "train", "validation_dir": "validation", **changes}
    options |= {name: tmp_path / options[name] for name in PATHS if options.get(name)}
    with pytest.raises(SystemExit) as caught:
        run(options, "--do_train", "--do_eval", "--use_cpu")
    assert caught.value.code == 2
    last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert last.startswith("error: " + words.format(root=tmp_path)), last
    assert not (tmp_path / "out" / "train_results.json").exists()


def test_a_size_that_the_model_does_not_take(
    configs: dict[str, str], tmp_path: Path, run: Callable[..., list[str]], capsys: Any
) -> None:
    first, images = tmp_path / "first", write_folder(tmp_path / "train", 2)
    run(
        {"config_name": configs["vit"], "train_dir": images, "output_dir": first, "max_steps": 1},
        "--do_train",
        "--use_cpu",
    )
    options = {"model_name_or_path": first, "train_dir": images, "output_dir": tmp_path / "second"}
    with pytest.raises(SystemExit):
        run({**options, "image_size": 12}, "--do_train", "--use_cpu")
    last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert last.startswith("error: image_size: got images [3, 12, 12], which the model does not take")


def test_corrupt_images_can_be_left_out(configs: dict[str, str], tmp_path: Path, run: Callable[..., list[str]]) -> None:
    write_folder(tmp_path / "train", 2)
    _corrupt(tmp_path)
    options = {"config_name": configs["vit"], "train_dir": tmp_path / "train", "output_dir": tmp_path / "out"}
    run({**options, "max_steps": 1, "skip_corrupt_images": "true"}, "--do_train", "--use_cpu")
    assert numbers(tmp_path / "out")["train_samples"] == 11
