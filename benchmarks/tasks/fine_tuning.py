"""Fine-tuning a pretrained translation model: on Multi30k's captions, and on WMT's news.

The folder of the model holds a Marian with its tokenizer, as `from_pretrained` reads it. Multi30k: trained on `train`,
judged by the loss on `validation` and BLEU on `test2016`. WMT: trained on newstest2008 to 2012, judged by the loss on
newstest2013 and BLEU on newstest2014.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from benchmarks.tasks.task import Task
from benchmarks.tasks.text import read_pairs
from benchmarks.tasks.translation import EVALUATION_BATCH, Data, batches, collate, lengths_of, validation_loss
from hf_lngd.metrics import load_metric

MAX_TOKENS = 64
# BLEU is of the first so many test sentences, translated greedily: enough to tell rivals apart, a tenth of a run.
TRANSLATED = 400
# The loss is of validation sentences at an even distance, about so many.
VALIDATED = 600
NEW_TOKENS = 60
PARTS = {
    "marian-multi30k": (["train"], ["validation"], ["test2016"]),
    "marian-wmt": ([f"newstest{year}" for year in range(2008, 2013)], ["newstest2013"], ["newstest2014"]),
}
Pairs = list[tuple[str, str]]


@cache
def prepare(name: str, folder: Path, model: Path) -> tuple[Data, Pairs, Any]:
    """Encoded training and validation data, the test pairs, and the tokenizer, read once a process.

    Raises:
        ValueError: a file is missing or holds a line that is no translation.
    """
    found: list[Pairs] = []
    for names in PARTS[name]:
        paths = [folder / f"{part}.json.gz" for part in names]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"--data: {folder} has no {path.name}")
        found.append([pair for path in paths for pair in read_pairs(path)])
    train, validation, test = found
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)

    def encode(pairs: Pairs) -> list[tuple[list[int], list[int]]]:
        sources, targets = zip(*pairs, strict=True)
        limits = {"truncation": True, "max_length": MAX_TOKENS}
        own = tokenizer(list(sources), **limits)["input_ids"]
        return list(zip(own, tokenizer(text_target=list(targets), **limits)["input_ids"], strict=True))

    held_out = sorted(encode(validation[:: max(1, len(validation) // VALIDATED)]), key=lengths_of)
    cuts = range(0, len(held_out), EVALUATION_BATCH)
    data = Data(encode(train), [collate(held_out[cut : cut + EVALUATION_BATCH]) for cut in cuts])
    return data, test[:TRANSLATED], tokenizer


def load_model(folder: Path, seed: int) -> nn.Module:
    """The pretrained model; the seed decides dropout alone."""
    torch.manual_seed(seed)
    return AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def bleu(model: Any, pairs: Pairs, tokenizer: Any) -> dict[str, float]:
    """sacrebleu of greedy translations, in points."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    translated = [""] * len(pairs)
    for start in range(0, len(order), EVALUATION_BATCH):
        rows = order[start : start + EVALUATION_BATCH]
        inputs = tokenizer([pairs[i][0] for i in rows], return_tensors="pt", padding=True, truncation=True,
                           max_length=MAX_TOKENS)  # fmt: skip
        inputs.pop("token_type_ids", None)
        made = model.generate(**inputs, num_beams=1, do_sample=False, max_new_tokens=NEW_TOKENS)
        for i, text in zip(rows, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
            translated[i] = text
    model.train(was_training)
    scores = load_metric("sacrebleu").compute(predictions=translated, references=[[pair[1]] for pair in pairs])
    return {"bleu": scores["score"]}


def make_task(name: str, folder: Path, model: Path) -> Task:
    """The task of this name with its data."""
    data, test, tokenizer = prepare(name, folder, model)
    return Task(
        name=name,
        make_model=partial(load_model, model),
        batches=partial(batches, data),
        evaluate=lambda trained, tuning: {"loss": validation_loss(trained, data)},
        final=lambda trained: bleu(trained, test, tokenizer),
    )
