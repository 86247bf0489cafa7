"""Tiny images for the tests of scripts."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

# What a name stands for whose packages are missing has `_backends`.
needs_image_processor = pytest.mark.skipif(
    hasattr(AutoImageProcessor, "_backends"), reason="AutoImageProcessor of transformers before 5.18 needs torchvision"
)
CLASSES = ("bird", "cat", "dog", "fish", "fox", "owl")


def picture(number: int, seed: int) -> np.ndarray:
    """Noise 12 × 12, of a class that shows in its colour."""
    pixels = np.random.default_rng([number, seed]).integers(0, 128, (12, 12, 3))
    pixels[:, :, number % 3] += 100 if number < 3 else 50
    return pixels.astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_folder(folder: Path, each: int, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> Path:
    """One folder a class; a file's name says nothing about its part."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            (folder / name / f"test_{index}.png").write_bytes(png(picture(number, seed + index)))
    return folder
