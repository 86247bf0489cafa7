"""Images and their labels, read and checked before anything is decoded: folders, files, data sets of the Hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from numpy.typing import NDArray

from .image_args import DataArguments, ModelArguments
from .usage import UsageError

_ENDINGS = tuple(ImageFolder.EXTENSIONS)


@dataclass(frozen=True)
class Rows:
    """Images that are not decoded yet, with the names of their classes.

    Attributes:
        argument: that named them, for messages.
        origin: a file, a folder or a data set.
        images: the column, in any of the kinds that `image_pixels` reads.
        labels: the class of each; None: there are no labels.
        classes: in the order that their kind asks for: as the data set has them, by number, or by name.
        base: the folder that paths are relative to.
        numbers: of the rows in the file, from 0, where only some are kept.
    """

    argument: str
    origin: str
    images: Any
    labels: list[str] | None
    classes: list[str]
    base: Path = field(default_factory=Path)
    numbers: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Any]:
        return (row["image"] for row in self.images)

    def where(self, index: int) -> str:
        """The image's file, or the number of its row, from 1."""
        image = self.images[index]["image"]
        path = image if isinstance(image, str) else image.get("path") if isinstance(image, dict) else None
        if path:
            return str(path)
        number = index if self.numbers is None else int(self.numbers[index])
        return f"{self.origin}, row {number + 1}"

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> Rows:
        """Some of the rows."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            images=self.images.select(chosen),
            labels=None if self.labels is None else [self.labels[i] for i in chosen],
            numbers=chosen if self.numbers is None else self.numbers[chosen],
        )

    def sample(self, count: int | None, seed: int) -> Rows:
        """At most `count` rows, drawn by the seed, in their order: files are often sorted by class."""
        if count is None or count >= len(self):
            return self
        return self.select(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))


def load_rows(
    data: DataArguments, model: ModelArguments, parts: Sequence[str], share: bool, seed: int
) -> dict[str, Rows]:
    """The parts that are needed.

    Args:
        data: which folders, files or data set.
        model: its `cache_dir` and `token` are used.
        parts: of ``train``, ``validation``, ``test``.
        share: take validation from training where there is none.
        seed: of that split.

    Raises:
        UsageError: what cannot be read, is empty, lacks a column, a label or a class.
    """
    loaded = _from_hub(data, model) if data.dataset_name else {}
    rows: dict[str, Rows] = {}

    def read(part: str) -> Rows:
        if data.dataset_name:
            if part not in loaded:
                raise UsageError("dataset_name", f"{data.dataset_name} has no part {part}, found: {', '.join(loaded)}")
            return _columns(loaded[part], data, "dataset_name", f"{data.dataset_name}, {part}", Path(), part)
        argument, path = data.source(part) or ("", "")
        reader = _from_folder if argument.endswith("_dir") else _from_file
        return reader(argument, path, data, model, part)

    has_validation = "validation" in loaded or data.source("validation") is not None
    if "validation" in parts and share and not has_validation:
        rows["train"], rows["validation"] = split(read("train"), data.train_val_split, seed)
        return {part: rows[part] if part in rows else read(part) for part in parts}
    return {part: read(part) for part in parts}


def split(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Training and validation: a share of each class alike.

    Raises:
        UsageError: too few images for that.
    """
    labels = rows.labels or []
    numbers = datasets.Dataset.from_dict({"index": range(len(rows)), "label": labels}).class_encode_column("label")
    try:
        parts = numbers.train_test_split(share, stratify_by_column="label", seed=seed)
    except ValueError as error:
        raise UsageError("train_val_split", f"got {share} for {len(rows)} images of {rows.origin}: {error}") from error
    return rows.select(np.sort(parts["train"]["index"])), rows.select(np.sort(parts["test"]["index"]))


