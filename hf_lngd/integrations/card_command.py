"""Command lines for model cards: a reader can run them, and they tell no secret.

What is the author's alone is left out: tokens, the push to a repository, the checkpoint that training went on from (a
resumed run ends where an uninterrupted one does).
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .training_args import is_lngd, lngd_settings

# Options that are left out. argparse takes beginnings of names, too.
_AUTHORS = re.compile(r"--(tok|toke|token|hub.*|push.*|resume.*)$")
# Options that name what is read: a file, a folder, or something on the Hub.
_READ = re.compile(r"--.*(_file|_path|_name|(train|validation|test)_dir)$")
_ADAMW = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


def command_of(argv: Sequence[str], processes: int = 1, on_this_node: int = 1) -> list[str]:
    """The command that makes a model again.

    Args:
        argv: the script and its arguments; a single file of arguments (JSON) is written out.
        processes: in all.
        on_this_node: of them.
    """
    script, *given = argv
    if len(given) == 1 and given[0].endswith(".json"):
        given = _from_json(given[0])
    nodes = [] if processes == on_this_node else ["--nnodes", str(processes // on_this_node)]
    launcher = ["python"] if processes == 1 else ["torchrun", *nodes, "--nproc_per_node", str(on_this_node)]
    return [*launcher, script, *without_authors(given)]


def without_authors(given: Sequence[str]) -> list[str]:
    """Arguments without tokens, the push and the checkpoint, and without their values."""
    shown: list[str] = []
    skipping = False
    for part in given:
        if part.startswith("--"):
            skipping = _AUTHORS.match(_option(part.partition("=")[0])) is not None
        if not skipping:
            shown.append(part)
    return shown


def _option(text: str) -> str:
    """Its name, with underscores: argparse takes --train-file for --train_file."""
    return text.replace("-", "_").replace("__", "--", 1)


def inputs(command: Sequence[str]) -> list[str]:
    """The files and folders of the author's that a command reads."""
    parts = [piece for part in command for piece in (part.split("=", 1) if part.startswith("--") else [part])]
    pairs = zip(parts, parts[1:], strict=False)
    read = (value for option, value in pairs if _READ.match(_option(option)))
    return [value for value in dict.fromkeys(read) if os.path.exists(value)]


def _from_json(path: str) -> list[str]:
    given: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    parts: list[str] = []
    for name, value in given.items():
        if isinstance(value, list):
            parts += [f"--{name}", *map(str, value)]
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            parts += [f"--{name}", text]
    return parts


def optimizer_options(args: Any) -> list[str]:
    """The optimizer with all its settings, as options of any script that takes the package's training arguments."""
    if is_lngd(args):
        config, lr = lngd_settings(args)
        return ["--optim", "lngd", "--learning_rate", str(lr), "--optim_args", config.to_optim_args()]
    options = ["--optim", str(getattr(args.optim, "value", args.optim)), "--learning_rate", str(args.learning_rate)]
    options += ["--optim_args", args.optim_args] if args.optim_args else []
    return options + [part for name in _ADAMW for part in (f"--{name}", str(getattr(args, name)))]


def folded(command: Sequence[str], width: int = 100) -> str:
    """A command over several lines, broken before options, as a shell takes it."""
    lines = [""]
    for part in (shlex.quote(part) for part in command):
        if part.startswith("--") and len(lines[-1]) + len(part) > width:
            lines.append("   ")
        lines[-1] += f" {part}"
    return " \\\n".join(lines).strip()
