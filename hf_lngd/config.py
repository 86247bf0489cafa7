"""`LNGDConfig`: every option of the optimizer, each in one place, with its default, its check and its help; presets;
options as text (``--optim_args``)."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

FAMILIES = ("lngd", "kfac", "ekfac", "tkfac", "ng+")
FISHERS = ("expected", "sampled", "true", "empirical")
GRADIENT_FISHERS = ("true", "empirical")

# The value of an option that was not given: `LNGDConfig.__post_init__` puts the preset's in its place.
_FROM_PRESET: Any = type("FromPreset", (), {"__repr__": lambda self: "<preset>"})()


def invalid(name: str, value: Any, accepted: str) -> ValueError:
    """The error for an option: names it, the value and what is accepted."""
    return ValueError(f"{name}: got {value!r}, accepted: {accepted}")


Check = Callable[[str, Any], None]


def _must(accepted: str, test: Callable[[Any], bool]) -> Check:
    """A check: (name, value) → None, or ValueError. What a parser cannot read is left to it as text."""

    def check(name: str, value: Any) -> None:
        if not test(value):
            raise invalid(name, value, accepted)

    return check


def _choice(*accepted: str) -> Check:
    return _must(", ".join(accepted), lambda value: value in accepted)


def _number(accepted: str, test: Callable[[float], bool]) -> Check:
    return _must(f"a number {accepted}", lambda x: _is(x, int, float) and math.isfinite(x) and test(x))


def _integer(least: int, most: float = math.inf) -> Check:
    bound = "" if math.isinf(most) else f" and at most {most:d}"
    return _must(f"an integer, at least {least}{bound}", lambda x: _is(x, int) and least <= x <= most)


def _pair(accepted: str, test: Callable[[float, float], bool]) -> Check:
    return _must(accepted, lambda x: _is(x, tuple) and len(x) == 2 and all(_is(y, int, float) for y in x) and test(*x))


def _is(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _regex(name: str, value: Any) -> None:
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise invalid(name, value, f"a regular expression ({error})") from None


_POSITIVE = _number("above 0", lambda x: x > 0)
_FRACTION = _number("in [0, 1)", lambda x: 0 <= x < 1)
_DAMPING = _must("paper or a number above 0", lambda x: x == "paper" or (_is(x, int, float) and 0 < x < math.inf))
_AUTO = _must("auto or an integer, at least 1", lambda x: x == "auto" or (_is(x, int) and x >= 1))
_DECAY = _must("auto or a number, at least 0", lambda x: x == "auto" or (_is(x, int, float) and 0 <= x < math.inf))
_BETAS = _pair("two numbers in [0, 1), written 0.9:0.999 in optim_args", lambda a, b: 0 <= a < 1 and 0 <= b < 1)
_BOUNDS = _pair("two numbers, 0 < ν1 ≤ ν2, written 1e-5:1e-2 in optim_args", lambda a, b: 0 < a <= b)


def _option(default: Any, check: Check, help: str) -> Any:
    """An option: the default of the preset ``fast``, what is accepted, what it means."""
    return field(default=_FROM_PRESET, metadata={"default": default, "check": check, "help": help})


# Weight decay where none is given: of LNGD's layers, none below this share of their first norm (see `decay`), and of
# all other parameters.
LAYER_DECAY, DECAY_FLOOR, OTHER_DECAY = 1.5, 0.5, 0.1

# Presets: what differs from the defaults below, which are those of ``fast``.
_PAPER: dict[str, Any] = {
    "fisher": "sampled", "direction": "natural", "rate": "adaptive", "damping": "paper",
    "momentum": 0.9, "momentum_on": "update", "factor_interval": 100, "inverse_interval": 100,
    "weight_decay": 0.004, "fallback_lr_scale": 1.0,
    "bias": "factor", "max_factor_dim": 1 << 20, "embedding": "fallback",  # factors are whole
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": _PAPER,
    "lngd_sample": _PAPER | {"rate": "none"},
    "lngd_lr": _PAPER | {"fisher": "true"},
}

# Options of other families than LNGD. g² of `expected` and `sampled` is known output by output only, without g gᵀ, and
# `polar` whitens by Φ. The loss's own gradients cost no second pass, as in public K-FAC: the default.
_OTHER_FAMILIES: dict[str, tuple[str, ...]] = {"fisher": ("empirical", "true"), "direction": ("natural",)}
_FAMILY_DEFAULTS = {"fisher": "empirical", "direction": "natural"}


@dataclass(frozen=True, kw_only=True)
class LNGDConfig:
    """The options of :class:`hf_lngd.LNGD`. One that is not given takes the family's value, or else the preset's.

    Symbols and equation numbers are those of Liu et al., "A Layer-Wise Natural Gradient Optimizer for Training Deep
    Neural Networks", NeurIPS 2024 (below: the paper). Each option's meaning stands in its field's metadata, and is
    printed by ``python -m hf_lngd --options``.

    Raises:
        ValueError: a bad value; names the option, the value and what is accepted."""

    preset: str = "fast"
    family: str = "lngd"
    # fmt: off
    fisher: str = _option("expected", _choice(*FISHERS),
        "where g² of a layer comes from. expected: the mean over the layer's own predictive distribution N(φ(s), I), "
        "no second pass. sampled: one draw of it a position (the paper). true: labels drawn from the model, needs "
        "LNGD.fisher_backward. empirical: the loss's gradients.")
    direction: str = _option("polar", _choice("polar", "natural"),
        "polar: the momentum, orthogonalised in coordinates in which the layer's inputs and gradients are white; φ' is "
        "taken as 1. natural: Ψ⁻¹GΦ⁻¹ (the paper), with φ' of the activation that follows the layer.")
    whiten: str = _option("both", _choice("both", "inputs", "none"),
        "of polar: both: by Φ and a Ψ of gradients; inputs: by Φ alone; none: neither, as in Muon (for comparison).")
    rate: str = _option("rms", _choice("rms", "adaptive", "none"),
        "the layer's rate α_l. rms: rate_scale / RMS(D). adaptive: Eq. 12-13 over rows of the batch, of more than 16 "
        "one in 8 of the others (keeps these inputs and gradients of each layer, each step). none: 1.")
    rate_scale: float = _option(1.0, _POSITIVE,
        "κ of rms. 1: the size of AdamW's first steps, with which AdamW's rates suit LNGD; 0.2: its settled size "
        "(Muon's match_rms_adamw), for rates five times as high.")
    damping: float | str = _option(1.0, _DAMPING,
        "λ, which is added to a factor before it is inverted. A number ρ: ρ · tr/dim; paper: clamp(tr/dim, ν1, ν2).")
    damping_bounds: tuple[float, float] = _option((1e-5, 1e-2), _BOUNDS, "(ν1, ν2) of damping=paper.")
    momentum: float = _option(0.8, _FRACTION, "τ. A parameter group's betas[0] starts with it.")
    momentum_on: str = _option("gradient", _choice("gradient", "update"),
        "gradient averages G before it is preconditioned, and looks one step ahead (Nesterov); update averages α_l D "
        "(Algorithm 1).")
    ema_decay: float = _option(0.95, _FRACTION, "ε of Eq. 14, the weight of the old factor.")
    factor_interval: int = _option(20, _integer(1), "T_FIM, steps between two updates of the factors.")
    inverse_interval: int = _option(20, _integer(1), "T_INV, steps between two inverses of the factors.")
    update_interval: int | str = _option("auto", _AUTO,
        "steps between two updates of a layer: layers take turns, and in its turn a layer goes so many times as far. "
        "Every gradient enters the momentum. auto: the least, up to 4, with which updates are at most a third of the "
        "arithmetic of forward and backward, in the mean of the factor steps so far. Above 1 only with "
        "direction=polar, rate=rms or none, and momentum_on=gradient.")
    weight_decay: float | str = _option("auto", _DECAY,
        "decoupled, never on norms and biases. A number: as with AdamW, for all. auto: 1.5 for LNGD's layers, none "
        "below half of the norm that their weights began with; 0.1 for all other parameters.")
    bias: str = _option("fallback", _choice("factor", "fallback"),
        "factor: a last column of the layer's factor; fallback: AdamW.")
    max_factor_dim: int | str = _option("auto", _AUTO,
        "a wider Φ is cut into equal diagonal blocks no wider than this; auto: min(fan-in, fan-out) of the layer, but "
        "64 at the least.")
    embedding: str = _option("exact", _choice("exact", "fallback"),
        "exact: Φ of one-hot inputs, that is token frequency; fallback: AdamW. Both at the rate of all other "
        "parameters.")
    exclude: str = _option("", _regex,
        "a regular expression; parameters whose name it matches (re.search) go to AdamW.")
    fallback_lr_scale: float = _option(3.0, _POSITIVE,
        "all parameters that are not in LNGD's layers have this multiple of lr. Embeddings, norms and biases learn "
        "best at about three times the matrices' rate, with AdamW, too.")
    betas: tuple[float, float] = _option((0.9, 0.999), _BETAS, "AdamW's, of all other parameters.")
    eps: float = _option(1e-8, _POSITIVE, "AdamW's, of all other parameters.")
    seed: int = _option(0, _integer(0, 2**63 - 1), "of the draws of sampled and true; the user's random state is kept.")
    # fmt: on

    def __post_init__(self) -> None:
        _choice(*PRESETS)("preset", self.preset)
        _choice(*FAMILIES)("family", self.family)
        given = tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not _FROM_PRESET)
        object.__setattr__(self, "_given", given)
        preset = PRESETS[self.preset] | (_FAMILY_DEFAULTS if self.family != "lngd" else {})
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if value is _FROM_PRESET:
                value = preset.get(name, option["default"])
            if isinstance(value, list):  # JSON has no tuples
                value = tuple(value)
            object.__setattr__(self, name, value)
            option["check"](name, value)
        for name, accepted in _OTHER_FAMILIES.items() if self.family != "lngd" else ():
            if getattr(self, name) not in accepted:
                raise invalid(name, getattr(self, name), f"{', '.join(accepted)} (family={self.family})")
        if self.update_interval not in (1, "auto") and not self.takes_turns:
            allowed = "auto or 1, but with direction=polar, rate=rms or none and momentum_on=gradient"
            raise invalid("update_interval", self.update_interval, allowed)

    @property
    def takes_turns(self) -> bool:
        """Whether a layer may rest in some steps: the others need each step's update, or its samples."""
        return self.direction == "polar" and self.rate != "adaptive" and self.momentum_on == "gradient"

    @classmethod
    def from_optim_args(cls, text: str | None, **overrides: Any) -> LNGDConfig:
        """Parse ``--optim_args``, e.g. ``"factor_interval=10,preset=fast,betas=0.9:0.98"``.

        A comma inside a value (``exclude=a{1,2}``) is written ``\\,``. `overrides` stand above the preset and below
        `text`.

        Raises:
            ValueError: an item without ``=``, an unknown name (the closest are listed), a value of the wrong kind."""
        return cls(**{**overrides, **_parse_items(text or "")})

    def with_fields(self, **fields: Any) -> LNGDConfig:
        """These options with `fields` on top. Under another preset or family only what was given by name stays.

        Raises:
            ValueError: as the class; `preset` or `family` for options that were given whole (``LNGDConfig(**d)``),
                in which it would change nothing."""
        given: tuple[str, ...] = self._given  # type: ignore[attr-defined]
        mine = self.to_dict()
        for name in ("preset", "family"):
            if fields.get(name, mine[name]) != mine[name] and set(mine) == set(given):
                raise invalid(name, fields[name], f"{mine[name]} on top of settings that name every field")
        return type(self)(**{name: mine[name] for name in given} | fields)

    def to_optim_args(self) -> str:
        """The shortest text that :meth:`from_optim_args` makes these options of: the preset, and what differs."""
        family = {} if self.family == "lngd" else {"family": self.family}
        plain = type(self)(preset=self.preset, **family).to_dict()  # type: ignore[arg-type]
        changed = {name: value for name, value in self.to_dict().items() if value != plain[name]}
        items = {"preset": self.preset, **family, **changed}
        return ",".join(f"{name}={_text_of(value)}" for name, value in items.items())

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values (tuples become lists), ready for JSON and for ``LNGDConfig(**d)``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


