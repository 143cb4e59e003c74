"""Room on CPython's stack of frames, for calls that are made thousands of times a second.

CPython (from 3.11 on) puts the frames of Python functions into chunks of 16 KiB. The call that does not fit maps a new
chunk and its return unmaps it: where a loop's calls happen to cross a chunk's end, each of them costs two system
calls and a page fault. It is the depth of the stack that decides, so one more caller far above may do it: a wrapper
around a step of vLLM's made each layer's operators cross, a millisecond of a step of ten.

A frame larger than a chunk gets a larger one to itself, a power of two, and what it calls has the rest of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])

FRAME = 17 * 1024  # words of 8 bytes: 136 KiB, so that the chunk is of 256; what is not used of it is not touched


def with_room(function: F) -> F:
    """The function itself, below whose frame there is room for some 110 KiB of others: several hundred calls deep."""
    function.__code__ = function.__code__.replace(co_stacksize=FRAME)  # type: ignore[attr-defined]
    return function
