"""Trains, evaluates and runs an image classifier: ResNet, ViT, Swin, ConvNeXt and their kin.

    python scripts/run_image_classification.py --config_name microsoft/resnet-50 --train_dir flowers --image_size 64 \
        --do_train --do_eval --optim lngd --optim_args preset=fast --learning_rate 1e-3 --output_dir out

The arguments are those of transformers' image-classification example (`--help` lists them); a single argument that
ends in .json is a file with them. Data are folders of images, one a class, or files, parquet or JSON lines.

Whatever is wrong with arguments or data ends the script before training, with status 2 and a last line
`error: <field>: …`; a push that the Hub does not take, after training, with status 1.
"""

from __future__ import annotations

import csv
import glob
import io
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import run_shared  # the file beside this one
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image, ImageOps  # pip install 'hf_lngd[vision]'
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback, set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging

from hf_lngd import LNGDTrainer, LNGDTrainingArguments
from hf_lngd.integrations.usage import UsageError, UsageParser, blame, exit_on_usage_error, one_line, option, refuse_if
from hf_lngd.metrics import load_metric

logger = logging.get_logger(__name__)

FILE_ENDINGS = (".parquet", ".json", ".jsonl", ".json.gz", ".jsonl.gz")
IN_MEMORY = 2**30  # bytes; more pixels lie in a file that is mapped into memory
MODES = {1: "L", 3: "RGB"}  # of images, by the model's channels

USAGE = """
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained({name})
model = AutoModelForImageClassification.from_pretrained({name})
inputs = processor(Image.open("image.png").convert("{mode}"), return_tensors="pt")
number = model(**inputs).logits.argmax(-1).item()
print(model.config.id2label[number])
"""


# ---- Arguments ----
@dataclass
class ModelArguments:
    """Which model, configuration and image processor."""

    model_name_or_path: str | None = option(None, "Model to fine-tune: a folder or a name on the Hub.")
    config_name: str | None = option(None, "To train from scratch: a folder, file, type (resnet) or name on the Hub.")
    config_overrides: str | None = option(None, "Changes to the configuration, e.g. 'layer_type=basic,depths=[1,1,1]'.")
    image_processor_name: str | None = option(None, "Image processor; a new model without one scales to [-1, 1].")
    ignore_mismatched_sizes: bool = option(False, "Draw weights anew that do not fit, for other classes.")
    cache_dir: str | None = option(None, "Where downloads are kept.")
    model_revision: str = option("main", "Branch, tag or commit of the model on the Hub.")
    token: str | None = option(None, "Token for private models; by default the one that `hf auth login` stored.")
    trust_remote_code: bool = option(False, "Run code that comes with a model or data set. Only if you trust it.")
    overwrite_output_dir: bool = option(False, "Replace the model, checkpoints and results that --output_dir has.")