def class_numbers(rows: Rows, classes: Sequence[str], source: str) -> NDArray[np.int64]:
    """The labels as numbers of `classes` [N].

    Args:
        rows: with labels.
        classes: that the model knows.
        source: where these come from, for the message.

    Raises:
        UsageError: a label that is not among them.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    for index, label in enumerate(rows.labels or []):
        if label not in numbers:
            known = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
            raise UsageError(rows.argument, f"{rows.where(index)}: label {label!r} is not in {source}: {known}")
    return np.array([numbers[label] for label in rows.labels or []], dtype=np.int64)


def _from_folder(argument: str, path: str, data: DataArguments, model: ModelArguments, part: str) -> Rows:
    folders = sorted(p for p in Path(path).iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders and part != "test":
        raise UsageError(argument, f"got {path!r}, which has no folders, accepted: one folder of images a class")
    for folder in folders or [Path(path)]:
        if not any(file.suffix.lower() in _ENDINGS for file in folder.rglob("*")):
            raise UsageError(argument, f"{folder} has no images, accepted: files that end in .png, .jpg, …")
    try:
        loaded = datasets.load_dataset(
            "imagefolder",
            # Given as a pattern: names like test_1.png would otherwise make parts.
            data_files={part: f"{glob.escape(os.path.abspath(path))}/**"},
            drop_labels=not folders,
            split=part,
            cache_dir=model.cache_dir,
        )
    except Exception as error:  # whatever a builder raises: the folder is what the user gave
        raise UsageError(argument, f"got {path!r}: {error}") from error
    names = replace(data, image_column_name="image", label_column_name="label")
    return _columns(loaded, names, argument, path, Path(path), part)


def _from_file(argument: str, path: str, data: DataArguments, model: ModelArguments, part: str) -> Rows:
    if os.path.getsize(path) == 0:
        raise UsageError(argument, f"got {path!r}, which is empty, accepted: at least one image")
    kind = "parquet" if path.endswith(".parquet") else "json"
    try:
        loaded = datasets.load_dataset(
            kind, data_files={part: glob.escape(path)}, split=part, cache_dir=model.cache_dir
        )
    except Exception as error:  # as above
        cause = error.__cause__ or error
        if "corresponds to no data" in str(error):
            raise UsageError(argument, f"{path} is empty, accepted: at least one image") from error
        raise UsageError(argument, f"{path}: cannot be read as {kind}: {cause}") from error
    return _columns(loaded, data, argument, path, Path(path).parent, part)


def _from_hub(data: DataArguments, model: ModelArguments) -> Any:
    try:
        return datasets.load_dataset(
            data.dataset_name, data.dataset_config_name, cache_dir=model.cache_dir, token=model.token
        )
    except Exception as error:  # whatever the network, the Hub or a builder raises: the name is what the user gave
        raise UsageError("dataset_name", f"got {data.dataset_name!r}: {error}") from error


def _columns(loaded: Any, data: DataArguments, argument: str, origin: str, base: Path, part: str) -> Rows:
    """The two columns, checked."""
    if not len(loaded):
        raise UsageError(argument, f"{origin} is empty, accepted: at least one image")
    wanted = {"image_column_name": data.image_column_name}
    labelled = part != "test" or data.label_column_name in loaded.column_names
    if labelled:
        wanted["label_column_name"] = data.label_column_name
    for name, column in wanted.items():
        if column not in loaded.column_names:
            found = ", ".join(loaded.column_names)
            raise UsageError(name, f"got {column!r}, {origin} has: {found}")
    images = loaded.select_columns([data.image_column_name])
    if isinstance(loaded.features[data.image_column_name], datasets.Image):
        images = images.cast_column(data.image_column_name, datasets.Image(decode=False))
    if data.image_column_name != "image":
        images = images.rename_column(data.image_column_name, "image")
    rows = Rows(argument, origin, images, None, [], base)
    if not labelled:
        return rows
    if part == "test" and all(value in (None, -1) for value in loaded[data.label_column_name]):
        return rows  # how data sets hold back the answers
    labels, classes = _labels(loaded, data.label_column_name, rows)
    if part == "train" and len(set(labels)) < 2:
        raise UsageError(argument, f"{origin} has one class, {labels[0]!r}, accepted: at least two")
    return replace(rows, labels=labels, classes=classes)


def _labels(loaded: Any, column: str, rows: Rows) -> tuple[list[str], list[str]]:
    """The name of each row's class, and the classes in order."""
    feature, values = loaded.features[column], list(loaded[column])
    is_class = isinstance(feature, datasets.ClassLabel)
    kind = getattr(feature, "dtype", type(feature).__name__)
    if not is_class and not (kind in ("string", "large_string", "bool") or "int" in str(kind)):
        raise UsageError("label_column_name", f"got {column!r}, which has {kind}, accepted: class numbers or names")
    for index, value in enumerate(values):
        if value is None or value == "" or (is_class and value < 0):
            raise UsageError(rows.argument, f"{rows.where(index)}: no label in column {column!r}")
    if is_class:
        return [feature.names[value] for value in values], list(feature.names)
    return [str(value) for value in values], [str(value) for value in sorted(set(values))]
