"""Model cards: scores with signature, optimizer settings, training data, the exact command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .training_args import is_lngd, lngd_settings

# Values of these arguments never go into a card.
SECRETS = ("--token", "--hub_token", "--hub-token", "--push_to_hub_token")

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
        dataset_config: its configuration, if it has several.
        examples: how many were trained on.
        scores: for the `model-index`; may be empty.
        command: the command line that remakes the model, in parts.
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
    """

    name: str
    task: str
    dataset_name: str
    dataset_type: str
    dataset_config: str | None = None
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


def write_model_card(folder: str | Path, facts: CardFacts, args: Any) -> Path:
    """Write README.md for a model.

    Args:
        folder: of the model.
        facts: what to tell.
        args: the training arguments.

    Returns:
        The card's path. Its metadata have a valid `model-index` if there are scores.
    """
    card = ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{_body(facts, args)}")
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
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
        tags=[facts.task, "lngd", "hf_lngd"],
        pipeline_tag=facts.task,
        metrics=sorted({score.metric for score in facts.scores}) or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )


def _body(facts: CardFacts, args: Any) -> str:
    sections = [f"# {facts.name}", _introduction(facts, args)]
    if facts.usage:
        sections += ["## Use", f"```python\n{facts.usage.strip()}\n```"]
    if facts.scores:
        sections += ["## Results", _score_table(facts.scores)]
    sections += [f"![{what}]({file})" for what, file in facts.pictures]
    sections += ["## Training data", _data(facts)]
    sections += ["## Training", _settings(args)]
    if facts.command:
        sections += ["The command:", f"```bash\n{_folded(without_secrets(facts.command))}\n```"]
    losses = _loss_table(facts.log_history)
    if losses:
        sections += [losses]
    if facts.routing:
        sections += ["Which parameter is whose:", f"```\n{facts.routing}\n```"]
    sections += ["## Versions", "\n".join(f"- {name} {number}" for name, number in _versions(facts.libraries))]
    return "\n\n".join(sections) + "\n"


def _introduction(facts: CardFacts, args: Any) -> str:
    kind = f"`{facts.architecture}`, {facts.parameters:,} parameters" if facts.architecture else "A model"
    origin = f"fine-tuned from `{facts.base_model}`" if facts.base_model else "trained from scratch"
    languages = f", {' to '.join(facts.languages)}" if facts.languages else ""
    optimizer = "LNGD (layer-wise natural gradient descent)" if is_lngd(args) else f"`{_plain(args.optim)}`"
    return f"{kind}, {origin} for {facts.task.replace('-', ' ')}{languages}, with the optimizer {optimizer}."


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


def _data(facts: CardFacts) -> str:
    config = f", {facts.dataset_config}" if facts.dataset_config else ""
    count = f": {facts.examples:,} examples" if facts.examples else ""
    text = f"{facts.dataset_name}{config}{count}."
    return f"{text}\n\n{facts.attribution.strip()}" if facts.attribution else text


def _settings(args: Any) -> str:
    """The optimizer's settings, then the run's."""
    if is_lngd(args):
        config, lr = lngd_settings(args)
        optimizer = {"optim": "lngd", "lr": lr, **config.to_dict()}
    else:
        optimizer = {"optim": _plain(args.optim), "optim_args": args.optim_args, "lr": args.learning_rate}
        optimizer |= {
            name: getattr(args, name) for name in ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
        }
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
    shown = {name: value for name, value in run.items() if value is not None}
    return f"Optimizer:\n\n```json\n{json.dumps(optimizer, indent=2)}\n```\n\n" + "\n".join(
        f"- {name}: {value}" for name, value in shown.items()
    )


def _loss_table(history: Sequence[Mapping[str, Any]], most: int = 12) -> str:
    """Training and validation loss by step: at most `most` rows, spread evenly, the last among them."""
    rows: dict[int, dict[str, float]] = {}
    for entry in history:
        for key in ("loss", "eval_loss"):
            if key in entry:
                rows.setdefault(entry["step"], {})[key] = entry[key]
    if not rows:
        return ""
    steps = sorted(rows)
    kept = {steps[round(i * (len(steps) - 1) / max(1, most - 1))] for i in range(most)}
    lines = ["| step | training loss | validation loss |", "|---|---|---|"]
    for step in sorted(kept):
        cells = (f"{rows[step][key]:.4f}" if key in rows[step] else "" for key in ("loss", "eval_loss"))
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _folded(command: Sequence[str], width: int = 100) -> str:
    """The command over several lines, broken before options."""
    lines = [""]
    for part in (shlex.quote(part) for part in command):
        if part.startswith("--") and len(lines[-1]) + len(part) > width:
            lines.append("   ")
        lines[-1] += f" {part}"
    return " \\\n".join(lines).strip()


def without_secrets(command: Sequence[str]) -> list[str]:
    """The command with the values of :data:`SECRETS` replaced by ``***``."""
    shown: list[str] = []
    for part in command:
        option, equals, _ = part.partition("=")
        if shown and shown[-1] in SECRETS:
            shown.append("***")
        elif equals and option in SECRETS:
            shown.append(f"{option}=***")
        else:
            shown.append(part)
    return shown


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
