"""Parameter groups that a trainer makes itself: rates of its own, and parameters that are no part of its model.

sentence-transformers trains the weights of a loss beside those of the model; the model alone is what LNGD looks into.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..groups import options_of
from ..optimizer import LNGD

logger = logging.getLogger(__name__)
Groups = list[dict[str, Any]]


def split_groups(model: nn.Module, groups: Sequence[dict[str, Any]]) -> tuple[Groups, Groups]:
    """A trainer's groups as entries of LNGD's `param_groups`, where they have a rate of their own, and as groups of the
    parameters that are not the model's."""
    own, entries, outside = set(model.parameters()), Groups(), Groups()
    for number, group in enumerate(groups):
        params = list(group["params"])
        rate = {"lr": group["lr"]} if "lr" in group else {}
        inside = [p for p in params if p in own]
        if rate and inside:
            entries.append({"params": inside, "name": f"group{number}", **rate})
        others = [p for p in params if p not in own and p.requires_grad]
        if others:
            outside.append({"params": others, **rate})
    return entries, outside


def add_outside(optimizer: LNGD, groups: Groups) -> None:
    """Train parameters that are not the model's by AdamW, as all other parameters are, in groups named ``outside``;
    their gradients, which no DDP averages and `model.zero_grad()` does not reach, are averaged before each step and
    dropped after it."""
    params = [p for group in groups for p in group["params"]]
    if not params:
        return
    config = optimizer.config
    for group in groups:
        for decays in (True, False):
            chosen = [p for p in group["params"] if (p.dim() > 1) is decays]
            options = options_of("fallback" if decays else "fallback_no_decay", config, optimizer.defaults["lr"])
            del options["lr"]
            if chosen:
                optimizer.add_param_group({**group, **options, "params": chosen, "name": "outside"})

    def average(*_: Any) -> None:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # every process takes part
            dist.all_reduce(p.grad.div_(dist.get_world_size()))

    def drop(*_: Any) -> None:
        for p in params:
            p.grad = None

    optimizer.register_step_pre_hook(average)
    optimizer.register_step_post_hook(drop)


def warn_of_untrained(trainer: Any, optimizer: LNGD) -> None:
    """Name the parameters in modules of a trainer, beside its model, that have a gradient and are in no group."""
    known = {p for group in optimizer.param_groups for p in group["params"]} | set(trainer.model.parameters())
    names = [
        f"{where}.{name}"
        for where, module in _modules_of(vars(trainer))
        for name, p in module.named_parameters()
        if p.grad is not None and p not in known
    ]
    if names:
        logger.warning(
            "not trained, though they have a gradient, as they are no part of the model: %s. To have them trained: "
            "%s.get_optimizer_cls_and_kwargs returns them in 'optimizer_dict', or make them a part of the model",
            ", ".join(names),
            type(trainer).__name__,
        )


def _modules_of(attributes: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    for name, value in attributes.items():
        for key, item in value.items() if isinstance(value, dict) else [(None, value)]:
            if isinstance(item, nn.Module):
                yield name if key is None else f"{name}.{key}", item
