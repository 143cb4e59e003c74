"""Room on CPython's stack of frames, for calls that are made thousands of times a second.

CPython (from 3.11 on) puts the frames of Python functions into chunks of 16 KiB. A call that does not fit maps a new
chunk and its return unmaps it: where the calls of a loop happen to cross a chunk's end, each costs two system calls
and a page fault. The depth of the stack decides, so one more caller far above may do it: a wrapper around vLLM's step
made operators of every layer cross, two to three milliseconds of a step of thirty.

A frame larger than a chunk gets a larger one to itself, a power of two, and what it calls has the rest of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])

# In words of 8 bytes: 136 KiB, so that the chunk has 256. What nobody uses of it is not touched.
FRAME = 17 * 1024


def with_room(function: F) -> F:
    """The function itself, below whose frame there is room for 120 KiB of others: several hundred calls deep."""
    function.__code__ = function.__code__.replace(co_stacksize=FRAME)
    return function
