"""Work for a client is given up at once when the client is gone or the engine is dead."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from app.watch import EngineWatch
from engine.base import EngineDead

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def unless_interrupted(work: Coroutine[Any, Any, T], receive: Receive, watch: EngineWatch) -> T:
    """The result of `work`; it is cancelled, and waited for, where it is not needed any more.

    receive: the request's channel, its body read already.
    Raises ClientGone, EngineDead, or what `work` raises.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        ends: set[asyncio.Future[Any]] = {task, gone, watch.death}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watch.death.done():
            raise EngineDead(str(watch.death.result()))
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
