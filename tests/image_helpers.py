"""Tiny images, models and the arguments that the tests of `scripts/run_image_classification.py` share."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import (
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

from scripts import run_image_classification

ROOT = Path(__file__).resolve().parent.parent
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


# Fixtures of a module that has these names, too.


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
def run(monkeypatch: pytest.MonkeyPatch, cache: str) -> Callable[..., list[str]]:
    """The script's main function in this process; returns its arguments. Options that are None are left out."""

    def start(options: dict[str, Any], *flags: str) -> list[str]:
        given = {**BASE, "cache_dir": cache, **options}
        argv = [*flags, *(part for k, v in given.items() if v is not None for part in (f"--{k}", str(v)))]
        monkeypatch.setattr(sys, "argv", ["scripts/run_image_classification.py", *argv])
        run_image_classification.exit_on_usage_error(run_image_classification.main)
        return argv

    return start


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
