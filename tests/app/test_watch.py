"""An engine that is dead or stuck ends the server; one that is idle, slow or left by its clients does not."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import psutil
import pytest

from candor.app.answering.waiting import STARVED_S, EngineWatch
from candor.app.process.processors import EngineProcessors
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


class FakeProcessors:
    def __init__(self, share: float = 1.0) -> None:
        self.given = share
        self.made = 0.0

    def share(self) -> float:
        return self.given

    def steps(self) -> float:
        return self.made


def watched(
    test: Callable[[Fake, EngineWatch], Coroutine[Any, Any, None]], processors: FakeProcessors | None = None
) -> list[str]:
    """Runs a test beside a watch; what the watch reported."""
    reported: list[str] = []

    async def main() -> None:
        engine = Fake()
        watch = EngineWatch(
            engine, INTERVAL, STALL, lambda: reported.append(str(watch.death.result())), processors
        )  # type: ignore[arg-type]
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


def test_a_starved_engine_is_given_longer_and_a_stuck_one_is_not() -> None:
    """With a twentieth of the processor it has twenty times as long; one that asks for none has no more time."""
    lasted: dict[float, float] = {}

    async def test(engine: Fake, watch: EngineWatch) -> None:
        engine.stuck = True
        asking = asyncio.create_task(ask(engine, watch))
        began = monotonic()
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(watch.death), 10 * STALL)
        lasted[watch.share] = monotonic() - began
        asking.cancel()

    assert watched(test, FakeProcessors(share=0.05)) == []
    assert watched(test, FakeProcessors(share=1.0)) == [f"it is stuck: no token within {STALL} s"]
    assert lasted[0.05] >= 10 * STALL
    assert 2 * STALL <= lasted[1.0] < 8 * STALL


def test_an_engine_that_makes_steps_is_not_stuck() -> None:
    """A long prompt in small steps gives no output for long."""
    processors = FakeProcessors()

    async def test(engine: Fake, watch: EngineWatch) -> None:
        engine.stuck = True
        asking = asyncio.create_task(ask(engine, watch))
        for _ in range(8):
            processors.made += 1
            await asyncio.sleep(STALL)
        assert (watch.alive, engine.probes) == (True, 0)
        await asyncio.wait_for(asyncio.shield(watch.death), 60 * STALL)  # no more steps
        asking.cancel()

    assert watched(test, processors) == [f"it is stuck: no token within {STALL} s"]


def test_starved_is_said_and_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    processors = FakeProcessors(share=0.01)

    async def test(engine: Fake, watch: EngineWatch) -> None:
        watch._wall_s, watch._silence_s = STARVED_S, STARVED_S / 100  # as if it had been silent for so long
        with watch.waiting():
            await asyncio.sleep(5 * INTERVAL)
            assert watch.starved
        await asyncio.sleep(5 * INTERVAL)
        assert not watch.starved

    assert watched(test, processors) == []
    assert "the engine is starved: it gets 1 %" in caplog.text


def test_a_starved_server_refuses_new_requests(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def still(watch: EngineWatch, *, asked: bool = False) -> None:
        watch.starved = True

    with serve() as server:
        monkeypatch.setattr(EngineWatch, "_weigh", still)
        sleep(0.1)
        refused = server.chat("ask")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert "processor time" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "10"
        assert server.client.get("/livez").status_code == 200
        assert not server.ended.is_set()


_SPIN = "while True: pass"
_SLEEP = "import time; time.sleep(60)"


@pytest.fixture
def one_processor() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts Python code on one processor, with a niceness."""
    started: list[subprocess.Popen[bytes]] = []
    processor = min(os.sched_getaffinity(0))

    def start(code: str, nice: int) -> subprocess.Popen[bytes]:
        started.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"import os; os.nice({nice}); os.sched_setaffinity(0, {{{processor}}})\n{code}",
                ]
            )
        )
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


def test_the_share_of_real_processes(one_processor: Any, wait_until: Any) -> None:
    """One that sleeps, one that six others leave little to, and one that is stopped amid these."""
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this system does not count waiting for a processor")
    processors = EngineProcessors()

    def share_of_next(seconds: float = 1.5) -> float:
        processors.share()
        sleep(seconds)
        return processors.share()

    one_processor(_SLEEP, 0)
    sleep(0.5)
    assert share_of_next() == 1.0
    worker = one_processor(_SPIN, 19)
    for _ in range(6):
        one_processor(_SPIN, 0)
    sleep(0.5)
    me = psutil.Process(worker.pid)
    processors._processes = lambda: [me]  # type: ignore[method-assign]
    assert share_of_next() < 0.2
    me.suspend()
    wait_until(lambda: me.status() == psutil.STATUS_STOPPED)
    sleep(0.5)
    assert share_of_next() == 1.0  # it does not ask


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
