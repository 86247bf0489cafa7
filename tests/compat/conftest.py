"""Names the versions that were run, at the end of a session; without the packages nothing here is collected."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "sentence-transformers", "trl")
collect_ignore_glob = [] if find_spec("sentence_transformers") and find_spec("trl") else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line a package."""
    if not collect_ignore_glob:
        for name in PACKAGES:
            terminalreporter.write_line(f"{name} {version(name)}")
