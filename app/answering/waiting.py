"""Waiting for the engine. It ends early if the engine dies or gets stuck, the client leaves, or time is up.

A process whose engine is dead or stuck can answer nothing, so it has to end:

    dead      the engine's check reports death, fails, or does not return within `stall_s`
    stuck     a request waits, and the engine has given no output to any request for `stall_s`, nor made a step;
              it is then asked for one token, and does not write it within another `stall_s`
    starved   a request waits without output for `STARVED_S`, and the engine gets less than half of the processor
              time that it asks for: new requests are refused until it gives output again

Seconds of silence are weighed with the share of the processor time that the engine gets. So a starved engine is
given longer in proportion, and one that does not even ask for the processor is not. The one-token probe is needed
because clients that all leave before their first token look the same from here as a stuck engine, and anybody could
do that on purpose.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from time import monotonic
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from candor.app.edge.limits import Refused
from candor.engine.base import Engine, EngineDead, Sampling

logger = logging.getLogger("candor")
T = TypeVar("T")

_ANY_PROMPT = (0,)
"""The prompt of the probe: token 0, which every vocabulary has."""


HEADER = "x-request-timeout"
"""Header by which a client asks for a shorter time limit than the server's, in seconds."""


STARVED_S = 5.0
"""Minimum seconds without output before an engine counts as starved."""

_CANCEL_S = 5.0
"""Maximum seconds to wait for cancelled work to end. In a stuck engine it never ends."""


class Processors(Protocol):
    """What the system tells of the engine's work (`candor.app.process.processors`)."""

    def share(self) -> float:
        """Returns the share of the processor time asked for that the engine got since the last call, in [0, 1]."""
        ...

    def steps(self) -> float:
        """Returns how many steps the engine has made."""
        ...


class ClientGone(Exception):
    """The client has disconnected."""


class DeadlineExceeded(Exception):
    """The answer was not finished within its time limit."""


class Deadline:
    """The end of a request's time, which its preparation and its answer share."""

    def __init__(self, within_s: float) -> None:
        self._end = monotonic() + within_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._end - monotonic())


class EngineWatch:
    """Watches whether the engine lives. death: a future, done with the reason once the engine is known to be dead."""

    def __init__(
        self,
        engine: Engine,
        interval_s: float,
        stall_s: float,
        on_death: Callable[[], None],
        processors: Processors | None = None,
    ) -> None:
        self.death: asyncio.Future[EngineDead] = asyncio.get_running_loop().create_future()
        self._engine = engine
        self._interval_s = interval_s
        self._stall_s = stall_s
        self._on_death = on_death
        self._processors = processors
        self._waiting = 0  # number of requests that wait for the engine's next output
        self._silence_s = 0.0  # seconds of waiting without output, weighed with the engine's share
        self._wall_s = 0.0  # the same seconds, not weighed
        self._looked = monotonic()
        self._steps = 0.0
        self.share = 1.0
        self.starved = False

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
        """Checks once. A check that fails in any way counts as death, since the engine did not say that it lives."""
        try:
            await asyncio.wait_for(self._engine.check(), self._stall_s)
        except Exception as error:
            self.report(
                error if isinstance(error, EngineDead) else EngineDead(f"its check failed: {error!r}")
            )

    def report(self, death: EngineDead) -> None:
        """Records the engine's death, once. Other code that learns of the death first calls this too."""
        if self.alive:
            logger.error("the engine died, ending: %s", death)
            self.death.set_result(death)
            self._on_death()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wraps each wait for the engine's next output. Time in which no request waits does not count as a stall."""
        self._waiting += 1
        try:
            yield
            self._silence_s = self._wall_s = 0.0
        finally:
            self._waiting -= 1

    async def watched(self, outputs: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Yields the engine's outputs and resets the stall time at each."""
        async with aclosing(outputs):
            while True:
                with self.waiting():
                    output = await anext(outputs, None)
                if output is None:
                    return
                yield output

    async def _listen(self) -> None:
        await self._weigh()
        if self._silence_s < self._stall_s or not self.alive:
            return
        if self._processors is not None and self._steps != (
            steps := await asyncio.to_thread(self._processors.steps)
        ):
            self._steps, self._silence_s = steps, 0.0  # it works, though nobody got output of it
            return
        logger.warning("the engine has said nothing for %.3g s; asking it for one token", self._wall_s)
        probe = asyncio.create_task(self._one_token())
        began = self._silence_s
        while self._silence_s - began < self._stall_s and self._silence_s:
            done, _ = await asyncio.wait({probe}, timeout=self._interval_s)
            if done:
                break
            await self._weigh(asked=True)
        if not probe.done():
            probe.cancel()  # not awaited: a stuck engine may not even react to cancelling
            if self._silence_s:  # no other request got output meanwhile
                self.report(EngineDead(f"it is stuck: no token within {self._stall_s:g} s"))
        elif error := probe.exception():
            self.report(EngineDead(f"it could not write one token: {error!r}"))
        self._silence_s = self._wall_s = 0.0

    async def _weigh(self, *, asked: bool = False) -> None:
        """Adds the time since the last look to the silence. asked: whether the probe waits."""
        self.share = 1.0
        if self._processors is not None and (self._waiting or asked):
            self.share = await asyncio.to_thread(self._processors.share)
        now = monotonic()
        passed, self._looked = now - self._looked, now
        if self._waiting or asked:
            self._silence_s += passed * self.share
            self._wall_s += passed
        starved = self._wall_s >= STARVED_S and self._silence_s < self._wall_s / 2
        if starved != self.starved:
            self.starved = starved
            if starved:
                logger.warning(
                    "the engine is starved: it gets %.0f %% of the processor time it asks for; refusing new requests",
                    100 * self._silence_s / self._wall_s,
                )
            else:
                logger.info("the engine gives output again")

    async def _one_token(self) -> None:
        async with aclosing(
            self._engine.generate(_ANY_PROMPT, Sampling(max_tokens=1), capture=False)
        ) as outputs:
            async for _ in outputs:
                pass


def seconds_for(request: Request, most: float) -> float:
    """Returns the request's time limit: its header's value, at most `most`, in seconds. Raises Refused."""
    asked = request.headers.get(HEADER)
    if asked is None:
        return most
    try:
        seconds = float(asked)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # this form refuses nan too
        raise Refused(f"{HEADER}: expected a number of seconds above 0, got {asked[:40]!a}", HEADER)
    return min(seconds, most)


async def unless_interrupted(
    work: Coroutine[Any, Any, T], receive: Receive, watch: EngineWatch, within_s: float
) -> T:
    """Returns the result of `work`. If the result is no longer needed, it cancels `work` and waits for it to end.

    receive: the request's channel, after its body was read.
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
        raise DeadlineExceeded("not answered in time; try later, or ask for less")
    finally:
        task.cancel()
        gone.cancel()
        ended, _ = await asyncio.wait({task, gone}, timeout=_CANCEL_S)
        for one in ended:
            one.cancelled() or one.exception()  # read, so that asyncio does not log it as never retrieved


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
