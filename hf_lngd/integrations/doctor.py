"""``python -m hf_lngd doctor MODEL``: who owns which parameter, state and products of a step, before any training.

    python -m hf_lngd doctor MODEL [--optim_args name=value,...] [--task auto|translation|image|text|classification]
                                   [--batch_size 8] [--length 128]

MODEL is a folder with a config.json, such a file, or a name on the Hub. Only the configuration is read: weights are
neither loaded nor downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import transformers

from ..config import LNGDConfig
from ..estimate import Estimate, estimate
from .doctor_model import FACTORIES, Subject, load, look, task_of
from .stock import version_problem
from .training_args import take_lr
from .usage import UsageError, UsageParser

MIB = 1 << 20


@dataclass
class DoctorArguments:
    """What `doctor` accepts after the model."""

    optim_args: str | None = field(default=None, metadata={"help": "as the Trainer's: name=value,name=value"})
    task: str = field(default="auto", metadata={"help": f"auto, {', '.join(FACTORIES)}"})
    batch_size: int = field(default=8, metadata={"help": "rows of the batch whose products are counted"})
    length: int = field(default=128, metadata={"help": "tokens of each row, of texts"})


def doctor(argv: list[str]) -> None:
    """Print the report.

    Raises:
        UsageError: names the argument.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        if not argv:
            raise UsageError("model", "got none, accepted: a folder, a config.json, a Hub name")
        return
    if argv[0].startswith("-"):
        raise UsageError("model", f"got {argv[0]!r}, accepted: a folder, a config.json, a Hub name, before any option")
    (args,) = UsageParser(DoctorArguments, prog="python -m hf_lngd doctor").parse(argv[1:])
    for name in ("batch_size", "length"):
        if getattr(args, name) < 1:
            raise UsageError(name, f"got {getattr(args, name)}, accepted: an integer, at least 1")
    try:
        settings = LNGDConfig.from_optim_args(take_lr(args.optim_args)[1])
    except ValueError as error:
        raise UsageError("optim_args", str(error).removeprefix("optim_args: ")) from error
    config = load(argv[0])
    task = task_of(config, args.task)

    def see(subject: Subject) -> str:
        return report(subject, estimate(subject.model, subject.loss, settings))

    text = look(config, task, args.batch_size, args.length, see)
    print(f"{argv[0]}: {text}\n\n{versions()}")


def versions() -> str:
    """What runs here, and whether `register()` knows it."""
    problem = version_problem()
    stock = "stock Trainers too (hf_lngd.register)" if problem is None else f"no stock Trainers: {problem}"
    return f"torch {torch.__version__}, transformers {transformers.__version__}: LNGDTrainer, {stock}"


def report(subject: Subject, found: Estimate) -> str:
    """The routing table, factors, state and products."""
    memory, c = found.memory, found.config
    total = sum(r.numel for r in found.routes)
    lines = [f"{subject.kind}, {total:,} parameters, {found.trained:,} trained, preset={c.preset}, family={c.family}"]
    lines += [f"note: {note}" for note in subject.notes]
    lines += ["", found.table, ""]
    for size in found.factors:
        blocks = f"{size.blocks} blocks of {size.width}" if size.blocks > 1 else f"width {size.width}"
        lines.append(f"factors: {size.groups} for {size.layers} layers, {blocks}")
    kinds = ", ".join(f"{kind} {value / MIB:.1f}" for kind, value in memory.items() if value and kind != "total")
    ratio = memory["total"] / max(found.adamw, 1)
    lines.append(f"state: {memory['total'] / MIB:.1f} MiB, {ratio:.2f} × AdamW's {found.adamw / MIB:.1f} ({kinds})")
    share = found.lngd_flops / max(found.model_flops, 1.0)
    lines.append(
        f"products of a mean step on {subject.batch}: {_flops(found.model_flops)} forward and backward, LNGD "
        f"{_flops(found.lngd_flops)}, {100 * share:.1f} % more: {_flops(found.step_flops)} each step, "
        f"{_flops(found.capture_flops)} each {c.factor_interval} for factors, {_flops(found.inverse_flops)} each "
        f"{c.inverse_interval} for inverses"
    )
    lines.append(
        "Products are no seconds: small layers take longer. With larger batches or accumulation the share is smaller."
    )
    return "\n".join(lines)


def _flops(value: float) -> str:
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value / 1e6:.1f} MFLOP"
