"""Model cards: scores with signature, optimizer settings, training data, loss curves, the command that makes the model
again. The text stands in ``model_card.md.jinja``; a reader can run its commands, and they tell no secret."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .training_args import is_lngd, lngd_settings, name_of

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_LIBRARIES = ("hf_lngd", "torch", "transformers", "accelerate", "datasets")
_ADAMW = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# The author's alone, left out of a command: tokens, the push, consent to overwrite, the checkpoint that training went
# on from (a resumed run ends where an uninterrupted one does). argparse takes beginnings of names, too.
_AUTHORS = re.compile(r"--(tok|toke|token|hub.*|push.*|resume.*|overwrite_o.*)$")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells, beyond what the training arguments say."""

    name: str  # the model's
    task: str  # the Hub's, e.g. translation
    dataset_name: str  # of the training data, as it is shown
    dataset_type: str  # its name on the Hub, or what it is shown as
    dataset_config: str | None = None
    dataset_on_hub: bool = False  # the Hub has a data set of that name, which is linked
    file: str | None = None  # of the training data, or their folder
    examples: int = 0  # how many there are to train on
    seen: int | None = None  # how many of them training came to; None: all
    scores: Sequence[EvalResult] = ()  # with the signature that makes a number comparable as `metric_args`
    command: Sequence[str] = ()  # that makes the model again, in parts; shown :func:`without_authors`
    languages: Sequence[str] = ()  # codes, source first
    base_model: str | None = None  # what was fine-tuned: a name on the Hub or a folder
    license: str | None = None  # as the Hub names it
    attribution: str | None = None  # who the training data come from
    architecture: str = ""  # e.g. MarianMTModel
    parameters: int = 0  # how many
    usage: str | None = None  # a code example
    pictures: Sequence[tuple[str, str]] = ()  # (what it shows, its file in the model's folder)
    libraries: Sequence[str] = ()  # whose versions are told beside those of every model's
    routing: str | None = None  # LNGD's routing table
    curves: str | None = None  # the picture of losses, its file in the model's folder
    trained: bool = True  # the run trained the model; else it evaluated `base_model`


def write_model_card(folder: str | Path, facts: CardFacts, args: Any) -> Path:
    """Write a model's README.md, with a valid `model-index` if there are scores; `args` are the training arguments.

    Returns:
        The card's path.
    """
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = ""
    if is_lngd(args):
        config, lr = lngd_settings(args)
        settings = json.dumps({"optim": "lngd", "lr": lr, **config.to_dict()}, indent=2)
    card = ModelCard.from_template(
        _metadata(facts),
        str(_TEMPLATE),
        facts=facts,
        args=args,
        optimizer="LNGD (layer-wise natural gradient descent)" if is_lngd(args) else f"`{name_of(args.optim)}`",
        settings=settings,
        options=folded(optimizer_options(args)),
        batch=args.per_device_train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size),
        scheduler=name_of(args.lr_scheduler_type),
        command=folded(without_authors(facts.command)),
        versions=list(_versions(facts.libraries)),
    )
    card.save(path)
    return path


def _metadata(facts: CardFacts) -> ModelCardData:
    return ModelCardData(
        language=list(facts.languages) or None,
        license=facts.license,
        library_name="transformers",
        base_model=facts.base_model if facts.base_model and not Path(facts.base_model).exists() else None,
        datasets=[facts.dataset_type] if facts.dataset_on_hub else None,
        tags=[facts.task, "lngd", "hf_lngd"],
        pipeline_tag=facts.task,
        metrics=sorted({score.metric_type for score in facts.scores}) or None,
        model_name=facts.name if facts.scores else None,
        eval_results=list(facts.scores) or None,
    )


def _versions(more: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in (*_LIBRARIES, *more):
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


# Commands


def without_authors(given: Sequence[str]) -> list[str]:
    """Arguments without tokens, the push and the checkpoint, and without their values."""
    shown: list[str] = []
    skipping = False
    for part in given:
        if part.startswith("--"):
            skipping = _AUTHORS.match(_option(part.partition("=")[0])) is not None
        if not skipping:
            shown.append(part)
    return shown


def _option(text: str) -> str:
    """Its name, with underscores: argparse takes --train-file for --train_file."""
    return text.replace("-", "_").replace("__", "--", 1)


def optimizer_options(args: Any) -> list[str]:
    """The optimizer with all its settings, as options of any script that takes the package's training arguments."""
    if is_lngd(args):
        config, lr = lngd_settings(args)
        options = ["--optim", "lngd", "--learning_rate", str(lr), "--optim_args", config.to_optim_args()]
        targets = args.optim_target_modules
        return options + ([] if targets is None else ["--optim_target_modules", str(targets)])
    options = ["--optim", name_of(args.optim), "--learning_rate", str(args.learning_rate)]
    options += ["--optim_args", args.optim_args] if args.optim_args else []
    return options + [part for name in _ADAMW for part in (f"--{name}", str(getattr(args, name)))]


def folded(command: Sequence[str], width: int = 100) -> str:
    """A command over several lines, broken before options, as a shell takes it."""
    lines = [""]
    for part in (shlex.quote(part) for part in command):
        if part.startswith("--") and len(lines[-1]) + len(part) > width:
            lines.append("   ")
        lines[-1] += f" {part}"
    return " \\\n".join(lines).strip()
