"""Waiting for the engine, and when waiting ends: the engine dies or gets stuck, the client leaves, time is up.

When the engine dies or gets stuck, nothing is answered any more and the process has to end:

    dead    its check says so, fails, or does not come back
    stuck   somebody waits for it, and for `stall_s` it has said nothing to anybody;
            then it is given one token to write, and does not within another `stall_s`

The second question keeps an engine alive whose clients all leave before their first token: that looks the same
from here, and anybody could do it on purpose.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from candor.app.edge.limits import Refused
from candor.engine.base import Engine, EngineDead, Sampling

logger = logging.getLogger("candor")
T = TypeVar("T")

_ANY_PROMPT = (0,)
"""A token every vocabulary has."""


HEADER = "x-request-timeout"
"""With it a client asks for less time than the server would give, in seconds."""


_CANCEL_S = 5.0
"""How long work that was given up may take to end: in an engine that is stuck it never would."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class DeadlineExceeded(Exception):
    """The answer was not finished in the time it had."""


class EngineWatch:
    """death: done, with the reason, once the engine is known to be dead."""

    def __init__(
        self, engine: Engine, interval_s: float, stall_s: float, on_death: Callable[[], None]
    ) -> None:
        self.death: asyncio.Future[EngineDead] = asyncio.get_running_loop().create_future()
        self._engine = engine
        self._interval_s = interval_s
        self._stall_s = stall_s
        self._on_death = on_death
        self._waiting = 0  # those who wait for the engine's next word
        self._silence_s = 0.0  # how long, in looks of `interval_s`, somebody waited and nobody heard anything

    @property
    def alive(self) -> bool:
        return not self.death.done()

    async def run(self) -> None:
        """Checks until the engine dies."""
        while self.alive:
            await self.check()
            await self._listen()
            await asyncio.sleep(self._interval_s)

    async def check(self) -> None:
        """One look. A check that fails in any way counts as death: the engine did not say that it lives."""
        try:
            await asyncio.wait_for(self._engine.check(), self._stall_s)
        except Exception as error:
            self.report(
                error if isinstance(error, EngineDead) else EngineDead(f"its check failed: {error!r}")
            )

    def report(self, death: EngineDead) -> None:
        """Also for whoever learns of the death first."""
        if self.alive:
            logger.error("the engine died, ending: %s", death)
            self.death.set_result(death)
            self._on_death()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around every wait for the engine's next word; time in which nobody takes it up is not the engine's."""
        self._waiting += 1
        try:
            yield
            self._silence_s = 0.0
        finally:
            self._waiting -= 1

    async def watched(self, outputs: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """What the engine says, noting that it does."""
        async with aclosing(outputs):
            while True:
                with self.waiting():
                    output = await anext(outputs, None)
                if output is None:
                    return
                yield output

    async def _listen(self) -> None:
        self._silence_s += self._interval_s if self._waiting else 0.0
        if self._silence_s < self._stall_s or not self.alive:
            return
        logger.warning("the engine has said nothing for %.3g s; asking it for one token", self._silence_s)
        probe = asyncio.create_task(self._one_token())
        await asyncio.wait({probe}, timeout=self._stall_s)
        if not probe.done():
            probe.cancel()  # not waited for: what is stuck may not even be cancelled
            if self._silence_s:  # nobody else heard anything either
                self.report(EngineDead(f"it is stuck: no token within {self._stall_s:g} s"))
        elif error := probe.exception():
            self.report(EngineDead(f"it could not write one token: {error!r}"))
        self._silence_s = 0.0

    async def _one_token(self) -> None:
        async with aclosing(
            self._engine.generate(_ANY_PROMPT, Sampling(max_tokens=1), capture=False)
        ) as outputs:
            async for _ in outputs:
                pass


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