@dataclass
class DataArguments:
    """Which images, and what is done with them."""

    dataset_name: str | None = option(None, "Data set: a folder or a name on the Hub.")
    dataset_config_name: str | None = option(None, "Configuration of the data set.")
    train_dir: str | None = option(None, "Folder with one folder of images a class.")
    validation_dir: str | None = option(None, "The same, for --do_eval.")
    test_dir: str | None = option(None, "The same, for --do_predict; or a folder of images without classes.")
    train_file: str | None = option(None, "Parquet or JSON lines: {bytes, path}, bytes, path or pixels; a label.")
    validation_file: str | None = option(None, "The same, for --do_eval.")
    test_file: str | None = option(None, "The same, for --do_predict; labels may be missing.")
    image_column_name: str = option("image", "Column of the images.")
    label_column_name: str = option("label", "Column of the labels: class numbers, names, or a ClassLabel.")
    train_val_split: float = option(0.15, "Share of each class to validate on, where no validation data are given.")
    max_train_samples: int | None = option(None, "Train on at most so many images, chosen by the seed.")
    max_eval_samples: int | None = option(None, "Validate on at most so many images, chosen by the seed.")
    max_predict_samples: int | None = option(None, "Predict at most so many images, chosen by the seed.")
    image_size: int | None = option(None, "Height and width; none: the image processor's, else the configuration's.")
    augment: str = option("crop_flip", "Training images: none, crop (shifted by up to an eighth), flip, crop_flip.")
    skip_corrupt_images: bool = option(False, "Leave out images that cannot be read, and name them.")
    data_license: str | None = option(None, "Licence of the model for its card, as the Hub names it, e.g. cc-by-2.0.")
    data_attribution: str | None = option(None, "Who made the data; none: ATTRIBUTION.md beside those of training.")

    def __post_init__(self) -> None:
        run_shared.check_data(self, FILE_ENDINGS, "images")
        self.sources: dict[str, tuple[str, str]] = {}  # (argument, value) of each part that is given
        name, share = self.dataset_name, self.train_val_split
        is_known = self.augment in ("none", "crop", "flip", "crop_flip")
        refuse_if(not is_known, "augment", f"got {self.augment!r}, accepted: none, crop, flip, crop_flip")
        refuse_if(not 0 < share < 1, "train_val_split", f"got {share}, accepted: a fraction in (0, 1)")
        for part in run_shared.LIMITS:
            folder, file = getattr(self, f"{part}_dir"), getattr(self, f"{part}_file")
            one = "accepted: one of the two"
            refuse_if(folder and file, f"{part}_dir", f"got {folder!r} and --{part}_file, {one}")
            refuse_if(name and (folder or file), "dataset_name", f"got {name!r} and files or folders, {one}")
            what = f"got {folder!r}, accepted: a folder with one folder of images a class"
            refuse_if(folder and not Path(folder).is_dir(), f"{part}_dir", what)
            if folder or file:
                self.sources[part] = (f"{part}_dir", folder) if folder else (f"{part}_file", file)


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, LNGDTrainingArguments]:
    """Parse and check all arguments. UsageError: names the argument, the value and what is accepted."""
    kinds = [ModelArguments, DataArguments, LNGDTrainingArguments]
    model, data, args = UsageParser(kinds, prog="run_image_classification.py").parse(argv)
    run_shared.check_training(model, args)
    for part in run_shared.wanted_parts(args):
        given = data.dataset_name or part in data.sources or (part == "validation" and "train" in data.sources)
        refuse_if(not given, f"{part}_dir", f"got none, accepted: a folder, --{part}_file, or --dataset_name")
    order = args.train_sampling_strategy
    what = f"got {order!r}, accepted: random, sequential: images have no length"
    refuse_if("length" in str(order), "train_sampling_strategy", what)
    return model, data, args


# ---- Data: rows are read and checked before anything is decoded ----
@dataclass(frozen=True)
class Rows:
    """Images that are not decoded yet."""

    argument: str  # that named them, for messages
    origin: str  # a file, a folder or a data set
    base: Path  # what paths are relative to
    table: Any  # columns: `image`, as `read_image` takes it, `row`, from 1, and perhaps `label`, the class's name
    classes: list[str]  # as the data set has them, else by number, else by name

    @property
    def labels(self) -> list[str] | None:
        """The class of each; None: there are no labels."""
        return list(self.table["label"]) if "label" in self.table.column_names else None

    def where(self, row: dict[str, Any]) -> str:
        """The image's file, or the number of its row."""
        image = row["image"]
        path = image if isinstance(image, str) else image.get("path") if isinstance(image, dict) else None
        return str(path) if path else f"{self.origin}, row {row['row']}"

    def sample(self, count: int | None, seed: int) -> Rows:
        """At most `count` rows, drawn by the seed, in their order: files are often sorted by class."""
        numbers = np.random.default_rng(seed).permutation(len(self.table))[:count]
        return self if len(numbers) == len(self.table) else replace(self, table=self.table.select(np.sort(numbers)))


def load_rows(data: DataArguments, model: ModelArguments, parts: list[str], seed: int) -> dict[str, Rows]:
    """The parts that are needed, checked; validation from training where there is none."""
    loaded = run_shared.load_dataset(data, model) if data.dataset_name else {}
    rows: dict[str, Rows] = {}
    shared = "validation" in parts and not ("validation" in loaded or "validation" in data.sources)
    if shared and (data.dataset_name or "train" in data.sources):
        rows["train"], rows["validation"] = split(load_part("train", data, model, loaded), data.train_val_split, seed)
    return {part: rows[part] if part in rows else load_part(part, data, model, loaded) for part in parts}


