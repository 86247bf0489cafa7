"""CIFAR-10 tasks: a small ResNet and a small ViT from scratch, and a pretrained EfficientNet.

The folder holds the data set's parquet files (image bytes and labels). 12,800 images are trained on, the next 2,000
decide the settings, and the first 2,000 test images are reported. Training images are cropped out of a border of four
black pixels and flipped at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.tasks.task import Batch, Task

TRAIN, HELD_OUT, CLASSES, SIDE, BORDER = 12_800, 2_000, 10, 32, 4
BATCH, FINE_TUNING_BATCH = 128, 64
Images = tuple[Tensor, Tensor]


@cache
def load(folder: Path, train: int) -> dict[str, Images]:
    """The images [N, 3, 32, 32] as bytes and labels [N] of each part: train (so many), tune, test.

    Raises:
        ValueError: the folder lacks the files.
    """
    from datasets import load_dataset

    found: dict[str, Images] = {}
    wanted = {"train": train + HELD_OUT, "test": HELD_OUT}
    for part, count in wanted.items():
        files = sorted(str(path) for path in folder.glob(f"{part}*.parquet"))
        if not files:
            raise ValueError(f"--data: {folder} has no {part}*.parquet")
        rows = load_dataset("parquet", data_files={part: files}, split=f"{part}[:{count}]")
        image, label = ("img" if "img" in rows.column_names else "image"), "label"
        rows = rows.cast_column(image, _image_feature()) if isinstance(rows[0][image], dict) else rows
        pixels = np.stack([np.asarray(row.convert("RGB")) for row in rows[image]])
        found[part] = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(rows[label])
    x, y = found["train"]
    return {"train": (x[:train], y[:train]), "tune": (x[train:], y[train:]), "test": found["test"]}


def _image_feature() -> Any:
    from datasets import Image

    return Image()


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [3, 32, 32] out of its own place in a black border, half of them mirrored."""
    corners = torch.randint(0, 2 * BORDER + 1, (2, len(x)), generator=generator).T
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    windows = nn.functional.pad(x, (BORDER,) * 4).unfold(2, SIDE, 1).unfold(3, SIDE, 1)
    x = windows[torch.arange(len(x)), :, corners[:, 0], corners[:, 1]]
    x[mirrored] = x[mirrored].flip(-1)
    return x


def shift(x: Tensor, corners: Tensor, pad: int) -> Tensor:
    """Windows of images with a black border, each at its own place.

    Args:
        x: [B, C, H, W].
        corners: [B, 2], row and column of each window in the bordered image, from 0 to 2·pad; `pad`: no shift.
        pad: width of the border.

    Returns:
        [B, C, H, W]
    """
    height, width = x.shape[-2:]
    bordered = nn.functional.pad(x, (pad,) * 4)
    windows = bordered.unfold(2, height, 1).unfold(3, width, 1)  # a view [B, C, 2·pad+1, 2·pad+1, H, W]
    return windows[torch.arange(len(x)), :, corners[:, 0], corners[:, 1]]


def pixels(x: Tensor, side: int) -> Tensor:
    """Bytes → about [-2, 2], enlarged to `side`."""
    x = (x.float() / 255 - 0.473) / 0.251
    return x if side == SIDE else nn.functional.interpolate(x, size=side, mode="bilinear", antialias=True)


def batches(data: Images, batch: int, side: int, seed: int) -> Iterator[Batch]:
    """Endless batches, each epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data
    while True:
        for chosen in torch.randperm(len(x), generator=generator).split(batch):
            yield {"pixel_values": pixels(augment(x[chosen], generator), side), "labels": y[chosen]}


@torch.no_grad()
def evaluate(data: dict[str, Images], side: int, count: int, model: nn.Module, tuning: bool) -> dict[str, float]:
    """Mean cross entropy and accuracy on the first `count` of the held-out images (tuning) or of the test images."""
    x, y = (part[:count] for part in data["tune" if tuning else "test"])
    was_training = model.training
    model.eval()
    logits = torch.cat([model(pixel_values=pixels(part, side)).logits for part in x.split(250)])
    model.train(was_training)
    return {
        "loss": float(nn.functional.cross_entropy(logits, y)),
        "accuracy": float((logits.argmax(-1) == y).float().mean()),
    }


def make_resnet(seed: int) -> nn.Module:
    """A ResNet of three stages, 0.7 million parameters, its weights decided by the seed alone."""
    torch.manual_seed(seed)
    shape = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**shape, num_labels=CLASSES))
    model.resnet.embedder.pooler = nn.Identity()  # the first convolution halves the image, which is small already
    return model


def make_resnet18(seed: int) -> nn.Module:
    """A ResNet-18 of half the width, 2.8 million parameters, its weights decided by the seed alone."""
    torch.manual_seed(seed)
    shape = {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**shape, num_labels=CLASSES))
    model.resnet.embedder.pooler = nn.Identity()
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on a CPU


def make_vit(seed: int) -> nn.Module:
    """A ViT of three layers on patches of 8 × 8, 0.6 million parameters, its weights decided by the seed alone."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512}
    return ViTForImageClassification(ViTConfig(**shape, image_size=SIDE, patch_size=8, num_labels=CLASSES))


def _pretrained(folder: Path, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=CLASSES, ignore_mismatched_sizes=True, local_files_only=True
    )
    for name, parameter in model.named_parameters():  # constant gates with zero gradient
        parameter.requires_grad_("squeeze_excite" not in name)
    return model


def _task(
    name: str,
    folder: Path,
    make_model: Callable[[int], nn.Module],
    side: int = SIDE,
    batch: int = BATCH,
    count: int = HELD_OUT,
    train: int | None = None,
) -> Task:
    data = load(folder, train or TRAIN)
    return Task(
        name=name,
        make_model=make_model,
        batches=partial(batches, data["train"], batch, side),
        evaluate=partial(evaluate, data, side, count),
    )


def resnet(folder: Path) -> Task:
    """A ResNet of three stages (0.7 million parameters) from scratch."""
    return _task("cifar10-resnet", folder, make_resnet)


def resnet18(folder: Path) -> Task:
    """A ResNet-18 of half the width (2.8 million parameters) from scratch, on 10,000 images."""
    return _task("cifar10-resnet18", folder, make_resnet18, train=10_000)


def vit(folder: Path) -> Task:
    """A ViT of three layers on patches of 8 × 8 (0.6 million parameters) from scratch."""
    return _task("cifar10-vit", folder, make_vit)


def fine_tuning(folder: Path, model: Path) -> Task:
    """A pretrained EfficientNet at 64 × 64 pixels, in batches of 64 images, judged on 1,000."""
    make_model = partial(_pretrained, model)
    return _task("cifar10-efficientnet", folder, make_model, side=64, batch=FINE_TUNING_BATCH, count=1_000)
