"""Preparing: what is done to a request's texts before the engine gets them, off the event loop.

Rendering a template and tokenising take time that grows with the text, so they run in one thread, and what waits for
it is bounded by its characters, in all and for each caller. Callers take turns: whoever sends one short prompt waits
for one request of every other caller, not for all that these have sent.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from candor.app.edge.limits import Overloaded

T = TypeVar("T")


class Preparing:
    """most: maximum characters that wait or run, in all; a caller may take half, if others may ask too.

    A single request may exceed these where nothing else waits.
    """

    def __init__(self, most: int, alone: Callable[[], bool] = lambda: True) -> None:
        self._most = most
        self._alone = alone
        self._waiting: OrderedDict[str, deque[tuple[Callable[[], Any], asyncio.Future[Any]]]] = OrderedDict()
        self._characters: dict[str, int] = {}  # by caller, waiting or running
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="candor-preparing")
        self._runner: asyncio.Task[None] | None = None

    async def run(self, caller: str, characters: int, work: Callable[[], T]) -> T:
        """Returns what `work` returns. Raises Overloaded if too much waits, or what `work` raises.

        Cancelling drops the work if it has not begun.
        """
        self._check(caller, characters)
        self._characters[caller] = self._characters.get(caller, 0) + characters
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        context = copy_context()
        self._waiting.setdefault(caller, deque()).append((lambda: context.run(work), future))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        try:
            return await future
        finally:
            self._characters[caller] -= characters
            if not self._characters[caller]:
                del self._characters[caller]

    def close(self) -> None:
        if self._runner is not None:
            self._runner.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check(self, caller: str, characters: int) -> None:
        own, everybodys = self._characters.get(caller, 0), sum(self._characters.values())
        most_own = self._most if self._alone() else self._most // 2
        if (own and own + characters > most_own) or (everybodys and everybodys + characters > self._most):
            raise Overloaded("too many long prompts wait to be read; try later", retry_after_s=1)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                caller, queue = self._waiting.popitem(last=False)
                work, future = queue.popleft()
                if queue:
                    self._waiting[caller] = queue  # behind the others
                if future.done():  # cancelled
                    continue
                try:
                    result = await loop.run_in_executor(self._thread, work)
                except Exception as error:
                    if not future.done():
                        future.set_exception(error)
                else:
                    if not future.done():
                        future.set_result(result)
        finally:
            self._runner = None