def split(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Training and validation: a share of each class alike."""
    numbers = datasets.Dataset.from_dict({"index": range(len(rows.table)), "label": rows.labels})
    with blame("train_val_split", f"got {share} for {len(rows.table)} images of {rows.origin}"):
        stratified = {"stratify_by_column": "label", "seed": seed}
        parts = numbers.class_encode_column("label").train_test_split(share, **stratified)
    train, validation = (rows.table.select(np.sort(parts[name]["index"])) for name in ("train", "test"))
    return replace(rows, table=train), replace(rows, table=validation)


def load_part(part: str, data: DataArguments, model: ModelArguments, loaded: Any) -> Rows:
    """A part of the data: of a data set that is loaded, from a folder, or from a file."""
    if data.dataset_name:
        found = f"{data.dataset_name} has no part {part}, found: {', '.join(loaded)}"
        refuse_if(part not in loaded, "dataset_name", found)
        rows = Rows("dataset_name", f"{data.dataset_name}, {part}", Path(), loaded[part], [])
        return choose_columns(rows, data, part)
    argument, path = data.sources[part]
    options: dict[str, Any] = {"split": part, "cache_dir": model.cache_dir}
    if argument.endswith("_dir"):
        folders = sorted(p for p in Path(path).iterdir() if p.is_dir() and not p.name.startswith("."))
        what = f"got {path!r}, which has no folders, accepted: one folder of images a class"
        refuse_if(not folders and part != "test", argument, what)
        for folder in folders or [Path(path)]:
            has_images = any(file.suffix.lower() in ImageFolder.EXTENSIONS for file in folder.rglob("*"))
            refuse_if(not has_images, argument, f"{folder} has no images, accepted: files that end in .png, .jpg, …")
        base, kind = Path(path), "imagefolder"
        # Given as a pattern: names like test_1.png would otherwise make parts.
        options |= {"data_files": {part: f"{glob.escape(str(Path(path).absolute()))}/**"}, "drop_labels": not folders}
        data = replace(data, image_column_name="image", label_column_name="label")
    else:
        empty = not Path(path).stat().st_size
        refuse_if(empty, argument, f"got {path!r}, which is empty, accepted: at least one image")
        base, kind = Path(path).parent, "parquet" if path.endswith(".parquet") else "json"
        options |= {"data_files": {part: glob.escape(path)}}
    try:
        table = datasets.load_dataset(kind, **options)
    except Exception as error:  # whatever a builder raises: the path is what the user gave
        what = f"{path}: cannot be read as {kind}: {error.__cause__ or error}"
        if "corresponds to no data" in str(error):
            what = f"{path} is empty, accepted: at least one image"
        raise UsageError(argument, what) from error
    return choose_columns(Rows(argument, path, base, table, []), data, part)


def choose_columns(rows: Rows, data: DataArguments, part: str) -> Rows:
    """The columns of images and labels, checked; test data may lack labels, or hold them back as −1."""
    table, origin, image, label = rows.table, rows.origin, data.image_column_name, data.label_column_name
    refuse_if(not len(table), rows.argument, f"{origin} is empty, accepted: at least one image")
    is_labelled = part != "test" or label in table.column_names
    for name in ("image_column_name", "label_column_name") if is_labelled else ("image_column_name",):
        column = getattr(data, name)
        found = ", ".join(table.column_names)
        refuse_if(column not in table.column_names, name, f"got {column!r}, {origin} has: {found}")
    images = table.select_columns([image]).rename_columns({image: "image"} if image != "image" else {})
    if isinstance(images.features["image"], datasets.Image):
        images = images.cast_column("image", datasets.Image(decode=False))
    rows = replace(rows, table=images.add_column("row", list(range(1, len(images) + 1))))
    values = list(table[label]) if is_labelled else []
    if part == "test" and all(value in (None, -1) for value in values):
        return rows
    feature = table.features[label]
    is_class, kind = isinstance(feature, datasets.ClassLabel), str(getattr(feature, "dtype", type(feature).__name__))
    accepted = is_class or kind in ("string", "large_string", "bool") or "int" in kind
    refuse_if(not accepted, "label_column_name", f"got {label!r}, which has {kind}, accepted: class numbers or names")
    for index, value in enumerate(values):
        if value is None or value == "" or (is_class and value < 0):
            raise UsageError(rows.argument, f"{rows.where(rows.table[index])}: no label in column {label!r}")
    labels = [feature.names[value] if is_class else str(value) for value in values]
    one = part == "train" and len(set(labels)) < 2
    refuse_if(one, rows.argument, f"{origin} has one class, {labels[0]!r}, accepted: at least two")
    classes = feature.names if is_class else [str(value) for value in sorted(set(values))]
    return replace(rows, table=rows.table.add_column("label", labels), classes=classes)


def choose_classes(rows: dict[str, Rows], config: Any) -> list[str]:
    """The classes of the training data, else of the model, else of what is evaluated; labels are checked for them."""
    classes, source = [config.id2label[number] for number in sorted(config.id2label)], "the model"
    part = next((part for part in rows.values() if part.classes), None)
    if "train" in rows:
        classes, source = rows["train"].classes, "the training data"
    elif all(name == f"LABEL_{number}" for number, name in enumerate(classes)):  # transformers' stand-ins
        classes = [str(number) for number in range(config.num_labels)]
        if part is not None:
            classes, source = part.classes, part.origin
            found = f"{source} has {len(classes)} classes, the model {config.num_labels} without names"
            refuse_if(len(classes) != config.num_labels, part.argument, f"{found}, accepted: data with all of them")
    numbers = set(classes)
    for part in rows.values():
        for index, label in enumerate(part.labels or []):
            if label not in numbers:
                known = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
                label = f"{part.where(part.table[index])}: label {label!r}"
                raise UsageError(part.argument, f"{label} is not in {source}: {known}")
    return classes


# ---- Images: decoded once into bytes, by Pillow and the model's image processor ----
def decode(rows: Rows, processor: Any, channels: int, skip_corrupt: bool) -> tuple[Any, list[int]]:
    """All images as bytes [N, C, H, W] of one size, and which rows they are [N]; what was converted is counted."""
    pixels: Any = None
    kept, corrupt, modes = list[int](), list[str](), Counter[str]()
    # A bar for what takes longer; closed before anything is raised, so that the error has a line of its own.
    with logging.tqdm(rows.table, desc=f"Images of {rows.origin}", delay=2) as bar:
        for index, row in enumerate(bar):
            try:
                image, mode = in_mode(read_image(row["image"], rows.base), channels)
            except Exception as error:  # Pillow's decoders raise whatever their format leads them to
                corrupt.append(rows.where(row))
                if skip_corrupt:
                    continue
                what = f"{corrupt[0]}: cannot be read as an image ({one_line(error, 200)}); --skip_corrupt_images"
                raise UsageError(rows.argument, f"{what} true leaves such images out") from error
            modes.update([mode] if mode else [])
            made = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
            if pixels is None:
                shape = (len(rows.table), *made.shape)
                is_large = np.prod(shape) > IN_MEMORY
                with tempfile.TemporaryFile() as file:  # without a name: it is gone with the array
                    pixels = np.memmap(file, np.uint8, "w+", shape=shape) if is_large else np.empty(shape, np.uint8)
            got, first = list(made.shape), list(pixels.shape[1:])
            unlike = f"{rows.where(row)}: got {got} after the image processor, the first has {first}"
            refuse_if(got != first, "image_size", f"{unlike}, accepted: one size for all")
            pixels[len(kept)] = np.clip(np.rint(made), 0, 255)
            kept.append(index)
    if corrupt:
        named = ", ".join(corrupt[:5]) + (", …" if len(corrupt) > 5 else "")
        share = f"{len(corrupt)} of {len(rows.table)}"
        logger.warning(f"{rows.origin}: {share} images cannot be read and are left out: {named}")
    if modes:
        counts = ", ".join(f"{count} of {mode}" for mode, count in sorted(modes.items()))
        logger.warning(f"{rows.origin}: {sum(modes.values())} images are converted to {MODES[channels]}: {counts}")
    refuse_if(not kept, rows.argument, f"{rows.origin}: none of {len(rows.table)} images can be read")
    return pixels[: len(kept)], kept


def read_image(value: Any, base: Path) -> Image.Image:
    """An image from ``{bytes, path}``, bytes, a path (relative ones from `base`), or pixels [H, W] or [H, W, C]."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (str, bytes)):
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else base / value) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    pixels = np.asarray(value)
    if pixels.dtype == object or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ValueError(f"got pixels {list(pixels.shape)}, accepted: [H, W] or [H, W, C] with C of 1, 3, 4")
    if not pixels.size or not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError("got pixels outside [0, 255], accepted: whole numbers in [0, 255] or fractions in [0, 1]")
    pixels = pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels
    if pixels.dtype.kind == "f" and pixels.max() <= 1:
        pixels = pixels * 255
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def in_mode(image: Image.Image, channels: int) -> tuple[Image.Image, str | None]:
    """The image with the model's channels, and its mode if that was another; 16 bits become 8."""
    mode, wanted = image.mode, MODES[channels]
    if mode == wanted:
        return image, None
    if mode.startswith("I"):  # Pillow would cut at 255
        wide = np.asarray(image).astype(np.int64)
        is_wide = mode != "I" or wide.max(initial=0) > 255
        image = Image.fromarray(np.clip(wide >> 8 if is_wide else wide, 0, 255).astype(np.uint8))
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # which Pillow asks for
    return image.convert(wanted), mode


