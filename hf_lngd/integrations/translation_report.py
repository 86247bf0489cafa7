"""What a translation run leaves beside the model: scores, translations, routing, the card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics import load_metric
from .script_run import CardWriter, read_attribution

PREDICTIONS = "generated_predictions.txt"

_USAGE = """
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name}{languages})
model = AutoModelForSeq2SeqLM.from_pretrained({name})
inputs = tokenizer([{prefix}"…"], return_tensors="pt", return_token_type_ids=False)
outputs = model.generate(**inputs, num_beams={beams}, max_length={length})
print(tokenizer.batch_decode(outputs, skip_special_tokens=True))
"""


class TranslationScores:
    """``compute_metrics``: BLEU and chrF of generated tokens against labels, by the package's sacrebleu module.

    Attributes:
        signatures: of the last call, by metric: ``bleu``, ``chrf``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.signatures: dict[str, str] = {}
        self._metric = load_metric("sacrebleu")

    def __call__(self, prediction: Any) -> dict[str, float]:
        """`prediction`: token numbers [B, T] of both, padded with −100 or the padding token."""
        tokens, labels = prediction.predictions, prediction.label_ids
        texts = self.decode(tokens[0] if isinstance(tokens, tuple) else tokens)
        result = self._metric.compute(predictions=texts, references=self.decode(labels))
        self.signatures = {"bleu": result["signature"], "chrf": result["chrf_signature"]}
        lengths = (self._unpadded(tokens) != self.tokenizer.pad_token_id).sum(-1)
        scores = {"bleu": result["score"], "chrf": result["chrf"], "gen_len": float(np.mean(lengths))}
        return {name: round(value, 4) for name, value in scores.items()}

    def decode(self, tokens: Any) -> list[str]:
        """Texts, one line each, without special tokens."""
        texts = self.tokenizer.batch_decode(
            self._unpadded(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [" ".join(text.split()) for text in texts]

    def _unpadded(self, tokens: Any) -> Any:
        return np.where(np.asarray(tokens) < 0, self.tokenizer.pad_token_id, tokens)


def write_predictions(folder: str | Path, texts: Sequence[str]) -> None:
    """One translation a line, in the order of the test data."""
    (Path(folder) / PREDICTIONS).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


class TranslationCard(CardWriter):
    """The card of a translation model."""

    metrics = {"bleu": ("bleu", "BLEU"), "chrf": ("chrf", "chrF")}

    def own_facts(self, name: str) -> dict[str, Any]:
        """Languages, data set, a code example."""
        data = self.data
        file = data.train_file or data.validation_file or data.test_file or ""
        dataset = data.dataset_name or Path(file).resolve().parent.name or Path(file).name
        return {
            "task": "translation",
            "dataset_name": dataset,
            "dataset_type": dataset,
            "languages": [data.source_key, data.target_key],
            "attribution": read_attribution(data.data_attribution, data.train_file),
            "usage": self._usage(name),
            "libraries": ("tokenizers", "sacrebleu"),
        }

    def _usage(self, name: str) -> str:
        data = self.data
        languages = ""
        if hasattr(self.trainer.processing_class, "src_lang"):
            languages = f', src_lang="{data.source_lang}", tgt_lang="{data.target_lang}"'
        return _USAGE.format(
            name=json.dumps(name, ensure_ascii=False),
            languages=languages,
            prefix=f"{json.dumps(data.source_prefix, ensure_ascii=False)} + " if data.source_prefix else "",
            beams=data.num_beams or 1,
            length=data.eval_target_length,
        )
