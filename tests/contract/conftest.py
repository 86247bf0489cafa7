"""The fixture `case`: a test that asks for it runs under each configuration."""

from __future__ import annotations

import pytest

from tests.helpers import CASES, Case


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """A configuration."""
    return CASES[request.param]
