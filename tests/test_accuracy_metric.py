"""The package's own accuracy module: scikit-learn's numbers, through `evaluate`, without a network."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from hf_lngd.metrics import available, load_metric


@pytest.mark.parametrize("classes", [6, 20])
def test_it_gives_scikit_learns_numbers(classes: int) -> None:
    draw = np.random.default_rng(classes)
    scores, labels = draw.normal(size=(200, classes)), draw.integers(0, classes, 200)
    ranked = np.argsort(-scores, axis=1)[:, :5]
    result = load_metric("accuracy").compute(predictions=ranked, references=labels)
    assert result["accuracy"] == pytest.approx(accuracy_score(labels, scores.argmax(1)))
    expected = top_k_accuracy_score(labels, scores, k=5, labels=range(classes))
    assert result["top5_accuracy"] == pytest.approx(expected) and expected > result["accuracy"]


def test_one_class_each_has_no_top_5() -> None:
    metric = load_metric("accuracy")
    assert metric.compute(predictions=[1, 0, 2, 2], references=[1, 0, 2, 1]) == {"accuracy": 0.75}
    ranked = [[1, 0], [0, 1], [2, 0], [2, 1]]
    assert metric.compute(predictions=ranked, references=[1, 0, 2, 1]) == {"accuracy": 0.75}
    result = metric.compute(predictions=ranked, references=[1, 0, 2, 1], top_k=2)
    assert result == {"accuracy": 0.75, "top2_accuracy": 1.0}


def test_what_it_refuses() -> None:
    metric = load_metric("accuracy")
    assert "accuracy" in available()
    with pytest.raises(ValueError, match="top_k: got 0"):
        metric.compute(predictions=[1], references=[1], top_k=0)
