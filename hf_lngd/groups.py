"""The parameter groups: which there are, by name, their rates and decays, and what a group that is added may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import LNGDConfig
from .routing import EXACT_EMBEDDING, FALLBACK_OWNER, LNGD_OWNER, ROTATED_EMBEDDING, Route

# By the name of its group LNGD knows what to do with a parameter.
OWN_GROUPS = ("lngd", "lngd_bias", "embedding", "fallback", "fallback_no_decay")


def group_of(r: Route) -> str | None:
    """The name of a parameter's group; None: it is not trained."""
    if r.reason in (EXACT_EMBEDDING, ROTATED_EMBEDDING):
        return "embedding"
    if r.owner == LNGD_OWNER:
        return "lngd" if r.decays else "lngd_bias"
    if r.owner == FALLBACK_OWNER:
        return "fallback" if r.decays else "fallback_no_decay"
    return None


def make_groups(
    routes: Sequence[Route], parameters: Mapping[str, nn.Parameter], c: LNGDConfig, lr: float | Tensor
) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """The groups, LNGD's layers first (Trainer logs the first one's rate), and the names of each one's parameters.

    Raises:
        ValueError: there is nothing to train.
    """
    fallback_lr = lr * c.fallback_lr_scale if c.fallback_lr is None else c.fallback_lr
    groups: dict[str, dict[str, Any]] = {}
    names: dict[str, list[str]] = {}
    for r in routes:
        name = group_of(r)
        if name is None:
            continue
        own_lr = lr if name in ("lngd", "lngd_bias") else fallback_lr
        decay = c.weight_decay * (c.weight_decay_scale if name == "lngd" else 1.0) if r.decays else 0.0
        group = groups.setdefault(name, {"params": [], "name": name, "lr": own_lr, "weight_decay": decay})
        group["params"].append(parameters[r.parameter])
        names.setdefault(name, []).append(r.parameter)
    if not groups:
        raise ValueError("model: got no parameter that requires a gradient, accepted: at least one")
    return sorted(groups.values(), key=lambda group: group["name"] != "lngd"), names


def check_added(name: Any) -> None:
    """Raise ValueError for a later group by a name of LNGD's own, such as a copy of one with other parameters: no
    layer or table is known to own them, and rate and decay of an own group mean something else there."""
    if name in OWN_GROUPS:
        raise ValueError(
            f"param_groups: name: got {name!r}, one of LNGD's own groups ({', '.join(OWN_GROUPS)}), accepted: "
            "another name or none; parameters added later are AdamW's, at the lr and weight_decay of their group"
        )


def unshare_rate(group: dict[str, Any]) -> None:
    """Give a group whose rate is a tensor one of its own: what changes rates in place does so group by group, and would
    change one that several share as many times (torch's ReduceLROnPlateau)."""
    if isinstance(group["lr"], Tensor):
        group["lr"] = group["lr"].clone()


def bias_share(groups: Mapping[str, Mapping[str, Any]]) -> float | Tensor:
    """By what a bias's column in its layer's update is multiplied to be at the rate of ``lngd_bias``.

    Where the rate of ``lngd`` is 0 there is no update that this could be a share of: the column is left as it is.
    """
    if "lngd_bias" not in groups:
        return 1.0
    lr, own = groups["lngd"]["lr"], groups["lngd_bias"]["lr"]
    if isinstance(lr, Tensor):
        return torch.where(lr > 0, own / lr, 1.0)
    return own / lr if lr else 1.0
