"""What the tests of engines share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """The loop in which a module's engines live."""
    with asyncio.Runner() as runner:
        yield runner
