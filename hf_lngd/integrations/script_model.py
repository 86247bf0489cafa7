"""Configurations and models of the package's scripts: loaded, changed by `--config_overrides`, made from nothing."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from .usage import UsageError

# What loading raises for a folder that is not there, a broken file, another kind of model, a missing library.
LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    ImportError,
    RuntimeError,
    AttributeError,
    StrictDataclassError,
)

# A comma between two overrides, not one inside a list.
_COMMA = re.compile(r",(?![^\[]*\])")
# A backbone's configuration derives these from its lists (stages from depths).
_DERIVED = ("stage_names", "out_features", "out_indices", "transformers_version", "model_type", "architectures")


def hub_options(args: Any) -> dict[str, Any]:
    """Keyword arguments of every ``from_pretrained``."""
    return {
        "cache_dir": args.cache_dir,
        "revision": args.model_revision,
        "token": args.token,
        "trust_remote_code": args.trust_remote_code,
    }


def load_config(args: Any, **changes: Any) -> Any:
    """The configuration with `config_overrides` and, before them, `changes`.

    Raises:
        UsageError: names the argument.
    """
    field = "config_name" if args.config_name else "model_name_or_path"
    name = args.config_name or args.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(name, **hub_options(args), **changes)
    except LOAD_ERRORS as error:
        raise UsageError(field, f"got {name!r}, which has no configuration: {error}") from error
    return override(config, args.config_overrides)


def make_model(factory: Any, args: Any, config: Any, kind: str, **options: Any) -> Any:
    """A model of `factory` (an Auto class): loaded, or drawn anew without `model_name_or_path`.

    Raises:
        UsageError: names the argument behind it.
    """
    try:
        if args.model_name_or_path:
            return factory.from_pretrained(args.model_name_or_path, config=config, **hub_options(args), **options)
        return factory.from_config(config, trust_remote_code=args.trust_remote_code)
    except LOAD_ERRORS as error:
        field = "model_name_or_path" if args.model_name_or_path else "config_name"
        name = args.model_name_or_path or args.config_name
        if args.config_overrides:
            field, name = "config_overrides", args.config_overrides
        raise UsageError(field, f"got {name!r}, which makes no {kind} model: {error}") from error


def override(config: Any, text: str | None) -> Any:
    """A configuration with ``name=value,name=value`` applied; ``none`` and lists such as ``depths=[1,1]`` are values.

    Raises:
        UsageError: an unknown name (the closest are listed), a value of the wrong kind.
    """
    rebuilt: dict[str, Any] = {}
    for item in _COMMA.split(text) if text else []:
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or "=" in value:
            raise UsageError("config_overrides", f"got {item!r}, accepted: name=value,name=value")
        if not hasattr(config, name):
            close = difflib.get_close_matches(name, config.to_dict(), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"accepted: fields of {type(config).__name__}"
            raise UsageError("config_overrides", f"unknown name {name!r}; {hint}")
        old = getattr(config, name)
        try:
            if value.lower() == "none":
                setattr(config, name, None)
            elif old is None or isinstance(old, (list, tuple)) or value.startswith("["):
                rebuilt[name] = _value(value, isinstance(old, (list, tuple)))
            else:
                config.update_from_string(f"{name}={value}")
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise UsageError("config_overrides", f"{name}: got {value!r}: {error}") from error
    return _rebuild(config, rebuilt, str(text)) if rebuilt else config


def _value(text: str, is_list: bool) -> Any:
    """A list, a number, true or false, as JSON has them; else a text."""
    try:
        value = json.loads(text)
    except ValueError as error:
        if is_list or text.startswith("["):
            raise ValueError("accepted: a list, e.g. [1,2]") from error
        return text
    if is_list and not isinstance(value, list):
        raise ValueError("accepted: a list, e.g. [1,2]")
    return value


def _rebuild(config: Any, changes: dict[str, Any], text: str) -> Any:
    """A configuration anew: what its class derives from a list (stages, the last width) follows."""
    kept = {name: value for name, value in config.to_diff_dict().items() if name not in _DERIVED}
    try:
        return type(config)(**{**kept, **changes})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UsageError("config_overrides", f"got {text!r}: {error}") from error
