"""An engine that is dead or stuck ends the server; one that is idle, slow or left by its clients does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any

import httpx
import pytest

from candor.app.answering.waiting import EngineWatch
from candor.engine.base import EngineDead

INTERVAL, STALL = 0.01, 0.08


class Fake:
    """Says `words` every `pause_s`; probes are told by capture=False, and hang while `stuck`."""

    def __init__(self) -> None:
        self.stuck = False
        self.probes = 0
        self.check_hangs = False

    async def generate(self, *_: Any, capture: bool = True) -> AsyncGenerator[str, None]:
        self.probes += not capture
        if self.stuck:
            await asyncio.Event().wait()
        yield "word"

    async def check(self) -> None:
        if self.check_hangs:
            await asyncio.Event().wait()


def watched(test: Callable[[Fake, EngineWatch], Coroutine[Any, Any, None]]) -> list[str]:
    """Runs a test beside a watch; what the watch reported."""
    reported: list[str] = []

    async def main() -> None:
        engine = Fake()
        watch = EngineWatch(engine, INTERVAL, STALL, lambda: reported.append(str(watch.death.result())))  # type: ignore[arg-type]
        running = asyncio.create_task(watch.run())
        try:
            await test(engine, watch)
        finally:
            running.cancel()

    asyncio.run(main())
    return reported


async def ask(engine: Fake, watch: EngineWatch) -> list[str]:
    return [word async for word in watch.watched(engine.generate())]


def test_a_stuck_engine_is_reported_once() -> None:
    async def test(engine: Fake, watch: EngineWatch) -> None:
        engine.stuck = True
        asking = asyncio.create_task(ask(engine, watch))
        await asyncio.wait_for(asyncio.shield(watch.death), 5)
        asking.cancel()
        assert engine.probes == 1

    assert watched(test) == [f"it is stuck: no token within {STALL} s"]


def test_silence_while_nobody_waits_is_not_counted() -> None:
    async def test(engine: Fake, watch: EngineWatch) -> None:
        engine.stuck = True
        await asyncio.sleep(4 * STALL)
        assert (engine.probes, watch.alive) == (0, True)

    assert watched(test) == []


def test_an_answer_that_nobody_takes_up_is_not_the_engines_fault() -> None:
    async def test(engine: Fake, watch: EngineWatch) -> None:
        words = watch.watched(engine.generate())
        assert await anext(words) == "word"
        await asyncio.sleep(4 * STALL)  # a client that does not read
        await words.aclose()
        assert engine.probes == 0

    assert watched(test) == []


def test_clients_that_always_leave_early_do_not_end_an_engine_that_lives() -> None:
    async def test(engine: Fake, watch: EngineWatch) -> None:
        for _ in range(int(4 * STALL / INTERVAL)):
            with watch.waiting(), suppress(TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), INTERVAL)
                raise AssertionError
        assert watch.alive

    assert watched(test) == []


def test_early_leavers_are_probed_for() -> None:
    async def test(engine: Fake, watch: EngineWatch) -> None:
        async def leaves() -> None:
            with watch.waiting():
                await asyncio.sleep(60)

        for _ in range(40):
            task = asyncio.create_task(leaves())
            await asyncio.sleep(INTERVAL)
            task.cancel()
        assert engine.probes >= 1
        assert watch.alive

    assert watched(test) == []


def test_a_check_that_does_not_come_back() -> None:
    async def test(engine: Fake, watch: EngineWatch) -> None:
        engine.check_hangs = True
        await asyncio.wait_for(asyncio.shield(watch.death), 5)

    [reason] = watched(test)
    assert "its check failed" in reason


def test_an_engine_whose_probe_fails() -> None:
    class Broken(Fake):
        async def generate(self, *_: Any, capture: bool = True) -> AsyncGenerator[str, None]:
            if not capture:
                raise EngineDead("gone")
            await asyncio.Event().wait()
            yield ""

    async def test(_: Fake, watch: EngineWatch) -> None:
        watch._engine = engine = Broken()  # type: ignore[assignment]
        asking = asyncio.create_task(ask(engine, watch))
        await asyncio.wait_for(asyncio.shield(watch.death), 5)
        asking.cancel()

    [reason] = watched(test)
    assert "gone" in reason


def test_a_stuck_engine_through_http(serve: Any, engine: Any) -> None:
    """Everything hangs, the probe too: whoever waits gets 503, readiness fails, the process is told to end."""
    engine.script("", pieces=(), hangs=True)
    with serve(engine_stall_timeout_s=0.1) as server:
        response = server.chat("ask")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_dead"
        assert server.ended.wait(5)
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/livez").status_code == 200


@pytest.mark.parametrize("pause_s", [0.0, 0.02])
def test_a_slow_engine_is_left_alone(serve: Any, engine: Any, pause_s: float) -> None:
    engine.script("ask", pieces=("a",) * 20, pause_s=pause_s)
    with serve(engine_stall_timeout_s=0.1) as server:
        assert server.chat("ask").status_code == 200
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        assert not server.ended.is_set()
