"""Images on their way to the model: reading, conversion, decoding once, augmentation, batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessorPil

from hf_lngd.integrations.usage import UsageError
from scripts import run_image_classification
from scripts.run_image_classification import (
    ImageSet,
    Normalise,
    Rows,
    confusion,
    decode,
    draw_confusion,
    draw_mistakes,
    in_mode,
    read_image,
    split,
    worst,
)
from tests.image_helpers import png as encoded

PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.1, 0.5, 0.9], image_std=[0.2, 0.5, 1.0])


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def rows_of(values: list[Any], labels: list[str] | None = None) -> Rows:
    table = datasets.Dataset.from_dict({"image": values, "row": range(1, len(values) + 1)})
    table = table if labels is None else table.add_column("label", labels)
    return Rows("train_file", "some.parquet", Path(), table, sorted(set(labels or [])))


def test_an_image_is_read_from_whatever_holds_it(tmp_path: Path) -> None:
    pixels = noise(6, 5, 3)
    (tmp_path / "a.png").write_bytes(encoded(pixels))
    kinds = [
        encoded(pixels),
        {"bytes": encoded(pixels), "path": "elsewhere.png"},
        {"bytes": None, "path": "a.png"},
        "a.png",
        str(tmp_path / "a.png"),
        pixels.tolist(),
        pixels,
        (pixels / 255.0).tolist(),
    ]
    for kind in kinds:
        assert np.array_equal(np.asarray(read_image(kind, tmp_path)), pixels)
    assert np.array_equal(np.asarray(read_image(pixels[:, :, 0].tolist(), tmp_path)), pixels[:, :, 0])
    assert read_image(pixels[:, :, :1], tmp_path).mode == "L"


@pytest.mark.parametrize(
    "value", [None, b"no image", "nowhere.png", [[300]], [[-1]], [1, 2], [[[1, 2]]], [[float("nan")]]]
)
def test_what_is_no_image_raises(value: Any, tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        read_image(value, tmp_path)


def test_modes_are_converted() -> None:
    grey = noise(4, 4)
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert wide.mode == "I;16"
    for image in (Image.fromarray(grey), wide, Image.fromarray(grey.astype(np.int32) * 257)):
        converted, mode = in_mode(image, 3)
        assert mode == image.mode and converted.mode == "RGB"
        assert np.array_equal(np.asarray(converted), np.stack([grey] * 3, -1))
    assert in_mode(wide, 1)[0].mode == "L"
    colours = Image.fromarray(noise(4, 4, 3))
    assert in_mode(colours, 3) == (colours, None)
    for mode in ("P", "RGBA", "CMYK", "LA", "1"):
        source = colours.convert("L").convert(mode) if mode in ("LA", "1") else colours.convert(mode)
        converted, told = in_mode(source, 3)
        assert (converted.mode, told) == ("RGB", mode)
    palette = colours.convert("P")
    palette.info["transparency"] = b"\x00" * 256
    assert in_mode(palette, 3)[0].mode == "RGB"


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(run_image_classification.logger, "warning", said.append)
    return said


def test_decoding_gives_what_the_processor_gives(warnings: list[str]) -> None:
    images = [noise(9 + i, 7, 3, seed=i) for i in range(3)]
    pixels, kept = decode(rows_of([encoded(image) for image in images]), PROCESSOR, 3, False)
    assert pixels.shape == (3, 3, 8, 8) and pixels.dtype == np.uint8 and list(kept) == [0, 1, 2] and not warnings
    expected = PROCESSOR([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    batch = Normalise(PROCESSOR, pixels.shape[1:])({"pixel_values": torch.from_numpy(pixels)})
    torch.testing.assert_close(batch["pixel_values"], expected, atol=1e-5, rtol=1e-5)


def test_grey_images_for_a_grey_model() -> None:
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    pixels, _ = decode(rows_of([encoded(noise(8, 8)), encoded(noise(8, 8, 3))]), processor, 1, False)
    assert pixels.shape == (2, 1, 8, 8)
    made = Normalise(processor, pixels.shape[1:])({"pixel_values": torch.from_numpy(pixels)})["pixel_values"]
    torch.testing.assert_close(made, torch.from_numpy(pixels) / 127.5 - 1)


def test_conversion_is_told_once(warnings: list[str]) -> None:
    values = [encoded(noise(8, 8)), encoded(noise(8, 8)), encoded(noise(8, 8, 4)), encoded(noise(8, 8, 3))]
    decode(rows_of(values), PROCESSOR, 3, False)
    assert warnings == ["some.parquet: 3 images are converted to RGB: 2 of L, 1 of RGBA"]


def test_corrupt_images_are_refused_or_counted(warnings: list[str]) -> None:
    whole = encoded(noise(30, 30, 3))
    values = [whole, whole[: len(whole) // 2], whole, b"text", whole]
    with pytest.raises(
        UsageError, match=r"^train_file: some.parquet, row 2: cannot be read as an image .*skip_corrupt"
    ):
        decode(rows_of(values), PROCESSOR, 3, False)
    pixels, kept = decode(rows_of(values), PROCESSOR, 3, True)
    assert len(pixels) == 3 and list(kept) == [0, 2, 4]
    told = "some.parquet: 2 of 5 images cannot be read and are left out: some.parquet, row 2, some.parquet, row 4"
    assert warnings == [told]
    with pytest.raises(UsageError, match="none of 2 images can be read"):
        decode(rows_of([b"a", b"b"]), PROCESSOR, 3, True)


def test_large_data_lie_in_a_file_that_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = [encoded(noise(8, 8, 3, seed=i)) for i in range(4)]
    inside, _ = decode(rows_of(values), PROCESSOR, 3, False)
    monkeypatch.setattr(run_image_classification, "IN_MEMORY", 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outside, _ = decode(rows_of(values), PROCESSOR, 3, False)
    assert not isinstance(inside, np.memmap) and isinstance(outside, np.memmap) and np.array_equal(inside, outside)
    batch = ImageSet(outside).__getitems__([2, 0])
    assert np.array_equal(batch["pixel_values"].numpy(), inside[[2, 0]]) and not list(tmp_path.iterdir())


def test_images_of_unlike_size_are_refused() -> None:
    processor = ViTImageProcessorPil(do_resize=False)
    with pytest.raises(UsageError, match=r"^image_size: some.parquet, row 2: got \[3, 9, 8\]"):
        decode(rows_of([encoded(noise(8, 8, 3)), encoded(noise(9, 8, 3))]), processor, 3, False)


@pytest.mark.parametrize("augment", ["none", "crop", "flip", "crop_flip"])
def test_augmentation(augment: str) -> None:
    pixels = noise(64, 3, 16, 16)
    images = ImageSet(pixels, np.arange(64), augment, seed=3)
    order = [7, 3, 63, 0, *range(20, 50)]
    batch = images.__getitems__(order)
    assert batch["pixel_values"].dtype == torch.uint8 and batch["labels"].tolist() == order
    for number, made in zip(order, batch["pixel_values"], strict=True):
        row, column = images.shifts[number]
        border = np.pad(pixels[number], ((0, 0), (2, 2), (2, 2)))
        expected = border[:, row : row + 16, column : column + 16]
        expected = expected[:, :, ::-1] if images.mirrored[number] else expected
        assert np.array_equal(made.numpy(), expected)
        assert np.array_equal(images[number]["pixel_values"].numpy(), expected)  # whatever its batch
    assert bool(images.mirrored.any()) == ("flip" in augment)
    assert len(np.unique(images.shifts)) == (5 if "crop" in augment else 1)
    assert images.pad == 2 and np.array_equal(images.pixels, noise(64, 3, 16, 16)), "the images themselves stay"


def test_augmentation_is_the_seeds_and_the_epochs() -> None:
    def pixels(seed: int, epoch: int) -> torch.Tensor:
        images = ImageSet(noise(16, 3, 8, 8), None, "crop_flip", seed)
        images.begin_epoch(epoch)
        torch.rand(epoch + 1)  # torch's random state has no part in it
        return images.__getitems__(range(16))["pixel_values"]

    assert torch.equal(pixels(1, 2), pixels(1, 2))
    assert not torch.equal(pixels(1, 2), pixels(1, 3)) and not torch.equal(pixels(1, 2), pixels(2, 2))


def test_workers_that_outlive_an_epoch_follow_it() -> None:
    images = ImageSet(noise(8, 3, 8, 8), None, "crop_flip")
    loader = DataLoader(images, 8, num_workers=1, persistent_workers=True, collate_fn=Normalise(PROCESSOR, (3, 8, 8)))
    for epoch in range(2):
        images.begin_epoch(epoch)
        (made,) = loader
        assert torch.equal(made["pixel_values"], loader.collate_fn(images.__getitems__(range(8)))["pixel_values"])


def test_a_split_takes_of_each_class_alike() -> None:
    labels = ["a"] * 20 + ["b"] * 40 + ["c"] * 20
    rows = rows_of([[[i]] for i in range(80)], labels)
    train, validation = split(rows, 0.25, 0)
    assert sorted(validation.labels or []) == ["a"] * 5 + ["b"] * 10 + ["c"] * 5
    numbers = [row["image"][0][0] for part in (train, validation) for row in part.table]
    assert sorted(numbers) == list(range(80))
    assert [labels[row["image"][0][0]] for row in train.table] == train.labels
    first = validation.table[0]
    assert validation.where(first).endswith(f"row {first['image'][0][0] + 1}")
    assert split(rows, 0.25, 0)[1].labels == validation.labels
    with pytest.raises(UsageError, match="^train_val_split: got 0.01 for 80 images"):
        split(rows, 0.01, 0)


def test_confusion_and_the_worst() -> None:
    labels, said = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 0, 2])
    counts = confusion(labels, said, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    shares = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.99, 0.01]])
    assert worst(shares, np.array([0, 1, 1, 1])).tolist() == [3, 1]


def blank(path: Path) -> bool:
    with Image.open(path) as picture:
        return len(picture.convert("RGB").getcolors(1 << 24) or []) < 20


@pytest.mark.parametrize("classes", [2, 1000])
def test_pictures_for_any_number_of_classes(classes: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw = np.random.default_rng(0)
    count = 2 * classes
    labels, names = draw.integers(0, classes, count), [f"a class with a long name {i}" for i in range(classes)]
    shares = draw.random((count, classes))
    draw_confusion(tmp_path / "c.png", labels, np.where(draw.random(count) < 0.7, labels, 0), names)
    channels = 1 if classes == 2 else 3
    draw_mistakes(tmp_path / "m.png", noise(count, channels, 8, 8), shares, labels, names)
    for name in ("c.png", "m.png"):
        assert not blank(tmp_path / name)
        with Image.open(tmp_path / name) as picture:
            assert 300 < picture.width < 3000 and 300 < picture.height < 3000
    draw_mistakes(tmp_path / "m.png", noise(count, 3, 8, 8), shares, shares.argmax(1), names)
    assert not (tmp_path / "m.png").exists()
