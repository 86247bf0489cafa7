"""What a translation run leaves beside the model: scores, translations, routing, the card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics import load_metric
from .diagnostics import lngd_of
from .model_card import CardFacts, Score, write_model_card
from .translation_args import DataArguments, ModelArguments

PREDICTIONS = "generated_predictions.txt"
ROUTING = "routing.json"

_USAGE = """
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name!r}{languages})
model = AutoModelForSeq2SeqLM.from_pretrained({name!r})
inputs = tokenizer([{prefix!r} + "…"], return_tensors="pt", return_token_type_ids=False)
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


def write_routing(folder: str | Path, optimizer: Any) -> None:
    """``routing.json``: LNGD's config and each parameter's owner and reason; removed where another optimizer ran."""
    path, lngd = Path(folder) / ROUTING, lngd_of(optimizer)
    if lngd is None:
        path.unlink(missing_ok=True)
        return
    routing = {
        "optimizer": "lngd",
        "config": lngd.config.to_dict(),
        "groups": [{"name": group["name"], "tensors": len(group["params"])} for group in lngd.param_groups],
        "memory": lngd.memory_usage(),
        "parameters": [dataclasses.asdict(route) for route in lngd.routing()],
    }
    path.write_text(json.dumps(routing, indent=2) + "\n", encoding="utf-8")


class CardWriter:
    """Writes the card of a translation model; called again by the Trainer before it pushes.

    Args:
        trainer: after training or evaluation.
        model: arguments of the run.
        data: arguments of the run.
        command: the command line, in parts.
    """

    def __init__(self, trainer: Any, model: ModelArguments, data: DataArguments, command: Sequence[str]) -> None:
        self.trainer, self.model, self.data, self.command = trainer, model, data, list(command)
        self.scores: list[Score] = []

    def add(self, split: str, metrics: dict[str, Any], prefix: str, signatures: dict[str, str]) -> None:
        """Take the scores out of the Trainer's metrics."""
        for metric, name in (("bleu", "BLEU"), ("chrf", "chrF")):
            value = metrics.get(f"{prefix}_{metric}")
            if value is not None:
                signature = signatures.get(metric)
                self.scores.append(Score(metric=metric, name=name, value=value, split=split, signature=signature))

    def __call__(self) -> Path:
        """Write README.md into the output folder."""
        args, data, net = self.trainer.args, self.data, self.trainer.model
        lngd = lngd_of(self.trainer.optimizer)
        name = (args.hub_model_id or Path(args.output_dir).resolve().name).split("/")[-1]
        file = data.train_file or data.validation_file or data.test_file or ""
        dataset = data.dataset_name or Path(file).resolve().parent.name or Path(file).name
        facts = CardFacts(
            name=name,
            task="translation",
            dataset_name=dataset,
            dataset_type=dataset,
            dataset_config=data.dataset_config_name,
            examples=len(self.trainer.train_dataset or ()),
            scores=self.scores,
            command=self.command,
            languages=[data.source_key, data.target_key],
            base_model=self.model.model_name_or_path,
            license=data.data_license,
            attribution=_attribution(data),
            architecture=type(net).__name__,
            parameters=sum(p.numel() for p in net.parameters()),
            usage=self._usage(args.hub_model_id or args.output_dir),
            routing=None if lngd is None else lngd.routing_table(),
            log_history=self.trainer.state.log_history,
        )
        return write_model_card(args.output_dir, facts, args)

    def _usage(self, name: str) -> str:
        data = self.data
        languages = ""
        if hasattr(self.trainer.processing_class, "src_lang"):
            languages = f", src_lang={data.source_lang!r}, tgt_lang={data.target_lang!r}"
        text = _USAGE.format(
            name=name,
            languages=languages,
            prefix=data.source_prefix or "",
            beams=data.num_beams or 1,
            length=data.eval_target_length,
        )
        return text.replace("'' + ", "")


def _attribution(data: DataArguments) -> str | None:
    """The text that was given, or the file beside the training data, its headings one level down."""
    if data.data_attribution:
        return data.data_attribution
    if not data.train_file:
        return None
    path = Path(data.train_file).parent / "ATTRIBUTION.md"
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(f"##{line}" if line.startswith("#") else line for line in lines)
