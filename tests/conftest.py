"""What holds for all tests."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """What is imported by now is never garbage: each of the Trainer's `gc.collect()` would look it all through."""
    gc.collect()
    gc.freeze()
