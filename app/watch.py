"""Looks after the engine: when it dies, nothing is answered any more and the process has to end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from engine.base import Engine, EngineDead

logger = logging.getLogger("candor")


class EngineWatch:
    """death: done, with the reason, once the engine is known to be dead."""

    def __init__(self, engine: Engine, interval_s: float, on_death: Callable[[], None]) -> None:
        self.death: asyncio.Future[EngineDead] = asyncio.get_running_loop().create_future()
        self._engine = engine
        self._interval_s = interval_s
        self._on_death = on_death

    @property
    def alive(self) -> bool:
        return not self.death.done()

    async def run(self) -> None:
        """Checks until the engine dies."""
        while self.alive:
            await self.check()
            await asyncio.sleep(self._interval_s)

    async def check(self) -> None:
        """One look. A check that fails in any way counts as death: the engine did not say that it lives."""
        try:
            await self._engine.check()
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
