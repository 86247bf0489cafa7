"""What a run with LNGD says at its start: who has which parameter, what weight decay does, what a step costs."""

from __future__ import annotations

import logging
import math
from collections import Counter
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..layers import factor_blocks
from ..optimizer import LNGD
from ..torch_internals import local
from .forecast import Work, counting, step_to_adamw
from .given_groups import warn_of_untrained
from .training_args import rate_is_untouched

logger = logging.getLogger(__name__)
DEAR = 1.5  # a step that takes so many of AdamW's or more is worth a warning
MIB = 1 << 20
_MOST_RATES = 10_000  # of a schedule that are added up


def tell_at_start(optimizer: LNGD, model: nn.Module, args: TrainingArguments, trainer: Any = None) -> None:
    """Print the block once, after the first step: when the batch, the state and what follows the layers are known.

    Args:
        trainer: whose scheduler and number of steps are asked then, and what beside its model is not trained; None: not
            known.
    """
    counted = ExitStack()
    work = counted.enter_context(counting(model, optimizer))

    def tell(*_: Any) -> None:
        counted.close()
        handle.remove()
        if args.process_index == 0:
            schedule = () if trainer is None else (trainer.lr_scheduler, trainer.state.max_steps)
            lines = [report(optimizer, *schedule), cost_line(optimizer, work, args), rate_line(args)]
            print("\n".join(filter(None, lines)), flush=True)
            if trainer is not None:
                warn_of_untrained(trainer, optimizer)

    handle = optimizer.register_step_post_hook(tell)


def report(optimizer: LNGD, scheduler: Any = None, steps: int = 0) -> str:
    """Who has which parameter, what weight decay takes, factors and state of an optimizer that has made a step."""
    named = [(group["name"], p) for group in optimizer.param_groups for p in group["params"]]
    outside = [p for name, p in named if name == "outside"]  # see `given_groups`
    lines = [optimizer.routing_table()]
    if outside:
        total = sum(p.numel() for p in outside)
        lines.append(f"Not the model's, trained by AdamW: {len(outside)} tensors, {total:,} parameters.")
    lines += [decay_line(optimizer, scheduler, steps), factors_line(optimizer)]
    memory = optimizer.memory_usage()
    kinds = ", ".join(f"{kind} {size / MIB:.1f}" for kind, size in memory.items() if size and kind != "total")
    # of torch's AdamW, in the weights' own dtype
    adamw = sum(2 * local(p).nbytes + 4 for _, p in named)
    ratio = memory["total"] / max(adamw, 1)
    lines.append(f"State of a process: {memory['total'] / MIB:.1f} MiB ({kinds}), {ratio:.2f} of AdamW's.")
    return "\n".join(lines)


def factors_line(optimizer: LNGD) -> str:
    """How many factors of which widths there are."""
    core, sizes = optimizer.core, Counter[int]()
    for group in core.built.topology.groups:
        layer = core.capture.layers[group.name]
        blocks, width = factor_blocks(layer, core.config.max_factor_dim)
        sizes[width] += layer.units * blocks
    return (
        f"Factors: {', '.join(f'{sizes[width]} of width {width}' for width in sorted(sizes, reverse=True)) or 'none'}."
    )


def decay_line(optimizer: LNGD, scheduler: Any = None, steps: int = 0) -> str:
    """What weight decay takes of each kind of parameter: in all steps of a run, if its schedule is known."""
    total, kinds = _sum_of(scheduler, steps), dict[str, list[str]]()
    for group in optimizer.param_groups:
        rate, floor = group["lr_scale"] * group["weight_decay"], group["decay_floor"]
        if not rate:
            continue
        said = f"{rate:.3g} · lr a step" + (f", ends at {100 * floor:.0f} % of the first norm" if floor else "")
        if total is not None:
            lost = -math.expm1(-rate * float(group.get("initial_lr", group["lr"])) * total)
            said = f"up to {100 * min(lost, 1 - floor):.3g} % ({said})"
        kinds.setdefault(said, []).append(group["name"])
    over = "" if total is None else f" in this run ({steps:,} steps)"
    takes = "; ".join(f"of {', '.join(names)} {said}" for said, names in kinds.items())
    return f"Weight decay takes of the weights' norms{over}: {takes or 'nothing'}."


def _sum_of(scheduler: Any, steps: int) -> float | None:
    """Σ lr_t over a run, in units of the first rate; None: no schedule that can be asked without being stepped."""
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    factors = getattr(inner, "lr_lambdas", None)
    if not factors or steps <= 0:
        return None
    stride = -(-steps // _MOST_RATES)
    return math.fsum(factors[0](step) * min(stride, steps - step) for step in range(0, steps, stride))


def cost_line(optimizer: LNGD, work: Work, args: TrainingArguments) -> str:
    """Seconds of a step beside AdamW's; "" where there is no forecast. Warns where it is dear."""
    ratio = step_to_adamw(optimizer, work)
    if ratio is None:
        return ""
    if ratio > DEAR:
        times = math.ceil((ratio - 1) / 0.25)
        logger.warning(
            "a step takes about %.1f of AdamW's with batches of this size: with %d times as large ones, or "
            "gradient_accumulation_steps=%d, %.1f (see docs/tuning.md)",
            ratio,
            times,
            args.gradient_accumulation_steps * times,
            step_to_adamw(optimizer, work, times),
        )
    every = optimizer.core.interval
    turns = f" Each layer is updated in one of {every} steps (update_interval)." if every > 1 else ""
    return f"A step takes about {ratio:.1f} of AdamW's here, by its matmuls.{turns}"


def rate_line(args: TrainingArguments) -> str:
    """What to try in place of a learning rate that nobody chose."""
    if not rate_is_untouched(args):
        return ""
    return (
        f"The learning rate is the Trainer's default, {args.learning_rate:g}: try one that a sweep found for AdamW on "
        "this task, or, if there is none, 3e-4 to 2e-3."
    )
