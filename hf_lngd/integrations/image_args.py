"""The arguments of `scripts/run_image_classification.py`: those of transformers' own example, and a few more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .script_args import check_counts, check_file, check_model, check_training, find_checkpoint, option
from .training_args import LNGDTrainingArguments
from .usage import UsageError, UsageParser

FILE_ENDINGS = (".parquet", ".json", ".jsonl", ".json.gz", ".jsonl.gz")
AUGMENTATIONS = ("none", "crop", "flip", "crop_flip")


@dataclass
class ModelArguments:
    """Which model, configuration and image processor."""

    model_name_or_path: str | None = option(None, "Model to fine-tune: a folder or a name on the Hub.")
    config_name: str | None = option(
        None, "Configuration, a folder, a file or a name on the Hub; without --model_name_or_path: train from scratch."
    )
    config_overrides: str | None = option(
        None, "Changes to the configuration, e.g. 'layer_type=basic,depths=[1,1,1],hidden_sizes=[16,32,64]'."
    )
    image_processor_name: str | None = option(
        None, "Image processor, if another than the model's; a new model without one scales to [-1, 1]."
    )
    ignore_mismatched_sizes: bool = option(
        False, "Draw weights anew that do not fit: the last layer, where the number of classes is another."
    )
    cache_dir: str | None = option(None, "Where downloads are kept.")
    model_revision: str = option("main", "Branch, tag or commit of the model on the Hub.")
    token: str | None = option(None, "Token for private models; by default the one that `hf auth login` stored.")
    trust_remote_code: bool = option(False, "Run code that comes with a model or data set. Only if you trust it.")


@dataclass
class DataArguments:
    """Which images, and what is done with them."""

    dataset_name: str | None = option(None, "Data set: a folder or a name on the Hub.")
    dataset_config_name: str | None = option(None, "Configuration of the data set.")
    train_dir: str | None = option(None, "Folder with one folder of images a class.")
    validation_dir: str | None = option(None, "The same, for --do_eval.")
    test_dir: str | None = option(None, "The same, for --do_predict; or a folder of images without classes.")
    train_file: str | None = option(
        None, "Parquet or JSON lines: an image {bytes, path}, bytes, a path from the file, or rows of pixels; a label."
    )
    validation_file: str | None = option(None, "The same, for --do_eval.")
    test_file: str | None = option(None, "The same, for --do_predict; labels may be missing.")
    image_column_name: str = option("image", "Column of the images.")
    label_column_name: str = option("label", "Column of the labels: class numbers, names, or a ClassLabel.")
    train_val_split: float = option(
        0.15, "Share of the training images to validate on, of each class alike, where no validation data are given."
    )
    max_train_samples: int | None = option(None, "Train on at most so many images, chosen by the seed.")
    max_eval_samples: int | None = option(None, "Validate on at most so many images, chosen by the seed.")
    max_predict_samples: int | None = option(None, "Predict at most so many images, chosen by the seed.")
    image_size: int | None = option(None, "Height and width; none: the image processor's, else the configuration's.")
    augment: str = option(
        "crop_flip", "Training images: none, crop (shifted by up to an eighth), flip (left to right), crop_flip."
    )
    skip_corrupt_images: bool = option(False, "Leave out images that cannot be read, and name them.")
    data_license: str | None = option(None, "Licence of the model for its card, as the Hub names it, e.g. cc-by-2.0.")
    data_attribution: str | None = option(
        None, "Who the data come from, for the card; none: the file ATTRIBUTION.md beside the training data, if any."
    )

    def __post_init__(self) -> None:
        check_counts(self)
        if self.augment not in AUGMENTATIONS:
            raise UsageError("augment", f"got {self.augment!r}, accepted: {', '.join(AUGMENTATIONS)}")
        if not 0 < self.train_val_split < 1:
            raise UsageError("train_val_split", f"got {self.train_val_split}, accepted: a fraction in (0, 1)")
        if self.dataset_config_name and not self.dataset_name:
            raise UsageError("dataset_config_name", f"got {self.dataset_config_name!r} without --dataset_name")
        for part in ("train", "validation", "test"):
            self._check_source(part)

    def _check_source(self, part: str) -> None:
        folder, file = getattr(self, f"{part}_dir"), getattr(self, f"{part}_file")
        if folder and file:
            raise UsageError(f"{part}_dir", f"got {folder!r} and --{part}_file, accepted: one of the two")
        if self.dataset_name and (folder or file):
            raise UsageError(
                "dataset_name", f"got {self.dataset_name!r} and files or folders, accepted: one of the two"
            )
        if folder and not Path(folder).is_dir():
            raise UsageError(f"{part}_dir", f"got {folder!r}, accepted: a folder with one folder of images a class")
        check_file(f"{part}_file", file, FILE_ENDINGS, "images")

    def source(self, part: str) -> tuple[str, str] | None:
        """(argument, value) of where a part of the data comes from; None: nowhere, or --dataset_name."""
        for name in (f"{part}_dir", f"{part}_file"):
            if getattr(self, name):
                return name, str(getattr(self, name))
        return None


def make_parser() -> UsageParser:
    """The script's parser: model, data, training."""
    return UsageParser([ModelArguments, DataArguments, LNGDTrainingArguments], prog="run_image_classification.py")


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, LNGDTrainingArguments]:
    """Parse and check all arguments; `resume_from_checkpoint` becomes a folder.

    Raises:
        UsageError: names the argument, the value and what is accepted.
    """
    model, data, training = make_parser().parse(argv)
    check_model(model)
    check_training(training)
    wanted = {"train": training.do_train, "test": training.do_predict}
    wanted["validation"] = training.do_eval and not data.source("train")
    for part, needed in wanted.items():
        if needed and not data.dataset_name and not data.source(part):
            raise UsageError(f"{part}_dir", f"got none, accepted: a folder, --{part}_file, or --dataset_name")
    if "length" in str(training.train_sampling_strategy):
        got = training.train_sampling_strategy
        raise UsageError("train_sampling_strategy", f"got {got!r}, accepted: random, sequential: images have no length")
    training.resume_from_checkpoint = find_checkpoint(training)
    return model, data, training
