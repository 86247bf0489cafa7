"""What each field of `LNGDConfig` accepts, and a weight's dtype."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

FAMILIES = ("lngd", "kfac", "ekfac", "tkfac", "ng+")
FISHERS = ("expected", "sampled", "true", "empirical")
GRADIENT_FISHERS = ("true", "empirical")
DIRECTIONS = ("natural", "polar", "gram")
RATES = ("adaptive", "rms", "trust", "none")
DAMPINGS = ("relative", "paper")
MOMENTUM_ON = ("gradient", "update")
BIASES = ("factor", "fallback")
EMBEDDINGS = ("fallback", "exact", "rotated")
MATRIX_DTYPES = ("auto", "bfloat16", "full")
FACTOR_DTYPES = ("full", "bfloat16")
BF16_UPDATES = ("kahan", "stochastic", "nearest")
ROOTS = ("auto", "eigh", "newton")
CHAINS = ("activation", "full")
HEADS = ("gaussian", "categorical")
PLACEMENTS = ("auto", "spread", "replicated")


def invalid(name: str, value: Any, accepted: str) -> ValueError:
    """The error for a field: names it, the value and what is accepted."""
    return ValueError(f"{name}: got {value!r}, accepted: {accepted}")


def one_of(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of those accepted."""
    if value not in accepted:
        raise invalid(name, value, ", ".join(accepted))


# What other families than LNGD accept of the fields that mean something else to them, or nothing. g² of `expected` and
# `sampled` is known output by output only, without g gᵀ; `polar` and `gram` whiten by Φ; `trust` bounds LNGD's own KL.
_OTHER_FAMILIES: dict[str, tuple[str, ...]] = {
    "fisher": GRADIENT_FISHERS,
    "direction": ("natural",),
    "rate": ("adaptive", "rms", "none"),
}


def fishers_beside(kind: str, family: str) -> tuple[str, ...]:
    """The other values of `fisher` that a family accepts."""
    accepted = FISHERS if family == "lngd" else _OTHER_FAMILIES["fisher"]
    return tuple(other for other in accepted if other != kind)


def check_family(family: str, fields: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the field, if one of `fields` has a value that the family cannot work with."""
    for name, accepted in _OTHER_FAMILIES.items() if family != "lngd" else ():
        if fields[name] not in accepted:
            raise invalid(name, fields[name], f"{', '.join(accepted)} (family={family})")


# Rounding Φ to bfloat16 moves eigenvalues by some hundredths of the mean one: with less damping inverses fail, or are
# those of the rounding (`benchmarks/README.md`).
_LEAST_RHO = 0.3


def check_factor_dtype(factor_dtype: str, damping: str, rho: float) -> None:
    """Raise ValueError if factors are to be kept in bfloat16 and damped by too little for it."""
    if factor_dtype == "bfloat16" and (damping != "relative" or rho < _LEAST_RHO):
        here = f"damping_rho={rho}" if damping == "relative" else f"damping={damping}"
        accepted = f"full, or damping=relative with damping_rho of at least {_LEAST_RHO}"
        raise invalid("factor_dtype", factor_dtype, f"{accepted} (here {here})")


def check_lr(lr: Any) -> None:
    """Raise ValueError unless this is a learning rate: a finite number or a tensor of one, at least 0."""
    number = isinstance(lr, (int, float)) or (isinstance(lr, Tensor) and lr.numel() == 1)
    if not number or not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr: got {lr!r}, accepted: a number (or a tensor of one), at least 0")


def _choice(accepted: tuple[str, ...]) -> Callable[[str, Any], None]:
    return lambda name, value: one_of(name, value, accepted)


def _number(accepted: str, test: Callable[[float], bool]) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not test(value):
            raise invalid(name, value, f"a number {accepted}")

    return check


def _integer(least: int, most: float = math.inf) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            bound = "" if math.isinf(most) else f" and at most {most:d}"
            raise invalid(name, value, f"an integer, at least {least}{bound}")

    return check


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise invalid(name, value, "true or false")


def _auto_or_integer(name: str, value: Any) -> None:
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise invalid(name, value, "auto or an integer, at least 1")


def _regex(name: str, value: Any) -> None:
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise invalid(name, value, f"a regular expression ({error})") from None


def _betas(name: str, value: Any) -> None:
    pair = isinstance(value, tuple) and len(value) == 2
    if not pair or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in value):
        raise invalid(name, value, "two numbers in [0, 1), written 0.9:0.999 in optim_args")


def _optional_rate(name: str, value: Any) -> None:
    if value is not None:
        _number("above 0, or none", lambda x: x > 0)(name, value)


_POSITIVE = _number("above 0", lambda x: x > 0)
_NOT_NEGATIVE = _number("at least 0", lambda x: x >= 0)
_FRACTION = _number("in [0, 1)", lambda x: 0 <= x < 1)

# field → what raises ValueError for a bad value of it.
CHECKS: dict[str, Callable[[str, Any], None]] = {
    "family": _choice(FAMILIES),
    "fisher": _choice(FISHERS),
    "direction": _choice(DIRECTIONS),
    "rate": _choice(RATES),
    "rate_scale": _POSITIVE,
    "rate_mu": _NOT_NEGATIVE,
    "rate_rows": _integer(1),
    "damping": _choice(DAMPINGS),
    "damping_rho": _POSITIVE,
    "damping_min": _POSITIVE,
    "damping_max": _POSITIVE,
    "momentum": _FRACTION,
    "nesterov": _flag,
    "momentum_on": _choice(MOMENTUM_ON),
    "ema_decay": _FRACTION,
    "factor_interval": _integer(1),
    "inverse_interval": _integer(1),
    "stagger": _flag,
    "early_factors": _flag,
    "polar_interval": _auto_or_integer,
    "gram_decay": _FRACTION,
    "matrix_dtype": _choice(MATRIX_DTYPES),
    "factor_dtype": _choice(FACTOR_DTYPES),
    "bf16_update": _choice(BF16_UPDATES),
    "row_decay": _FRACTION,
    "inverse_root": _choice(ROOTS),
    "weight_decay": _NOT_NEGATIVE,
    "weight_decay_scale": _NOT_NEGATIVE,
    "bias": _choice(BIASES),
    "max_factor_dim": _auto_or_integer,
    "embedding": _choice(EMBEDDINGS),
    "exclude": _regex,
    "fallback_lr": _optional_rate,
    "fallback_lr_scale": _POSITIVE,
    "betas": _betas,
    "eps": _POSITIVE,
    "seed": _integer(0, 2**63 - 1),
    "chain": _choice(CHAINS),
    "head": _choice(HEADS),
    "conv_rows": _integer(1),
    "conv_memory": _integer(1),
    "placement": _choice(PLACEMENTS),
}


def check_precision(name: str, weight: Tensor) -> None:
    """Raise ValueError for a weight of float16, by name."""
    if weight.dtype == torch.float16:
        raise ValueError(
            f"{name}: got a weight of torch.float16, whose updates are lost below 6e-8, accepted: torch.float32 (under "
            "torch.autocast and with a GradScaler for fp16) or torch.bfloat16"
        )
