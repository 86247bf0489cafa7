"""A batch that fits a model's task, by its configuration: for a look at one step, its numbers mean nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHANNELS, _IMAGE = 3, 224


def batch_of(
    config: Any, task: str, rows: int, length: int, device: str, dtype: torch.dtype
) -> tuple[str, dict[str, Tensor]]:
    """The batch in words, and the model's inputs with labels.

    Args:
        rows, length: length is that of a text, in tokens; no text is longer than a model has positions.
        dtype: of images.
    """
    if task == "image":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or _IMAGE
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        pixels = torch.zeros(
            rows, getattr(vision, "num_channels", _CHANNELS), height, width, device=device, dtype=dtype
        )
        return f"{rows} images of {height} × {width}", {
            "pixel_values": pixels,
            "labels": classes_of(config, rows, device),
        }
    most = positions_of(config)
    words = f"{rows} texts of {min(length, most or length)} tokens"
    if most is not None and most < length:
        length, words = most, f"{words} (it has no more positions)"
    ids = torch.ones(rows, length, dtype=torch.int64, device=device)
    if task == "classification":
        end = _number(config, "eos_token_id")
        if end is not None:  # Bart's kind classify by it
            ids[:, -1] = end
        return words, {"input_ids": ids, "labels": classes_of(config, rows, device)}
    inputs = {"input_ids": ids, "labels": ids}
    return words, inputs | ({"decoder_input_ids": ids} if task == "translation" else {})


def classes_of(config: Any, rows: int, device: str) -> Tensor:
    """Labels of a classification in the form of its `problem_type`: a class [rows], or numbers [rows, labels]."""
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification" or (problem == "regression" and config.num_labels > 1):
        return torch.zeros(rows, config.num_labels, device=device)
    return torch.zeros(rows, dtype=torch.float32 if problem == "regression" else torch.int64, device=device)


def positions_of(config: Any) -> int | None:
    """How many tokens a text may have; None: the configuration sets no bound."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [_number(text, name) for name in ("max_position_embeddings", "max_target_positions")]
    return min((number for number in found if number), default=None)


def _number(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value >= 0 else None
