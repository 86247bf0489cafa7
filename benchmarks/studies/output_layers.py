"""Which optimizer should take an output layer: LNGD or AdamW, by how many outputs it has.

    python -m benchmarks.studies.output_layers --text DIR --images DIR

Small models from scratch with one flag, each once with its output layer in LNGD and once without (`exclude`), paired by
seed: a Llama whose output layer is not tied to its embedding over vocabularies of several sizes, the Marian of
`benchmarks/tasks/translation` untied, and the ViT and the ResNet of `benchmarks/tasks/cifar10` (10 classes). Text is
that of the task `multi30k`. Rows go to `results/output_layers.json`; what is there is not run again. The table
is printed; without `--text` and `--images` that of the committed rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MarianMTModel

from benchmarks.report.tables import spread, table
from benchmarks.studies.runs import Results, train
from benchmarks.studies.spec import named
from benchmarks.tasks import cifar10, translation
from benchmarks.tasks.task import Batch, Task
from hf_lngd import routing

RESULTS = Path(__file__).resolve().parents[1] / "results"
FILE = RESULTS / "output_layers.json"
SEEDS = (101, 102, 103)
VOCABULARIES = (250, 1000, 4000)
# Task → the name of its output layer, and the task whose steps and tuned rate it takes.
TASKS = {
    **{f"llama-{size}": ("lm_head", "multi30k") for size in VOCABULARIES},
    "marian-untied": ("lm_head", "multi30k"),
    "cifar10-vit": ("classifier", "cifar10-vit"),
    "cifar10-resnet": ("classifier", "cifar10-resnet"),
}


def make_llama(size: int, seed: int) -> nn.Module:
    """d=128, 2 layers, an output layer of its own."""
    torch.manual_seed(seed)
    widths = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": size, "pad_token_id": translation.PAD, "eos_token_id": 1}
    return LlamaForCausalLM(
        LlamaConfig(**widths, **tokens, max_position_embeddings=128, tie_word_embeddings=False, use_cache=False)
    )


def make_untied_marian(seed: int) -> nn.Module:
    """The Marian of the task with an output layer of its own, begun as its embedding is."""
    config: Any = translation.make_model(seed).config
    config.tie_word_embeddings = False
    torch.manual_seed(seed)
    model = MarianMTModel(config)
    assert model.lm_head.weight is not model.model.shared.weight
    return model


def of_targets(batch: Batch) -> Batch:
    """The target side alone, for a causal model."""
    labels = batch["labels"]
    attention = (labels != translation.IGNORED).long()
    return {"input_ids": labels.clamp_min(translation.PAD), "attention_mask": attention, "labels": labels}


def llama(size: int, folder: Path) -> Task:
    """German captions, one token after the other, over `size` pieces."""
    with patch.object(translation, "VOCABULARY", size), patch.object(translation, "MAX_TOKENS", 64):
        data = translation.prepare.__wrapped__(folder)
    data = replace(data, validation=[of_targets(batch) for batch in data.validation])

    def batches(seed: int) -> Iterator[Batch]:
        return map(of_targets, translation.batches(data, seed))

    return Task(
        name=f"llama-{size}",
        make_model=partial(make_llama, size),
        batches=batches,
        evaluate=lambda model, tuning: {"loss": translation.validation_loss(model, data)},
    )


@cache
def load(name: str, text: Path, images: Path) -> Task:
    """The task of this name, read once."""
    if name.startswith("llama"):
        return llama(int(name.split("-")[1]), text)
    if name == "marian-untied":
        return replace(translation.make_task("multi30k", text), name=name, make_model=make_untied_marian)
    return cifar10.vit(images) if name == "cifar10-vit" else cifar10.resnet(images)


def run(text: Path, images: Path) -> None:
    """Every pair of runs that is not there yet."""
    results = Results(FILE)
    for seed in SEEDS:
        for name, (layer, like) in TASKS.items():
            spec = named(like)
            settings = Results(RESULTS / f"{like}.json").best("lngd-same")
            for fields in ("", f"exclude={layer}"):
                own = replace(settings, fields=fields)
                if results.find("option", "lngd", own, seed=seed, steps=spec.steps, task=name):
                    continue
                task = load(name, text, images)
                with patch.object(routing, "vocabulary_layers", lambda model: set()):
                    row = train(
                        "lngd", own, seed, spec.steps, spec.warmup_of(spec.steps), task, lambda *_: None, tuning=True
                    )
                results.add({"phase": "option", **row})
                print(name, seed, fields or "lngd", row["loss"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="the folder of multi30k")
    parser.add_argument("--images", type=Path, help="the folder of cifar10")
    args = parser.parse_args()
    if args.text and args.images:
        run(args.text, args.images)
    rows = Results(FILE).rows
    lines = []
    for name, (layer, _) in TASKS.items():
        own = [row for row in rows if row["task"] == name]
        lngd, adamw = (
            {row["seed"]: row["loss"] for row in own if row["settings"]["fields"] == fields}
            for fields in ("", f"exclude={layer}")
        )
        gains = [lngd[seed] - adamw[seed] for seed in lngd if seed in adamw]
        if gains:
            means = (f"{mean(losses.values()):.3f}" for losses in (lngd, adamw))
            lines.append([name, *means, spread(gains, 3), str(len(gains))])
    print(table(["task", "LNGD", "AdamW", "LNGD - AdamW", "seeds"], lines))


if __name__ == "__main__":
    main()