# Option → its metadata, see `_option`. `preset` and `family` are none: they say where the others' values come from.
OPTIONS: dict[str, Mapping[str, Any]] = {f.name: f.metadata for f in dataclasses.fields(LNGDConfig) if f.metadata}


class LNGDFields(TypedDict, total=False):
    """The fields of :class:`LNGDConfig` as keyword arguments, for type checkers and for completion."""

    preset: str
    family: str
    fisher: str
    direction: str
    whiten: str
    rate: str
    rate_scale: float
    damping: float | str
    damping_bounds: tuple[float, float]
    momentum: float
    momentum_on: str
    ema_decay: float
    factor_interval: int
    inverse_interval: int
    update_interval: int | str
    weight_decay: float | str
    bias: str
    max_factor_dim: int | str
    embedding: str
    exclude: str
    fallback_lr_scale: float
    betas: tuple[float, float]
    eps: float
    seed: int


def other_fishers(config: LNGDConfig) -> str:
    """The other values of `fisher` that these options accept, for an error."""
    accepted = FISHERS if config.family == "lngd" else _OTHER_FAMILIES["fisher"]
    return ", ".join(other for other in accepted if other != config.fisher)


def settings_of(config: LNGDConfig | None, fields: Mapping[str, Any]) -> LNGDConfig:
    """The options that :class:`hf_lngd.LNGD` was given: `fields` on top of `config`. ValueError: `config` is something
    else, such as the learning rate, which AdamW takes in that place; an unknown or bad field."""
    if config is not None and not isinstance(config, LNGDConfig):
        is_dict = isinstance(config, Mapping)
        hint = "settings by name, as in LNGD(model, **settings)" if is_dict else "the rate as lr=1e-3"
        raise ValueError(f"config: got {config!r}, accepted: an LNGDConfig or None; {hint}")
    _check_names(fields, "LNGD")
    return LNGDConfig(**fields) if config is None else config.with_fields(**fields)


