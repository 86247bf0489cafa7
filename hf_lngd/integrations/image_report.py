"""What an image-classification run leaves beside the model: accuracy, predictions, pictures, the card."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..metrics import load_metric
from .image_model import data_name
from .image_pictures import draw_confusion, draw_mistakes
from .image_rows import Rows
from .script_run import CardWriter, read_attribution

PREDICTIONS = "predictions.csv"
CONFUSION = "confusion_matrix.png"
MISTAKES = "worst_mistakes.png"
# Top-5 accuracy says something from this many classes on.
TOP_5_CLASSES = 6

_USAGE = """
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained({name})
model = AutoModelForImageClassification.from_pretrained({name})
inputs = processor(Image.open("image.png").convert({mode}), return_tensors="pt")
number = model(**inputs).logits.argmax(-1).item()
print(model.config.id2label[number])
"""


class ImageScores:
    """``compute_metrics``: accuracy, and top-5 accuracy of six classes or more, by the package's accuracy module.

    Attributes:
        logits: of the last call [N, K].
        labels: of the last call [N].
    """

    def __init__(self) -> None:
        self.logits, self.labels = np.empty((0, 0), np.float32), np.empty(0, np.int64)
        self._metric = load_metric("accuracy")

    def __call__(self, prediction: Any) -> dict[str, float]:
        """`prediction`: logits [N, K] and labels [N]."""
        self.logits, self.labels = only_logits(prediction.predictions), prediction.label_ids
        few = self.logits.shape[1] < TOP_5_CLASSES
        ranked = np.argsort(-self.logits, axis=1, kind="stable")[:, : 1 if few else 5]
        result = self._metric.compute(predictions=ranked, references=self.labels)
        return {name: round(value, 6) for name, value in result.items()}


def only_logits(predictions: Any) -> NDArray[np.float32]:
    """The logits [N, K] among what a model gives."""
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions, dtype=np.float32)


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax over the last axis."""
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def write_predictions(
    folder: str | Path,
    rows: Rows,
    logits: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
    classes: Sequence[str],
) -> None:
    """``predictions.csv``: image, predicted class, its probability and, where there are labels, the true one.

    Args:
        folder: to write into.
        rows: the images, in the order of the logits.
        logits: [N, K].
        labels: class numbers [N] or None.
        classes: names of the K classes.
    """
    best, shares = logits.argmax(1), probabilities(logits)
    with open(Path(folder) / PREDICTIONS, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "predicted", "probability", *([] if labels is None else ["label"])])
        for index, number in enumerate(best):
            row = [rows.where(index), classes[number], f"{shares[index, number]:.6f}"]
            writer.writerow(row + ([] if labels is None else [classes[labels[index]]]))


def write_pictures(
    folder: str | Path, pixels: NDArray[np.uint8], logits: NDArray[np.float32], labels: Any, classes: Sequence[str]
) -> None:
    """Which classes are taken for which, and the worst mistakes; the latter's picture is removed if there are none.

    Args:
        folder: to write into.
        pixels: of the validation images [N, C, H, W].
        logits: [N, K].
        labels: [N].
        classes: names of the K classes.
    """
    draw_confusion(Path(folder) / CONFUSION, labels, logits.argmax(1), classes)
    draw_mistakes(Path(folder) / MISTAKES, pixels, probabilities(logits), labels, classes)


class ImageCard(CardWriter):
    """The card of an image classifier."""

    metrics = {"accuracy": ("accuracy", "Accuracy"), "top5_accuracy": ("accuracy", "Top-5 accuracy")}

    def own_facts(self, name: str) -> dict[str, Any]:
        """Data set, pictures, a code example."""
        dataset = data_name(self.data)
        source = self.data.source("train")
        grey = getattr(self.trainer.model.config, "num_channels", 3) == 1
        folder = Path(self.trainer.args.output_dir)
        pictures = (("Which classes are taken for which", CONFUSION), ("The worst mistakes", MISTAKES))
        validated = any(score.split == "validation" for score in self.scores)
        return {
            "task": "image-classification",
            "dataset_name": dataset,
            "dataset_type": dataset,
            "attribution": read_attribution(self.data.data_attribution, source[1] if source else None),
            "usage": _USAGE.format(name=json.dumps(name, ensure_ascii=False), mode='"L"' if grey else '"RGB"'),
            "pictures": [(what, file) for what, file in pictures if validated and (folder / file).is_file()],
            "libraries": ("pillow",),
        }
