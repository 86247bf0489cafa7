"""What `python -m hf_lngd` does: runs somebody's script with ``--optim lngd`` known to it, or `doctor`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from textwrap import fill, indent

from ..config import OPTIONS
from . import launching
from .doctor import doctor
from .stock import register
from .usage import UsageError, exit_on_usage_error, refuse_if

USAGE = """\
python -m hf_lngd script.py --optim lngd ...    runs a script of a stock Trainer, unchanged, with optim=lngd known to it
python -m hf_lngd -m module --optim lngd ...    the same for a module
python -m hf_lngd doctor MODEL                  who owns which parameter, factors, bytes of state (--help for more)
python -m hf_lngd --options                     what --optim_args accepts: each option with its default and meaning
python -m hf_lngd --version                     of this package

Launchers: torchrun ... -m hf_lngd script.py ...; accelerate launch ... -m hf_lngd script.py ..."""
ACCEPTED = "accepted: a Python file, -m with a module, or doctor with a model"


def main(argv: list[str]) -> None:
    """Run the command line; what is wrong with it ends the process with status 2."""
    exit_on_usage_error(lambda: run(argv))


def run(argv: list[str]) -> None:
    """See `USAGE`; raises UsageError, which names what was given and what is accepted."""
    if not argv:
        raise UsageError("script", f"got none, {ACCEPTED}")
    if argv[0] in ("-h", "--help"):
        print(USAGE)
    elif argv[0] == "--options":
        for name, option in OPTIONS.items():
            print(f"{name} (default: {option['default']})", indent(fill(option["help"], 110), "    "), sep="\n")
    elif argv[0] == "doctor":
        doctor(argv[1:])
    elif argv[0] == "-m":
        _run_module(argv[1:])
    elif argv[0].startswith("-"):
        raise UsageError("script", f"got the option {argv[0]!r}, {ACCEPTED}; options of the script come after it")
    else:
        _run_script(argv)


def _run_script(argv: list[str]) -> None:
    """As ``python argv[0] argv[1] ...``."""
    path = Path(argv[0])
    refuse_if(not path.exists(), "script", f"got {argv[0]!r}, which is not there, {ACCEPTED}")
    empty = path.is_dir() and not (path / "__main__.py").is_file()
    refuse_if(empty, "script", f"got {argv[0]!r}, a folder without a __main__.py, {ACCEPTED}")
    _register(argv)
    if path.is_file() and not sys.flags.safe_path:  # a script imports from its own folder
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    runpy.run_path(argv[0], run_name="__main__")


def _run_module(argv: list[str]) -> None:
    """As ``python -m argv[0] argv[1] ...``."""
    refuse_if(not argv, "-m", f"got no module, {ACCEPTED}")
    found = None
    with contextlib.suppress(ImportError, ValueError):
        found = importlib.util.find_spec(argv[0])
    refuse_if(found is None, "-m", f"got {argv[0]!r}, which is no module here")
    _register(argv)
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def _register(argv: list[str]) -> None:
    """Make `lngd` known to the script, and its arguments the process's."""
    try:
        register()
    except RuntimeError as error:
        raise UsageError("transformers", error) from error
    launching.ENTRY[:] = ["-m", "hf_lngd"]
    sys.argv = list(argv)
