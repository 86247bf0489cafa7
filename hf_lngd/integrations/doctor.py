"""``python -m hf_lngd doctor MODEL``: who owns which parameter, state and products of a step, before any training.

    python -m hf_lngd doctor MODEL [--optim_args name=value,...] [--task auto|translation|image|text|classification]
                                   [--batch_size 8] [--length 128]

MODEL is a folder with a config.json, such a file, or a name on the Hub. Only the configuration is read: weights are
neither loaded nor downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..config import LNGDConfig
from .estimate import estimate
from .training_args import take_lr
from .usage import LOAD_ERRORS, UsageError, UsageParser, blame, option, refuse_if

FACTORIES: dict[str, Any] = {
    "translation": transformers.AutoModelForSeq2SeqLM,
    "image": transformers.AutoModelForImageClassification,
    "text": transformers.AutoModelForCausalLM,
    "classification": transformers.AutoModelForSequenceClassification,
}
MOST_ON_CPU = 50_000_000  # parameters: a larger model is not built on the CPU
_CHANNELS, _IMAGE = 3, 224  # of configurations that tell of neither


@dataclass
class DoctorArguments:
    """What `doctor` accepts after the model."""

    optim_args: str | None = option(None, "as the Trainer's: name=value,name=value")
    task: str = option("auto", f"auto, {', '.join(FACTORIES)}")
    batch_size: int = option(8, "rows of the batch whose products are counted")
    length: int = option(128, "tokens of each row, of texts")


@dataclass(frozen=True)
class Subject:
    """A model in training mode with a batch of its task, whose numbers mean nothing."""

    model: nn.Module
    inputs: dict[str, Tensor]
    batch: str  # its size in words
    notes: tuple[str, ...] = ()  # in what the model is another one than the configuration's

    def loss(self) -> Tensor:
        """Of one forward pass."""
        return self.model(**self.inputs).loss


def doctor(argv: list[str]) -> None:
    """Print the report; raises UsageError, which names the argument."""
    if argv and argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return
    given = repr(argv[0]) if argv else "none"
    missing = f"got {given}, accepted: a folder, a config.json, a Hub name, before any option"
    refuse_if(not argv or argv[0].startswith("-"), "model", missing)
    (args,) = UsageParser(DoctorArguments, prog="python -m hf_lngd doctor").parse(argv[1:])
    for name in ("batch_size", "length"):
        value = getattr(args, name)
        refuse_if(value < 1, name, f"got {value}, accepted: an integer, at least 1")
    try:
        settings = LNGDConfig.from_optim_args(take_lr(args.optim_args)[1])
    except ValueError as error:
        raise UsageError("optim_args", str(error).removeprefix("optim_args: ")) from error
    with blame("model", f"got {given}, which has no configuration that can be read"):
        config = transformers.AutoConfig.from_pretrained(argv[0], trust_remote_code=False)
    task = task_of(config, args.task)
    print(f"{argv[0]}: {look(config, task, args.batch_size, args.length, lambda subject: report(subject, settings))}")


def report(subject: Subject, settings: LNGDConfig) -> str:
    """The routing table, factors, state and products."""
    found, c, kind = estimate(subject.model, subject.loss, settings), settings, type(subject.model).__name__
    total = sum(r.numel for r in found.routes)
    trained = total - sum(r.numel for r in found.routes if r.owner == "frozen")
    lines = [f"{kind}, {total:,} parameters, {trained:,} trained, preset={c.preset}, family={c.family}"]
    lines += [*(f"note: {note}" for note in subject.notes), "", found.table, ""]
    for (width, blocks), (groups, layers) in found.factors.items():
        size = f"{blocks} blocks of {width}" if blocks > 1 else f"width {width}"
        lines.append(f"factors: {groups} for {layers} layers, {size}")
    mib, memory = 1 << 20, found.memory
    kinds = ", ".join(f"{kind} {value / mib:.1f}" for kind, value in memory.items() if value and kind != "total")
    ratio = memory["total"] / max(found.adamw, 1)
    lngd = found.step_flops + found.capture_flops / c.factor_interval + found.inverse_flops / c.inverse_interval
    flops = (found.model_flops, lngd, found.step_flops, found.capture_flops, found.inverse_flops)
    plain, mean, step, capture, inverse = (f"{value / 1e9:,.3f} GFLOP" for value in flops)
    lines += [
        f"state: {memory['total'] / mib:.1f} MiB, {ratio:.2f} × AdamW's {found.adamw / mib:.1f} ({kinds})",
        f"products of a mean step on {subject.batch}: {plain} forward and backward, LNGD {mean}, "
        f"{100 * lngd / max(found.model_flops, 1.0):.1f} % more: {step} each step, {capture} each {c.factor_interval} "
        f"for factors, {inverse} each {c.inverse_interval} for inverses",
        "Products are no seconds: small layers take longer. With larger batches or accumulation the share is smaller.",
    ]
    return "\n".join(lines)


def task_of(config: Any, wanted: str) -> str:
    """The task, or for ``auto`` that of the architecture that the configuration names, else the first that fits; raises
    UsageError where none does."""
    refuse_if(wanted not in ("auto", *FACTORIES), "task", f"got {wanted!r}, accepted: auto, {', '.join(FACTORIES)}")
    fitting: dict[str, set[str]] = {}  # task → classes of such models
    for task, factory in FACTORIES.items():
        found = factory._model_mapping.get(type(config), ())
        if found:
            fitting[task] = {cls.__name__ for cls in (found if isinstance(found, tuple) else (found,))}
    if wanted in fitting:
        return wanted
    others = f"this one can do: {', '.join(fitting) or 'none of them'}"
    field = "task" if fitting else "model"
    refuse_if(wanted != "auto" or not fitting, field, f"got {config.model_type!r} for {wanted}; {others}")
    named = [task for task, names in fitting.items() if names & set(getattr(config, "architectures", None) or ())]
    return (named or list(fitting))[0]


def look(config: Any, task: str, rows: int, length: int, see: Callable[[Subject], Any]) -> Any:
    """What `see` makes of the model: on the meta device, and where its forward reads numbers on the CPU, if small.
    Raises UsageError where neither goes."""
    subject = build(config, task, rows, length)
    try:
        return see(subject)
    except LOAD_ERRORS as error:
        numbers = sum(p.numel() for p in subject.model.parameters())
        what = f"whose forward does not run on the meta device, and {numbers:,} parameters are too many to build"
        refuse_if(numbers > MOST_ON_CPU, "model", f"got {config.model_type!r}, {what} ({error})")
    with blame("model", f"got {config.model_type!r}, whose forward fails"):
        return see(build(config, task, rows, length, "cpu"))


def build(config: Any, task: str, rows: int, length: int, device: str = "meta") -> Subject:
    """The model with random weights and a batch of `rows`, of texts of `length` tokens; UsageError: it cannot be."""
    wanted = config.architectures = list(getattr(config, "architectures", None) or [])  # the Auto classes need a list
    half = getattr(config, "dtype", None) in (torch.float16, "float16")
    # sdpa looks into the masks, which the meta device has not got; the products are the same
    options = {"attn_implementation": "eager", "trust_remote_code": False, **({"dtype": torch.float32} if half else {})}
    with blame("model", f"got {config.model_type!r}, which cannot be built"), torch.device(device):
        model = FACTORIES[task].from_config(config, **options)
    kind, notes = type(model).__name__, []
    if wanted and kind not in wanted:
        which = f"{', '.join(wanted)}, which the configuration names and task={task} does not have"
        notes.append(f"{kind} stands for {which}")
    if half:
        what = "LNGD takes no such weights (fp16: by autocast)"
        notes.append(f"built in float32, not the configuration's float16: {what}")
    batch, inputs = batch_of(config, task, rows, length, device, model.dtype)
    return Subject(model.train(), inputs, batch, tuple(notes))


def batch_of(
    config: Any, task: str, rows: int, length: int, device: str, dtype: torch.dtype
) -> tuple[str, dict[str, Tensor]]:
    """A batch in words, and the model's inputs with labels; images are of that dtype, no text is longer than a model
    has positions."""
    if task == "image":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or _IMAGE
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (rows, getattr(vision, "num_channels", _CHANNELS), height, width)
        inputs = {"pixel_values": torch.zeros(shape, device=device, dtype=dtype)}
        return f"{rows} images of {height} × {width}", inputs | {"labels": _classes(config, rows, device)}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    bounds = [getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    most = min((bound for bound in bounds if isinstance(bound, int) and bound > 0), default=length)
    words = f"{rows} texts of {min(length, most)} tokens" + " (it has no more positions)" * (most < length)
    ids = torch.ones(rows, min(length, most), dtype=torch.int64, device=device)
    if task == "classification":
        end = getattr(config, "eos_token_id", None)
        if isinstance(end, int) and end >= 0:  # Bart's kind classify by it
            ids[:, -1] = end
        return words, {"input_ids": ids, "labels": _classes(config, rows, device)}
    return words, {"input_ids": ids, "labels": ids} | ({"decoder_input_ids": ids} if task == "translation" else {})


def _classes(config: Any, rows: int, device: str) -> Tensor:
    """Labels of a classification in the form of its `problem_type`: a class [rows], or numbers [rows, labels]."""
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification" or (problem == "regression" and config.num_labels > 1):
        return torch.zeros(rows, config.num_labels, device=device)
    return torch.zeros(rows, dtype=torch.float32 if problem == "regression" else torch.int64, device=device)