# ---- Batches: shifted and mirrored as bytes, then normalised ----
class ImageSet(torch.utils.data.Dataset[dict[str, torch.Tensor]], TrainerCallback):
    """Images [N, C, H, W] as bytes with labels [N] or None; augmented if asked to.

    How an image is shifted and mirrored depends on seed, epoch and the image's number alone. Not on torch's random
    state, which reading ahead changes: so a resumed run sees the same pixels, with any number of workers. As a callback
    of the Trainer it is told which epoch begins: accelerate's ``set_epoch`` is not called where batches are skipped.
    """

    def __init__(self, pixels: Any, labels: Any = None, augment: str = "none", seed: int = 0) -> None:
        self.pixels, self.augment, self.seed = pixels, augment, seed
        self.labels = None if labels is None else torch.as_tensor(labels)
        self.pad = max(1, round(max(pixels.shape[-2:]) / 8))  # 4 at 32 × 32
        # Shared with the processes of a data loader, which may outlive an epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.begin_epoch(0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer; `state.epoch` has a fraction where a run is resumed within an epoch."""
        self.begin_epoch(int(state.epoch or 0))

    def begin_epoch(self, epoch: int) -> None:
        """Shifts and mirrorings of this epoch from here on."""
        self._epoch.fill_(epoch)
        self._drawn, count = epoch, len(self)
        draw = np.random.default_rng([self.seed, epoch])
        shifts = draw.integers(0, 2 * self.pad + 1, (count, 2), dtype=np.int16)
        self.shifts = shifts if "crop" in self.augment else np.full_like(shifts, self.pad)
        self.mirrored = draw.integers(0, 2, count, dtype=np.int8).astype(bool) & ("flip" in self.augment)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A whole batch, which torch's data loader asks for where it can: bytes [B, C, H, W], labels [B]."""
        chosen = np.asarray(indices)
        pixels = torch.from_numpy(self.pixels[chosen])
        if self.augment != "none":
            if self._drawn != int(self._epoch):
                self.begin_epoch(int(self._epoch))
            bordered = torch.nn.functional.pad(pixels, (self.pad,) * 4)
            # [B, C, places, places, H, W]
            windows = bordered.unfold(2, pixels.shape[2], 1).unfold(3, pixels.shape[3], 1)
            rows, columns = torch.from_numpy(self.shifts[chosen]).long().unbind(1)
            pixels = windows[torch.arange(len(pixels)), :, rows, columns]
            mirrored = torch.from_numpy(self.mirrored[chosen])
            pixels[mirrored] = pixels[mirrored].flip(-1)
        labels = {} if self.labels is None else {"labels": self.labels[torch.from_numpy(chosen)]}
        return {"pixel_values": pixels, **labels}


