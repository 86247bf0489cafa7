"""Runs of the scripts, one after the other in one process: `python -m tests.hub_runs RUNS.json`.

RUNS.json is a list of command lines, the script's name first. Printed at the end: one line of JSON, for each run its
exit status and what it wrote to stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

from hf_lngd.integrations.usage import exit_on_usage_error


def run(argv: list[str]) -> tuple[int, str]:
    """Exit status and stderr of one run."""
    script = importlib.import_module(f"scripts.{Path(argv[0]).stem}")
    sys.argv, said = argv, io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            exit_on_usage_error(script.main)
        except SystemExit as end:
            return int(str(end.code)), said.getvalue()
    return 0, said.getvalue()


if __name__ == "__main__":
    results = [run(argv) for argv in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    print("\n" + json.dumps(results))
