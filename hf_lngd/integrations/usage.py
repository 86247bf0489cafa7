"""Errors of a script's user, and a parser that reports them: one last line ``error: <field>: …``, exit status 2."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub.errors import StrictDataclassError
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import CONFIG_MAPPING, AutoConfig, HfArgumentParser

# What loading raises for a folder that is not there, a broken file, another kind of model, a missing library.
_ERRORS = (OSError, ValueError, LookupError, TypeError, ImportError, RuntimeError, AttributeError)
_OF_A_SETTING = re.compile(r"(\w+: )+(got|unknown name) ")
LOAD_ERRORS: tuple[type[Exception], ...] = (*_ERRORS, StrictDataclassError)


class _FieldError(Exception):
    """Of an argument `field`, written without dashes; the message is put on one line."""

    def __init__(self, field: str, message: object) -> None:
        self.field = field
        super().__init__(f"{field}: {one_line(message)}")


class UsageError(_FieldError, ValueError):
    """Something that the user gave is not accepted. The message says what was given and what is accepted."""

    exit_status = 2


class RunError(_FieldError, RuntimeError):
    """What was asked for cannot be finished, through no fault of the arguments: the Hub does not take a model."""

    exit_status = 1


def one_line(message: object, limit: int = 1000) -> str:
    """A message without line breaks, cut at `limit` characters."""
    text = " ".join(str(message).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def exit_on_usage_error(main: Callable[[], None]) -> None:
    """Run a script's main function; a :class:`UsageError` or :class:`RunError`, or what this package itself says of a
    setting, ends it with one line, no traceback.

    Whatever else is raised is told to torchrun, too, whose last lines then name rank and exception.
    """
    try:
        record(main)()
    except (ValueError, RuntimeError) as error:
        if not (isinstance(error, _FieldError) or _is_of_a_setting(error)):
            raise
        sys.stdout.flush()
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(getattr(error, "exit_status", UsageError.exit_status))


def _is_of_a_setting(error: Exception) -> bool:
    """Whether it was raised in this package and reads ``field: got …`` or ``field: unknown name …``."""
    innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return innermost.f_globals.get("__name__", "").startswith("hf_lngd.") and bool(_OF_A_SETTING.match(str(error)))


class UsageParser(HfArgumentParser):
    """transformers' parser of arguments into dataclasses, with every failure a :class:`UsageError`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse takes -1 for a number, and -1e-3 for another argument
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        """Called by argparse: a value of the wrong kind, a missing value."""
        raise self._explain(re.sub(r"^argument (?:\S*/)?--?([\w-]+)(?=: )", lambda m: m[1].replace("-", "_"), message))

    def parse(self, argv: list[str]) -> tuple[Any, ...]:
        """The dataclasses' instances, from the command line or from one JSON file; raises UsageError."""
        try:
            if len(argv) == 1 and argv[0].endswith(".json"):
                return tuple(self.parse_json_file(argv[0]))
            return tuple(self.parse_args_into_dataclasses(argv, look_for_args_file=False))
        except UsageError:
            raise
        except LOAD_ERRORS as error:
            raise self._explain(str(error)) from error

    def _explain(self, message: str) -> UsageError:
        """An error of argparse's or of a dataclass's own check: the field stands in front, or is mentioned."""
        names = {action.dest for action in self._actions}
        unused = re.match(r"Some .* are not used by the HfArgumentParser: \['(.*?)'", message)
        if unused:
            name = unused[1].lstrip("-").partition("=")[0]
            close = difflib.get_close_matches(name.replace("-", "_"), names, n=3, cutoff=0.6)
            hint = f"did you mean --{' or --'.join(close)}?" if close else "see --help"
            return UsageError(name, f"unknown argument; {hint}")
        front = re.match(r"(\w+): (.*)", message, re.DOTALL)
        if front and (front[1] in names or "accepted" in front[2]):
            return UsageError(front[1], front[2])
        words = re.findall(r"--([a-z][a-z0-9_]+)", message) + re.findall(r"[a-z][a-z0-9]*_[a-z0-9_]+", message)
        return UsageError(next((word for word in words if word in names), "arguments"), message)


def option(default: Any, help: str) -> Any:
    """A field of a dataclass of arguments."""
    return dataclasses.field(default=default, metadata={"help": help})


def refuse_if(condition: Any, field: str, message: str) -> None:
    """Raise UsageError if the condition holds."""
    if condition:
        raise UsageError(field, message)


def read_config(field: str, name: str, **options: Any) -> Any:
    """The configuration in a folder or file, on the Hub, or of a type of model with its defaults; UsageError: there is
    none. `options`: of ``AutoConfig.from_pretrained``."""
    if not Path(name).exists():
        if name in CONFIG_MAPPING:
            return AutoConfig.for_model(name)
        accepted = "accepted: a folder with a config.json, such a file, a type of model (marian), a name on the Hub"
        is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".json")
        refuse_if(is_path, field, f"got {name!r}, which is not there, {accepted}")
    with blame(field, f"got {name!r}, which has no configuration that can be read"):
        return AutoConfig.from_pretrained(name, **options)


@contextlib.contextmanager
def blame(field: str, what: str) -> Iterator[None]:
    """Whatever a library raises becomes a UsageError, ``field: what: error``: the field is what the user gave."""
    try:
        yield
    except Exception as error:
        raise UsageError(field, f"{what}: {error}") from error
