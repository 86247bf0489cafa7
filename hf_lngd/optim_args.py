"""Settings as text, ``name=value,name=value``, and their names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

# What other optimizers' and transformers' names are called here, where no letters tell.
_CALLED = {"learning_rate": "lr"}


def check_field_names(fields: Mapping[str, Any], known: Sequence[str], where: str = "optim_args") -> None:
    """Raise ValueError, which says where, for a name that is not known, with the closest ones."""
    for name in fields:
        if name not in known:
            plain = name.lower().replace("-", "_")
            close = [_CALLED[plain]] if plain in _CALLED else difflib.get_close_matches(plain, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"accepted: {', '.join(known)}"
            raise ValueError(f"{where}: unknown name '{name}'; {hint}")


def parse_items(text: str, examples: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a text names.

    Args:
        text: see `LNGDConfig.from_optim_args`.
        examples: a value of each field, in whose kind it is read.

    Raises:
        ValueError: an item without ``=``, an unknown name, one given twice.
    """
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
        check_field_names({name: value}, list(examples))
        fields[name] = _parse_value(name, value, examples[name])
    return fields


def text_of(value: Any) -> str:
    """A field's value as :func:`parse_items` reads it."""
    if isinstance(value, list):
        return ":".join(map(str, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).replace(",", "\\,")


# Fields whose text may be a word or a number.
_AUTO_OR_INTEGER = ("max_factor_dim", "polar_interval")


def _parse_value(name: str, value: str, example: Any) -> Any:
    """The value of a field from its text; what cannot be converted is left for the field's own check to refuse."""
    if name == "exclude" or (isinstance(example, str) and name not in _AUTO_OR_INTEGER):
        return value
    lowered = value.lower()
    if isinstance(example, bool):
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(lowered, value)
    try:
        if name == "fallback_lr":
            return None if lowered == "none" else float(value)
        if name == "betas":
            return tuple(float(beta) for beta in value.split(":"))
        if name in _AUTO_OR_INTEGER:
            return lowered if lowered == "auto" else int(value)
        return type(example)(value)
    except ValueError:
        return value
