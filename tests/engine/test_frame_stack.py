"""Calls below `with_room` never wait for memory, however deep the stack above them is."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import pytest

from candor.engine.frame_stack import with_room

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="frames are objects of their own there")

CALLS = 500


def small() -> None:
    pass


def middle() -> None:
    small()


def loop() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        middle()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@with_room
def roomy_loop() -> int:
    return loop()


def most_faults(at_the_end: Callable[[], int]) -> int:
    """Of all depths within two chunks: what the worst costs."""

    def deeper(depth: int) -> int:
        return at_the_end() if depth == 0 else deeper(depth - 1)

    return max(deeper(depth) for depth in range(400))


def test_room() -> None:
    assert most_faults(loop) >= CALLS, "this interpreter does not need it any more"
    assert most_faults(roomy_loop) < CALLS / 10
