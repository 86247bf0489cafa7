"""Errors of a script's user, and a parser that reports them: one last line ``error: <field>: …``, exit status 2."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing.errors import record
from transformers import HfArgumentParser

EXIT_STATUS = 2
RUN_STATUS = 1


class UsageError(ValueError):
    """Something that the user gave is not accepted.

    Args:
        field: the argument, without dashes.
        message: what was given and what is accepted; put on one line.
    """

    def __init__(self, field: str, message: object) -> None:
        self.field = field
        super().__init__(f"{field}: {one_line(message)}")


class RunError(RuntimeError):
    """What was asked for cannot be finished, through no fault of the arguments: the Hub does not take a model.

    Args:
        field: the argument that asked for it, without dashes.
        message: what happened and what to do; put on one line.
    """

    def __init__(self, field: str, message: object) -> None:
        super().__init__(f"{field}: {one_line(message)}")


def one_line(message: object, limit: int = 1000) -> str:
    """A message without line breaks, cut at `limit` characters."""
    text = " ".join(str(message).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def exit_on_usage_error(main: Callable[[], None]) -> None:
    """Run a script's main function; a :class:`UsageError` ends it as the user should see it, without a traceback.

    So does a :class:`RunError`, with exit status 1.

    Whatever else is raised is told to torchrun, too, whose last lines then name rank and exception.
    """
    try:
        record(main)()
    except (UsageError, RunError) as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_STATUS if isinstance(error, UsageError) else RUN_STATUS)


class UsageParser(HfArgumentParser):
    """transformers' parser of arguments into dataclasses, with every failure a :class:`UsageError`."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse: a value of the wrong kind, a missing value."""
        named = re.match(r"argument (?:\S*/)?--?(?P<field>[\w-]+): (?P<rest>.*)", message, re.DOTALL)
        if named:
            raise UsageError(named["field"].replace("-", "_"), named["rest"])
        raise UsageError(self._mentioned(message) or "arguments", message)

    def parse(self, argv: list[str]) -> tuple[Any, ...]:
        """The dataclasses' instances, from the command line or from one JSON file.

        Raises:
            UsageError: names the argument.
        """
        json_file = argv[0] if len(argv) == 1 and argv[0].endswith(".json") else None
        given = self._read_json(json_file) if json_file else dict(_pairs(argv))
        try:
            if json_file:
                return self.parse_dict(given)
            unknown = self.parse_known_args(argv)[1]
            if unknown:
                raise self._stray(unknown[0])
            return tuple(self.parse_args_into_dataclasses(argv, look_for_args_file=False))
        except UsageError:
            raise
        except (ValueError, TypeError, ImportError, RuntimeError, KeyError, OSError) as error:
            raise self._explain(error, given) from error

    def _read_json(self, path: str) -> dict[str, Any]:
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError("arguments", f"{path}: {error}") from error
        if not isinstance(given, dict):
            raise UsageError("arguments", f"{path}: got a JSON {type(given).__name__}, accepted: an object")
        for name in given:
            if name not in self.names():
                raise self._unknown(name)
        return given

    def names(self) -> set[str]:
        """Names of all arguments."""
        return {action.dest for action in self._actions}

    def _stray(self, text: str) -> UsageError:
        if not text.startswith("-"):
            return UsageError("arguments", f"got {text!r}, accepted: options that begin with --")
        return self._unknown(text.lstrip("-").partition("=")[0])

    def _unknown(self, name: str) -> UsageError:
        close = difflib.get_close_matches(name.replace("-", "_"), self.names(), n=3, cutoff=0.6)
        hint = f"did you mean --{' or --'.join(close)}?" if close else "see --help"
        return UsageError(name, f"unknown argument; {hint}")

    def _explain(self, error: Exception, given: dict[str, Any]) -> UsageError:
        """The error of a dataclass's own check: the field stands in front, is mentioned, or had that value."""
        message = str(error)
        front = re.match(r"(?P<field>\w+): (?P<rest>.*)", message, re.DOTALL)
        if front and (front["field"] in self.names() or "accepted" in front["rest"]):
            return UsageError(front["field"], front["rest"])
        refused = re.match(r"(?P<value>.+?) is not a valid \w+", message)
        if refused:
            for name, value in given.items():
                if str(value) == refused["value"].strip("'\""):
                    return UsageError(name, message)
        return UsageError(self._mentioned(message) or "arguments", message)

    def _mentioned(self, message: str) -> str | None:
        words = re.findall(r"(?:--)?[a-z][a-z0-9_]+", message)
        dashed = [word[2:] for word in words if word.startswith("--")]
        return next((word for word in [*dashed, *words] if word in self.names() and ("_" in word or dashed)), None)


def _pairs(argv: list[str]) -> Iterable[tuple[str, str]]:
    for option, value in zip(argv, [*argv, ""][1:], strict=True):
        if option.startswith("--"):
            name, equals, own = option[2:].partition("=")
            yield name.replace("-", "_"), own if equals else value
