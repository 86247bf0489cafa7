"""The image processor, the classes and the model of an image-classification run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from .image_args import DataArguments, ModelArguments
from .script_model import LOAD_ERRORS, hub_options, make_model
from .usage import UsageError


def load_processor(args: ModelArguments, data: DataArguments, config: Any) -> Any:
    """The image processor, of `image_size` if that is given; without a name a plain one that scales to [−1, 1].

    Raises:
        UsageError: it cannot be loaded; nothing tells the size.
    """
    name = args.image_processor_name or args.model_name_or_path
    if name is None:
        return _plain_processor(data, config)
    field = "image_processor_name" if args.image_processor_name else "model_name_or_path"
    try:
        processor = AutoImageProcessor.from_pretrained(name, **hub_options(args))
    except LOAD_ERRORS as error:
        raise UsageError(field, f"got {name!r}, from which no image processor can be loaded: {error}") from error
    if data.image_size:
        square = {"height": data.image_size, "width": data.image_size}
        edge = {"shortest_edge": data.image_size}
        processor.size = edge if "shortest_edge" in dict(getattr(processor, "size", None) or {}) else square
        if getattr(processor, "crop_size", None) is not None:
            processor.crop_size = square
    return processor


def _plain_processor(data: DataArguments, config: Any) -> Any:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    size = data.image_size or getattr(config, "image_size", None)
    if size is None:
        raise UsageError("image_size", "got none, and the configuration has none, accepted: pixels, e.g. 32")
    height, width = (size, size) if isinstance(size, int) else size
    middle = [0.5] * config.num_channels
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=middle, image_std=middle)


def set_size(args: ModelArguments, data: DataArguments, config: Any) -> None:
    """A new model is made for `image_size`; one that is loaded keeps its own."""
    if data.image_size and not args.model_name_or_path and hasattr(config, "image_size"):
        config.image_size = data.image_size
    if getattr(config, "num_channels", None) not in (1, 3):
        got = getattr(config, "num_channels", None)
        raise UsageError("config_overrides", f"num_channels: got {got}, accepted: 3 (colours) or 1 (grey)")


def known_classes(config: Any) -> list[str] | None:
    """The classes that a trained model names; None if their names are transformers' stand-ins."""
    names = [config.id2label[number] for number in sorted(config.id2label)]
    return None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def set_classes(config: Any, classes: Sequence[str]) -> None:
    """Write the names of the classes into a configuration."""
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}


def load_model(args: ModelArguments, config: Any) -> Any:
    """The model, loaded or drawn anew.

    Raises:
        UsageError: names the argument.
    """
    options = {"ignore_mismatched_sizes": args.ignore_mismatched_sizes} if args.model_name_or_path else {}
    try:
        return make_model(AutoModelForImageClassification, args, config, "image-classification", **options)
    except UsageError as error:
        if "ignore_mismatched_sizes" not in str(error.__cause__) or args.ignore_mismatched_sizes:
            raise
        message = f"got false, but {args.model_name_or_path} has other sizes than {config.num_labels} classes ask for"
        raise UsageError("ignore_mismatched_sizes", f"{message}, accepted: true, to draw those weights anew") from error


def try_model(model: Any, pixels: Tensor, classes: int) -> None:
    """One image [1, C, H, W] through the model: whether size and channels fit shows before training.

    Raises:
        UsageError: they do not.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(pixel_values=pixels.to(model.device, model.dtype)).logits
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        shape = list(pixels.shape[1:])
        raise UsageError("image_size", f"got images {shape}, which the model does not take: {error}") from error
    finally:
        model.train(was_training)
    if logits.shape != (1, classes):
        raise UsageError("model_name_or_path", f"got logits {list(logits.shape)} for {classes} classes")


def data_name(data: DataArguments) -> str:
    """What the data are called in a card: the data set, or the folder that they lie in."""
    if data.dataset_name:
        return data.dataset_name
    source = data.source("train") or data.source("validation") or data.source("test")
    path = Path(source[1]).resolve() if source else Path()
    is_part = path.name in ("train", "validation", "valid", "test") or not path.is_dir()
    return path.parent.name if is_part else path.name
