"""Parameter groups: which there are, what a user's entries make of them, and the rates of each parameter in a step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import DECAY_FLOOR, LAYER_DECAY, OTHER_DECAY, LNGDConfig
from .layers import Layer
from .linalg import state_dtype
from .routing import Routing

Rate = float | Tensor
KINDS = ("lngd", "lngd_bias", "embedding", "fallback", "fallback_no_decay")
# Decay of the running mean square of each row of a layer's direction (Li et al. 2025, NorMuon): betas[1] of the group.
ROW_DECAY = 0.95
# What an entry of a user may say.
ENTRY_KEYS = {"params", "name", "lr", "lr_scale", "weight_decay", "decay_floor", "momentum", "betas", "eps"}


def check_lr(lr: Any) -> None:
    """Raise ValueError unless this is a learning rate: a finite number or a tensor of one, at least 0."""
    number = isinstance(lr, (int, float)) or (isinstance(lr, Tensor) and lr.numel() == 1)
    if not number or not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr: got {lr!r}, accepted: a number (or a tensor of one), at least 0")


def check_decay(group: dict[str, Any]) -> None:
    """Raise ValueError for a rate at which weight decay takes more than half of the weights in a step."""
    share = float(group["lr"]) * group["lr_scale"] * group["weight_decay"]
    if share > 0.5:
        raise ValueError(
            f"lr: got {float(group['lr']):g}, at which weight decay takes {100 * share:.0f} % of weights in each step "
            f"(lr_scale {group['lr_scale']:g}, weight_decay {group['weight_decay']:g}), accepted: at most 50 %"
        )


def options_of(kind: str, config: LNGDConfig, lr: Rate, weight_decay: float | None = None) -> dict[str, Any]:
    """What a group has of its parameters' kind, where it does not say so itself. Another kind than `KINDS`: parameters
    that are no part of the model as it was, which do not decay. `weight_decay`: None: the config's."""
    of_layers, betas = kind in ("lngd", "lngd_bias"), config.betas
    if of_layers or kind == "embedding":
        betas = (config.momentum, ROW_DECAY if of_layers else betas[1])
    decay, floor = config.weight_decay if weight_decay is None else weight_decay, 0.0
    if decay == "auto":
        decay, floor = (LAYER_DECAY, DECAY_FLOOR) if kind == "lngd" else (OTHER_DECAY, 0.0)
    decay = decay if kind in ("lngd", "embedding", "fallback") else 0.0
    lr_scale = 1.0 if of_layers or kind not in KINDS else config.fallback_lr_scale
    rates = {"lr": lr, "lr_scale": lr_scale, "weight_decay": decay, "decay_floor": floor}
    return {**rates, "betas": betas, "eps": config.eps}


