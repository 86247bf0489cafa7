"""Accuracy, and how often the right class is among the first k, from each example's classes, likeliest first."""

from typing import Any

import datasets
import evaluate

_DESCRIPTION = "Accuracy and top-k accuracy of ranked classes."

_CITATION = ""

_INPUTS = """\
Args:
    predictions: for each example a class number, or several, the likeliest first.
    references: the right class of each.
    top_k: how many of the first may hold the right class, for `top{k}_accuracy`; 5 by default.
Returns:
    accuracy; top{k}_accuracy where at least k classes were given for each example.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Accuracy(evaluate.Metric):
    """See the module's text."""

    def _info(self) -> Any:
        number = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Sequence(number), "references": number}),
                datasets.Features({"predictions": number, "references": number}),
            ],
        )

    def _compute(self, predictions: Any, references: Any, top_k: int = 5) -> dict[str, float]:
        if top_k < 1:
            raise ValueError(f"top_k: got {top_k}, accepted: an integer, at least 1")
        ranked = [list(row) if isinstance(row, (list, tuple)) else [row] for row in predictions]
        if any(not row for row in ranked):
            raise ValueError("predictions: got an example without a class, accepted: at least one each")
        count = len(ranked)
        right = sum(row[0] == wanted for row, wanted in zip(ranked, references, strict=True))
        result = {"accuracy": right / count}
        if min(len(row) for row in ranked) >= top_k:
            among = sum(wanted in row[:top_k] for row, wanted in zip(ranked, references, strict=True))
            result[f"top{top_k}_accuracy"] = among / count
        return result
