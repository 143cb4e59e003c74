"""Responses in the background, without an engine: how each way of ending is told, and to whom."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from candor.app.answering.waiting import DeadlineExceeded
from candor.app.edge.limits import Refused
from candor.app.edge.routes import unattended
from candor.app.edge.routes.unattended import Unattended

QUEUED = {"id": "resp_1", "status": "queued", "output": []}


async def begun(works: Unattended, error: Exception | None = None) -> list[str]:
    """Begins one that waits for nothing, or raises; returns what was done when it had ended."""
    ended: list[str] = []

    async def work() -> None:
        await asyncio.sleep(0)
        if error is not None:
            raise error
        await asyncio.sleep(60)

    assert works.begin("resp_1", "a", QUEUED, work(), lambda: ended.append("ended")) == QUEUED
    return ended


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (Refused("too long", "input", "too_large"), "too_large", "too long"),
        (DeadlineExceeded("not answered in time"), "deadline_exceeded", "not answered in time"),
        (RuntimeError("a secret path"), "internal_error", None),
    ],
)
def test_a_failure_says_what_a_client_that_waits_is_told(
    error: Exception, code: str, message: str | None
) -> None:
    async def run() -> None:
        works = Unattended()
        ended = await begun(works, error)
        for _ in range(5):
            await asyncio.sleep(0)
        body = works.look("resp_1", "a")
        assert body is not None
        assert (body["status"], body["error"]["code"]) == ("failed", code)
        assert body["error"]["message"] == message or (message is None and "secret" not in str(body))
        assert ended == ["ended"]

    asyncio.run(run())


def test_another_caller_neither_sees_nor_cancels_it() -> None:
    async def run() -> None:
        works = Unattended()
        ended = await begun(works)
        assert works.look("resp_1", "b") is None
        assert await works.cancel("resp_1", "b") is None
        assert works.look("resp_1", "a") == QUEUED | {"status": "in_progress"}
        assert not ended
        cancelled = await works.cancel("resp_1", "a")
        assert cancelled == await works.cancel("resp_1", "a") == QUEUED | {"status": "cancelled"}
        assert ended == ["ended"]

    asyncio.run(run())


def test_what_runs_is_cancelled_at_the_end() -> None:
    async def run() -> None:
        works = Unattended()
        ended = await begun(works)
        await works.close()
        assert ended == ["ended"]

    asyncio.run(run())


def test_only_so_many_ended_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unattended, "_KEPT", 3)

    async def run() -> None:
        works = Unattended()
        done: Callable[[], None] = lambda: None  # noqa: E731
        for number in range(6):
            works.begin(f"resp_{number}", "a", QUEUED, asyncio.sleep(0), done)
            for _ in range(3):
                await asyncio.sleep(0)
        assert len(works._works) == 4  # and the newest, which runs when it is counted

    asyncio.run(run())