# What other optimizers' and transformers' names are called here, where no letters tell.
_CALLED = {"learning_rate": "lr"}


def _check_names(names: Any, where: str) -> None:
    """Raise ValueError, which says where, for an unknown option, with the closest ones."""
    known = ["preset", "family", *OPTIONS]
    for name in names:
        if name not in known:
            plain = name.lower().replace("-", "_")
            close = [_CALLED[plain]] if plain in _CALLED else difflib.get_close_matches(plain, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"accepted: {', '.join(known)}"
            raise ValueError(f"{where}: unknown name '{name}'; {hint}")


def _parse_items(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for item in re.split(r"(?<!\\),", text):
        item = item.replace("\\,", ",").strip()
        if not item:
            if text.strip():
                raise ValueError(f"optim_args: got an empty item in {text!r}, accepted: name=value,name=value")
            continue
        name, equals, value = item.partition("=")
        name, value = name.strip(), value.strip()
        if not equals:
            raise ValueError(f"optim_args: got {item!r}, accepted: name=value")
        if name in fields:
            raise ValueError(f"optim_args: got '{name}' twice, accepted: each name once")
        _check_names([name], "optim_args")
        fields[name] = _value_of(value, OPTIONS[name]["default"]) if name in OPTIONS else value
    return fields


def _value_of(text: str, default: Any) -> Any:
    """The value of an option with this default; text that is none is left to the option's check."""
    try:
        if isinstance(default, tuple):
            return tuple(float(part) for part in text.split(":"))
        if default == "auto":
            return text.lower() if text.lower() == "auto" else int(text) if text.isdecimal() else float(text)
        return type(default)(text)
    except ValueError:
        return text


def _text_of(value: Any) -> str:
    """An option's value as :meth:`LNGDConfig.from_optim_args` reads it."""
    return ":".join(map(str, value)) if isinstance(value, list) else str(value).replace(",", "\\,")