def make_groups(
    routing: Routing, config: LNGDConfig, lr: Rate, entries: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The groups, LNGD's layers first (Trainer logs the first one's rate).

    Args:
        entries: a user's, see `LNGD`; one group is made for each of them and kind of parameter in it. What is in no
            entry is in the default groups.

    Raises:
        ValueError: there is nothing to train; an entry that matches nothing, or what another one has; a rate that is
            too high for its weight decay."""
    trained = routing.trained()
    if not trained:
        raise ValueError("model: got no parameter that requires a gradient, accepted: at least one")
    entry_of: dict[str, int] = {}
    for number, entry in enumerate(entries):
        for name in _names_in(entry, number, routing):
            if name in entry_of:
                raise ValueError(
                    f"param_groups: parameter '{name}' is in entries {entry_of[name]} and {number}, accepted: in one"
                )
            entry_of[name] = number
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    for r in routing.routes:
        if r.kind is not None:
            number = entry_of.get(r.parameter, -1)
            entry = {"name": number, **entries[number]} if number >= 0 else {}
            name = f"{entry['name']}.{r.kind}" if entry else r.kind
            options = options_of(r.kind, config, entry.pop("lr", lr), entry.pop("weight_decay", None))
            group = groups.setdefault((number, r.kind), {**options, **entry, "name": name, "params": []})
            group["params"].append(trained[r.parameter])
    for group in groups.values():
        check_decay(group)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[1] != "lngd", key[0] >= 0))]


def _names_in(entry: dict[str, Any], number: int, routing: Routing) -> list[str]:
    """The names of the trained parameters in an entry."""
    if not isinstance(entry, dict) or "params" not in entry:
        raise ValueError(f"param_groups: entry {number}: got {entry!r}, accepted: a dict with the key 'params'")
    if unknown := sorted(set(entry) - ENTRY_KEYS):
        accepted = ", ".join(sorted(ENTRY_KEYS))
        raise ValueError(f"param_groups: entry {number}: got the key {unknown[0]!r}, accepted: {accepted}")
    if "lr" in entry:
        check_lr(entry["lr"])
    decay = entry.get("weight_decay", 0.0)
    if not isinstance(decay, (int, float)) or not decay >= 0:
        raise ValueError(f"param_groups: entry {number}: weight_decay must be non-negative, got {decay}")
    params, trained = entry["params"], routing.trained()
    if isinstance(params, str):
        try:
            names = [name for name in trained if re.search(params, name)]
        except re.error as error:
            raise ValueError(
                f"param_groups: entry {number}: params: {params!r} is no regular expression ({error})"
            ) from None
        if not names:
            raise ValueError(f"param_groups: entry {number}: no trained parameter has a name that {params!r} matches")
        return names
    name_of = {id(p): name for name, p in routing.parameters.items()}
    names = []
    for item in [params] if isinstance(params, Tensor) else params:
        name = item if isinstance(item, str) else name_of.get(id(item))
        if name not in routing.parameters:
            what = repr(item) if isinstance(item, str) else "a tensor that is no parameter of the model"
            raise ValueError(f"param_groups: entry {number}: got {what}, accepted: names or parameters of the model")
        if name in trained:
            names.append(name)
    return names


@dataclass(frozen=True)
class Options:
    """What a group says of its parameters in this step: `lr` is the effective rate, lr · lr_scale, and `peak_lr` the
    highest one of its schedule, as far as that has said so; `momentum` τ or β₁; `decay_floor`: see `norms`."""

    lr: Rate
    weight_decay: float
    momentum: float
    beta2: float
    eps: float
    decay_floor: float = 0.0
    peak_lr: Rate = 0.0

    @classmethod
    def of(cls, group: dict[str, Any]) -> Options:
        """Those of a group; a key ``momentum`` stands above betas[0]."""
        beta1, beta2 = group["betas"]
        lr, peak = group["lr"] * group["lr_scale"], _peak_of(group) * group["lr_scale"]
        rates = lr, group["weight_decay"], group.get("momentum", beta1), beta2, group["eps"]
        return cls(*rates, group.get("decay_floor", 0.0), peak)


def _peak_of(group: dict[str, Any]) -> Rate:
    """The highest rate that is known of: torch's schedulers write down where they began, and some their peak."""
    known = [group[key] for key in ("lr", "initial_lr", "max_lr") if key in group]
    # to compare tensors would wait for the device
    return known[-1] if any(isinstance(rate, Tensor) for rate in known) else max(known)


class StepOptions:
    """What the groups say in one step: of a parameter ``options[parameter]``, of each group `groups`.

    Raises:
        ValueError: a parameter is in two groups."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.groups = [Options.of(group) for group in groups]
        self._index: dict[nn.Parameter, int] = {}
        for number, group in enumerate(groups):
            for parameter in group["params"]:
                if parameter in self._index:
                    raise ValueError(
                        f"param_groups: a parameter {list(parameter.shape)} is in groups {self._index[parameter]} and "
                        f"{number}, accepted: in one"
                    )
                self._index[parameter] = number

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._index)

    def __contains__(self, parameter: Any) -> bool:
        return parameter in self._index

    def __getitem__(self, parameter: Any) -> Options:
        return self.groups[self._index[parameter]]

    def of(self, layers: Sequence[Layer], name: str) -> Any:
        """An option of these layers: a number, or [n] where they differ."""
        return alike((getattr(self[layer.weight], name) for layer in layers), layers[0].weight)


def alike(values: Iterable[Rate], weight: Tensor) -> Rate:
    """Values of layers, as one number where they are the same, else as a tensor [n] for the state of `weight`."""
    values = list(values)
    first = values[0]
    if all(value is first for value in values):
        return first
    dtype, device = state_dtype(weight.dtype), weight.device
    if not any(isinstance(value, Tensor) for value in values):
        same = all(value == first for value in values)
        return first if same else torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
    return torch.stack([torch.as_tensor(value).to(device, dtype) for value in values])
