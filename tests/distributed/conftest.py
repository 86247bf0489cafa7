"""The fixture `pools`: processes that stay for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pools, open_pools


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    """Two processes and four."""
    yield from open_pools(tmp_path_factory.mktemp("pool"), "tests.distributed.loops")
