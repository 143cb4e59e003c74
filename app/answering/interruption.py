"""Work for a client is given up at once when the client is gone, its time is up, or the engine is dead."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from candor.app.answering.watch import EngineWatch
from candor.app.edge.limits import Refused
from candor.engine.base import EngineDead

T = TypeVar("T")

HEADER = "x-request-timeout"
"""With it a client asks for less time than the server would give, in seconds."""


_CANCEL_S = 5.0
"""How long work that was given up may take to end: in an engine that is stuck it never would."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class DeadlineExceeded(Exception):
    """The answer was not finished in the time it had."""


def seconds_for(request: Request, most: float) -> float:
    """How long the request may take: what its header asks for, and at most `most`. Raises Refused."""
    asked = request.headers.get(HEADER)
    if asked is None:
        return most
    try:
        seconds = float(asked)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # nan too
        raise Refused(f"{HEADER}: expected a number of seconds above 0, got {asked[:40]!a}", HEADER)
    return min(seconds, most)


async def unless_interrupted(
    work: Coroutine[Any, Any, T], receive: Receive, watch: EngineWatch, within_s: float
) -> T:
    """The result of `work`; it is cancelled, and waited for, where it is not needed any more.

    receive: the request's channel, its body read already.
    Raises ClientGone, DeadlineExceeded, EngineDead, or what `work` raises.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        ends: set[asyncio.Future[Any]] = {task, gone, watch.death}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED, timeout=within_s)
        if task.done():
            return task.result()
        if watch.death.done():
            raise EngineDead(str(watch.death.result()))
        if gone.done():
            raise ClientGone
        raise DeadlineExceeded(f"not answered within {within_s:g} s; try later, or ask for less")
    finally:
        task.cancel()
        gone.cancel()
        ended, _ = await asyncio.wait({task, gone}, timeout=_CANCEL_S)
        for one in ended:
            one.cancelled() or one.exception()  # looked at, so that nobody misses it


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
