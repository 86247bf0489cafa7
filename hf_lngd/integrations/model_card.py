"""Model cards: scores with signature, optimizer settings, training data, the exact command."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .card_command import folded, inputs, optimizer_options, without_authors
from .card_pictures import LOSSES, draw_losses, losses_by_step
from .training_args import is_lngd, lngd_settings

_LIBRARIES = ("hf_lngd", "torch", "transformers", "accelerate", "datasets")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of the `model-index`.

    Attributes:
        metric: the Hub's name, e.g. bleu.
        name: as it is shown, e.g. BLEU.
        value: the number.
        split: of the data: validation or test.
        signature: what makes the number comparable, e.g. sacrebleu's.
    """

    metric: str
    name: str
    value: float
    split: str
    signature: str | None = None


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells, beyond what the training arguments say.

    Attributes:
        name: the model's name.
        task: the Hub's task, e.g. translation.
        dataset_name: of the training data, as it is shown.
        dataset_type: its name on the Hub, or what it is shown as.
        dataset_on_hub: the Hub has a data set of that name, which is linked.
        dataset_config: its configuration, if it has several.
        examples: how many were trained on.
        scores: for the `model-index`; may be empty.
        command: the command line that remakes the model, in parts; shown :func:`without_authors`.
        languages: codes, source first.
        base_model: what was fine-tuned, if a name on the Hub or a folder.
        license: as the Hub names it.
        attribution: who the training data come from.
        architecture: e.g. MarianMTModel.
        parameters: how many.
        usage: a code example.
        pictures: (what it shows, its file in the model's folder).
        libraries: whose versions are told beside those of every model's.
        routing: LNGD's routing table.
        log_history: the Trainer's.
        trained: the run trained the model; else it evaluated `base_model`.
    """

    name: str
    task: str
    dataset_name: str
    dataset_type: str
    dataset_config: str | None = None
    dataset_on_hub: bool = False
    examples: int = 0
    scores: Sequence[Score] = ()
    command: Sequence[str] = ()
    languages: Sequence[str] = ()
    base_model: str | None = None
    license: str | None = None
    attribution: str | None = None
    architecture: str = ""
    parameters: int = 0
    usage: str | None = None
    pictures: Sequence[tuple[str, str]] = ()
    libraries: Sequence[str] = ()
    routing: str | None = None
    log_history: Sequence[Mapping[str, Any]] = field(default_factory=list)
    trained: bool = True


def write_model_card(folder: str | Path, facts: CardFacts, args: Any) -> Path:
    """Write README.md for a model.

    Args:
        folder: of the model.
        facts: what to tell.
        args: the training arguments.

    Returns:
        The card's path. Its metadata have a valid `model-index` if there are scores.
    """
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    curves = facts.trained and draw_losses(folder, facts.log_history, facts.name)
    card = ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{_body(facts, args, curves)}")
    card.save(path)
    return path


def _metadata(facts: CardFacts) -> ModelCardData:
    results = [
        EvalResult(
            task_type=facts.task,
            dataset_type=facts.dataset_type,
            dataset_name=facts.dataset_name,
            dataset_config=facts.dataset_config,
            dataset_split=score.split,
            metric_type=score.metric,
            metric_name=score.name,
            metric_value=score.value,
            metric_args={"signature": score.signature} if score.signature else None,
        )
        for score in facts.scores
    ]
    return ModelCardData(
        language=list(facts.languages) or None,
        license=facts.license,
        library_name="transformers",
        base_model=facts.base_model if facts.base_model and not Path(facts.base_model).exists() else None,
        datasets=[facts.dataset_type] if facts.dataset_on_hub else None,
        tags=[facts.task, "lngd", "hf_lngd"],
        pipeline_tag=facts.task,
        metrics=sorted({score.metric for score in facts.scores}) or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )


def _body(facts: CardFacts, args: Any, curves: bool) -> str:
    sections = [f"# {facts.name}", _introduction(facts, args)]
    if facts.usage:
        sections += ["## Use", f"```python\n{facts.usage.strip()}\n```"]
    if facts.scores:
        sections += ["## Results", _score_table(facts.scores)]
    sections += [f"![{what}]({file})" for what, file in facts.pictures]
    sections += ["## Limits", _limits(facts, args)]
    if facts.trained:
        sections += ["## Training data", _data(facts), "## Training", _settings(args)]
        if curves:
            sections += [f"![Loss against steps]({LOSSES})"]
        sections += _folded_away("Losses", _loss_table(facts.log_history))
        sections += _folded_away("Which parameter is whose", f"```\n{facts.routing}\n```" if facts.routing else "")
    if facts.command:
        what = "makes this model again" if facts.trained else "gives these results again"
        command = folded(without_authors(facts.command))
        read = ", ".join(f"`{name}`" for name in inputs(facts.command))
        given = f" and {read} where it is run" if read else ""
        sections += ["## Command", f"With the versions below{given}, this {what}:", f"```bash\n{command}\n```"]
    sections += ["## Versions", "\n".join(f"- {name} {number}" for name, number in _versions(facts.libraries))]
    return "\n\n".join(sections) + "\n"


def _folded_away(title: str, text: str) -> list[str]:
    """What few readers want: one line until it is opened. Nothing for no text."""
    return [f"<details><summary>{title}</summary>", text, "</details>"] if text else []


def _introduction(facts: CardFacts, args: Any) -> str:
    kind = f"`{facts.architecture}`, {facts.parameters:,} parameters" if facts.architecture else "A model"
    languages = f", {' to '.join(facts.languages)}" if facts.languages else ""
    task = f"for {facts.task.replace('-', ' ')}{languages}"
    if not facts.trained:
        return f"{kind}, {task}: `{facts.base_model}`, evaluated." if facts.base_model else f"{kind}, {task}."
    origin = f"fine-tuned from `{facts.base_model}`" if facts.base_model else "trained from scratch"
    optimizer = f"`{_plain(args.optim)}`"
    if is_lngd(args):
        optimizer = "LNGD (layer-wise natural gradient descent)"
    return f"{kind}, {origin} {task}, with the optimizer {optimizer}."


def _score_table(scores: Sequence[Score]) -> str:
    """The signatures have a column where there are any; what lies in [0, 1] has two digits more."""
    signed = any(score.signature for score in scores)
    rows = ["| split | metric | value |", "|---|---|---|"]
    if signed:
        rows = ["| split | metric | value | signature |", "|---|---|---|---|"]
    for score in scores:
        signature = f"`{score.signature}`".replace("|", "\\|") if score.signature else ""
        digits = 4 if score.value <= 1 else 2
        row = f"| {score.split} | {score.name} | {score.value:.{digits}f} |"
        rows.append(f"{row} {signature} |" if signed else row)
    return "\n".join(rows)


def _limits(facts: CardFacts, args: Any) -> str:
    """What the scores do not say."""
    other = "other kinds of text" if facts.task == "translation" else "images of other kinds"
    splits = " and the ".join(dict.fromkeys(score.split for score in facts.scores))
    measured = f"Measured on the {splits} split above alone" if splits else "Nothing was measured"
    limits = [f"{measured}: {other}, bias and safety were not looked at."]
    if facts.trained:
        limits.append(f"One run, of seed {args.seed}; runs of other seeds, and on other hardware, end a little apart.")
        limits.append("It repeats what its training data hold, mistakes among it.")
    return "\n".join(f"- {limit}" for limit in limits)


def _data(facts: CardFacts) -> str:
    config = f", {facts.dataset_config}" if facts.dataset_config else ""
    count = f": {facts.examples:,} examples" if facts.examples else ""
    text = f"{facts.dataset_name}{config}{count}."
    return f"{text}\n\n{facts.attribution.strip()}" if facts.attribution else text


def _settings(args: Any) -> str:
    """The optimizer as options, all its settings, then the run's."""
    parts = ["The optimizer, as options of a command:", f"```bash\n{folded(optimizer_options(args))}\n```"]
    if is_lngd(args):
        config, lr = lngd_settings(args)
        settings = json.dumps({"optim": "lngd", "lr": lr, **config.to_dict()}, indent=2)
        parts += _folded_away("All its settings", f"```json\n{settings}\n```")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
    run = {
        "batch size": f"{batch} ({args.per_device_train_batch_size} × {args.gradient_accumulation_steps} accumulated)",
        "lr_scheduler_type": _plain(args.lr_scheduler_type),
        "warmup_steps": args.warmup_steps,
        "max_grad_norm": args.max_grad_norm,
        "label_smoothing_factor": args.label_smoothing_factor,
        "num_train_epochs": args.num_train_epochs if args.max_steps <= 0 else None,
        "max_steps": args.max_steps if args.max_steps > 0 else None,
        "seed": args.seed,
    }
    shown = ((name, f"{value:g}" if isinstance(value, float) else value) for name, value in run.items())
    return "\n\n".join([*parts, "\n".join(f"- {name}: {value}" for name, value in shown if value is not None)])


def _loss_table(history: Sequence[Mapping[str, Any]], most: int = 12) -> str:
    """Training and validation loss by step: at most `most` rows, spread evenly, the last among them."""
    rows = losses_by_step(history)
    if not rows:
        return ""
    steps = list(rows)
    kept = {steps[round(i * (len(steps) - 1) / max(1, most - 1))] for i in range(most)}
    lines = ["| step | training loss | validation loss |", "|---|---|---|"]
    for step in sorted(kept):
        cells = (f"{rows[step][key]:.4f}" if key in rows[step] else "" for key in ("loss", "eval_loss"))
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _versions(more: Sequence[str]) -> list[tuple[str, str]]:
    found = []
    for name in (*_LIBRARIES, *more):
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