class Normalise:
    """The collator: bytes to what the model expects, ``scale · bytes + offset`` for each channel.

    Both are read off what the image processor makes of black and white, so that training and use agree.
    """

    def __init__(self, processor: Any, shape: list[int]) -> None:
        channels, height, width = shape
        side = max(height, width) * 2  # larger than any crop
        ends = [np.full((side, side, channels), value, np.uint8) for value in (0, 255)]
        made = processor(ends, return_tensors="pt", input_data_format="channels_last")["pixel_values"].float()
        black, white = made[:, :, made.shape[2] // 2, made.shape[3] // 2, None, None]
        self.scale, self.offset = (white - black) / 255, black

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`pixel_values` [B, C, H, W] as floats; the rest as it is."""
        return {**batch, "pixel_values": batch["pixel_values"].float().mul_(self.scale).add_(self.offset)}


# ---- Model ----
def load_processor(args: ModelArguments, data: DataArguments, config: Any) -> Any:
    """The image processor, of `image_size` if that is given; without a name a plain one that scales to [−1, 1]."""
    name, size = args.image_processor_name or args.model_name_or_path, data.image_size
    if name is None:
        size = size or getattr(config, "image_size", None)
        what = "got none, and the configuration has none, accepted: pixels, e.g. 32"
        refuse_if(size is None, "image_size", what)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        middle = [0.5] * config.num_channels
        return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=middle, image_std=middle)
    field = "image_processor_name" if args.image_processor_name else "model_name_or_path"
    with blame(field, f"got {name!r}, from which no image processor can be loaded"):
        processor = AutoImageProcessor.from_pretrained(name, **run_shared.hub_options(args))
    if size:
        square = {"height": size, "width": size}
        by_edge = "shortest_edge" in dict(getattr(processor, "size", None) or {})
        processor.size = {"shortest_edge": size} if by_edge else square
        if getattr(processor, "crop_size", None) is not None:
            processor.crop_size = square
    return processor


def load_model(args: ModelArguments, config: Any) -> Any:
    """The model, loaded or drawn anew. UsageError: names the argument."""
    options = {"ignore_mismatched_sizes": args.ignore_mismatched_sizes} if args.model_name_or_path else {}
    try:
        return run_shared.make_model(AutoModelForImageClassification, args, config, "image-classification", **options)
    except UsageError as error:
        if "ignore_mismatched_sizes" not in str(error.__cause__) or args.ignore_mismatched_sizes:
            raise
        what = f"got false, but {args.model_name_or_path} has other sizes than {config.num_labels} classes ask for"
        raise UsageError("ignore_mismatched_sizes", f"{what}, accepted: true, to draw those weights anew") from error


# ---- Scores, predictions, pictures, card ----
class ImageScores:
    """``compute_metrics``: accuracy, and top-5 accuracy of six classes or more; keeps logits [N, K] and labels [N]."""

    def __init__(self) -> None:
        self._metric = load_metric("accuracy")

    def __call__(self, prediction: Any) -> dict[str, float]:
        """`prediction`: logits [N, K] and labels [N]."""
        self.logits, self.labels = prediction.predictions, prediction.label_ids
        ranked = np.argsort(-self.logits, axis=1, kind="stable")[:, : 5 if self.logits.shape[1] > 5 else 1]
        result = self._metric.compute(predictions=ranked, references=self.labels)
        return {name: round(value, 6) for name, value in result.items()}


def write_predictions(folder: Path, rows: Rows, logits: Any, labels: Any, classes: list[str]) -> None:
    """``predictions.csv``: image, predicted class, its probability and, where there are labels, the true one."""
    best, shares = logits.argmax(1), torch.from_numpy(logits).softmax(1).numpy()
    with open(folder / "predictions.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "predicted", "probability", *([] if labels is None else ["label"])])
        for index, (row, number) in enumerate(zip(rows.table, best, strict=True)):
            true = [] if labels is None else [classes[labels[index]]]
            writer.writerow([rows.where(row), classes[number], f"{shares[index, number]:.6f}", *true])


def confusion(labels: Any, predicted: Any, classes: int) -> Any:
    """How often class i was taken for class j [K, K]."""
    return np.bincount(np.asarray(labels) * classes + predicted, minlength=classes**2).reshape(classes, classes)


def draw_confusion(path: Path, labels: Any, predicted: Any, classes: list[str]) -> None:
    """The share of each true class (row) that was taken for each class (column); names and counts of few classes."""
    plt, count, counts = run_shared.pyplot(), len(classes), confusion(labels, predicted, len(classes))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(8, 7) if count > 10 else (5.5, 4.5), layout="constrained")
    norm = plt.matplotlib.colors.PowerNorm(0.5, vmin=0, vmax=1)  # keeps 1 % visible beside 90 %
    figure.colorbar(axis.imshow(shares, norm=norm), ax=axis, shrink=0.8, label="share of the true class")
    names = [f"{name:.16}" for name in classes] if count <= 30 else []
    axis.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names), default=0) > 2 else 0)
    axis.set_yticks(range(len(names)), names)
    for i, j in np.argwhere(counts) if count <= 15 else []:
        axis.text(j, i, str(counts[i, j]), ha="center", va="center", color="black" if shares[i, j] > 0.4 else "white")
    right = np.trace(counts) / max(1, counts.sum())
    axis.set(xlabel="predicted", ylabel="true", title=f"{counts.sum():,} images, {right:.1%} right")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def worst(shares: Any, labels: Any) -> Any:
    """Numbers of the images that are classified wrongly, those with the highest loss first, at most 16."""
    wanted = np.asarray(labels)
    wrong = np.flatnonzero(shares.argmax(1) != wanted)
    return wrong[np.argsort(shares[wrong, wanted[wrong]], kind="stable")][:16]


def draw_mistakes(path: Path, pixels: Any, shares: Any, labels: Any, classes: list[str]) -> bool:
    """The worst mistakes, with the predicted and the true class's probability; False, and no file, without any."""
    plt, chosen = run_shared.pyplot(), worst(shares, labels)
    path.unlink(missing_ok=True)
    if not len(chosen):
        return False
    columns, lines = min(4, len(chosen)), -(-len(chosen) // 4)
    figure = plt.figure(figsize=(2.3 * columns, 2.6 * lines), layout="constrained")
    for place, index in enumerate(chosen, start=1):
        axis = figure.add_subplot(lines, columns, place)
        axis.set_axis_off()
        axis.imshow(pixels[index].transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
        numbers = {"predicted": int(shares[index].argmax()), "true": int(labels[index])}
        told = (f"{what}: {classes[n]:.16}, {shares[index, n]:.1%}" for what, n in numbers.items())
        axis.set_title("\n".join(told), fontsize=9)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return True


def make_card(trainer: LNGDTrainer, model: ModelArguments, data: DataArguments) -> run_shared.CardWriter:
    """What writes the model's card: data set, a code example."""
    given = [Path(path) for _, path in data.sources.values()]
    path = given[0].resolve() if given else Path()
    is_part = path.name in ("train", "validation", "valid", "test") or not path.is_dir()
    name = data.dataset_name or (path.parent.name if is_part else path.name)
    train = given[0] if "train" in data.sources else None
    facts: dict[str, Any] = {"task": "image-classification", "dataset_name": name, "dataset_type": name}
    facts |= {"attribution": run_shared.read_attribution(data.data_attribution, train), "libraries": ("pillow",)}
    facts["usage"] = USAGE.format(name=run_shared.model_name(trainer), mode=MODES[trainer.model.config.num_channels])
    metrics = {"accuracy": ("accuracy", "Accuracy"), "top5_accuracy": ("accuracy", "Top-5 accuracy")}
    return run_shared.CardWriter(trainer, model, data, metrics, **facts)


# ---- The run ----
def prepare(model_args: ModelArguments, data_args: DataArguments, args: Any) -> tuple[Any, ...]:
    """The trainer, the decoded parts of the data, their rows, the classes, what scores. Finds all that is wrong."""
    config = run_shared.load_config(model_args, AutoModelForImageClassification, "image classification")
    if data_args.image_size and not model_args.model_name_or_path and hasattr(config, "image_size"):
        config.image_size = data_args.image_size  # a model that is loaded keeps its own
    channels: Any = getattr(config, "num_channels", None)
    refuse_if(channels not in MODES, "config_overrides", f"num_channels: got {channels}, accepted: 3 (RGB) or 1 (grey)")
    rows = load_rows(data_args, model_args, run_shared.wanted_parts(args), args.seed)
    classes = choose_classes(rows, config)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    processor = load_processor(model_args, data_args, config)
    set_seed(args.seed)
    model = load_model(model_args, config)
    sets = {}
    for part, loaded in rows.items():
        loaded = loaded.sample(getattr(data_args, run_shared.LIMITS[part]), args.seed)
        pixels, kept = decode(loaded, processor, channels, data_args.skip_corrupt_images)
        rows[part] = replace(loaded, table=loaded.table.select(kept))
        labels = rows[part].labels and [config.label2id[name] for name in rows[part].labels or ()]
        sets[part] = ImageSet(pixels, labels, data_args.augment if part == "train" else "none", args.seed)
    first = next(iter(sets.values()))
    collator = Normalise(processor, first.pixels.shape[1:])
    image = collator(first.__getitems__([0]))["pixel_values"].to(model.device, model.dtype)
    with blame("image_size", f"got images {list(image.shape[1:])}, which the model does not take"), torch.no_grad():
        logits = model.eval()(pixel_values=image).logits
    got = f"got logits {list(logits.shape)} for {len(classes)} classes"
    refuse_if(logits.shape != (1, len(classes)), "model_name_or_path", got)
    args.remove_unused_columns = False  # batches come whole
    scores = ImageScores()
    options = {"model": model, "processing_class": processor, "data_collator": collator, "compute_metrics": scores}
    options |= {"train_dataset": sets.get("train"), "eval_dataset": sets.get("validation")}
    options |= {"callbacks": [sets["train"]] if args.do_train else None}
    options["preprocess_logits_for_metrics"] = lambda out, _: (out[0] if isinstance(out, tuple) else out).float()
    trainer = run_shared.make_trainer(LNGDTrainer, args, **options)
    return trainer, sets, rows, classes, scores


def main() -> None:
    """Everything that can be wrong is found by `prepare`; what follows trains."""
    model_args, data_args, args = parse(sys.argv[1:])
    trainer, sets, rows, classes, scores = prepare(model_args, data_args, args)
    card, folder = make_card(trainer, model_args, data_args), Path(args.output_dir)
    if args.do_train:
        run_shared.train(trainer)
    if args.do_eval:
        card.add("eval", "validation", trainer.evaluate())
        if trainer.is_world_process_zero() and not args.do_predict:
            write_predictions(folder, rows["validation"], scores.logits, scores.labels, classes)
        if trainer.is_world_process_zero() and run_shared.pyplot() is not None:
            draw_confusion(folder / "confusion_matrix.png", scores.labels, scores.logits.argmax(1), classes)
            card.pictures.append(("Which classes are taken for which", "confusion_matrix.png"))
            shares = torch.from_numpy(scores.logits).softmax(1).numpy()
            if draw_mistakes(folder / "worst_mistakes.png", sets["validation"].pixels, shares, scores.labels, classes):
                card.pictures.append(("The worst mistakes", "worst_mistakes.png"))
    if args.do_predict:
        result = trainer.predict(sets["test"], metric_key_prefix="predict")
        card.add("predict", "test", result.metrics)
        if trainer.is_world_process_zero():
            write_predictions(folder, rows["test"], result.predictions, result.label_ids, classes)
    card.finish()


if __name__ == "__main__":
    exit_on_usage_error(main)
