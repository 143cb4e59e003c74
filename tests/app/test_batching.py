"""The micro-batcher: nobody waits when it is idle, and what comes meanwhile goes together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from candor.app.answering.batching import MicroBatcher


class Work:
    """Doubles its items and keeps the batches; waits for `gate` in each."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.started = threading.Event()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.started.set()
        assert self.gate.wait(5)
        return [2 * item for item in items]


def run(test: Callable[[Work, MicroBatcher[int, int]], object], largest: int = 3) -> Work:
    work = Work()

    async def main() -> None:
        batcher = MicroBatcher(work, largest)
        try:
            await test(work, batcher)  # type: ignore[misc]
        finally:
            work.gate.set()
            batcher.close()

    asyncio.run(main())
    return work


def test_a_lone_item_starts_at_once() -> None:
    async def test(work: Work, batcher: MicroBatcher[int, int]) -> None:
        work.gate.set()
        assert await batcher.submit(4) == 8
        assert await batcher.submit(5) == 10

    assert run(test).batches == [[4], [5]]


def test_what_comes_meanwhile_goes_together_in_order_and_bounded() -> None:
    async def test(work: Work, batcher: MicroBatcher[int, int]) -> None:
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(work.started.wait)
        rest = [asyncio.create_task(batcher.submit(i)) for i in range(1, 6)]
        await asyncio.sleep(0)
        work.gate.set()
        assert await asyncio.gather(first, *rest) == [0, 2, 4, 6, 8, 10]

    assert run(test).batches == [[0], [1, 2, 3], [4, 5]]


def test_given_up_items_are_not_worked_on() -> None:
    async def test(work: Work, batcher: MicroBatcher[int, int]) -> None:
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(work.started.wait)
        given_up, kept = (asyncio.create_task(batcher.submit(i)) for i in (1, 2))
        await asyncio.sleep(0)
        given_up.cancel()
        work.gate.set()
        assert await kept == 4
        assert await first == 0

    assert run(test).batches == [[0], [2]]


def test_an_error_reaches_its_batch_and_the_next_one_works() -> None:
    async def main() -> None:
        def work(items: list[int]) -> list[int]:
            if 13 in items:
                raise ValueError("thirteen")
            return items

        batcher = MicroBatcher(work, 4)
        results = await asyncio.gather(batcher.submit(13), batcher.submit(1), return_exceptions=True)
        assert [type(result) for result in results] == [ValueError, ValueError]
        assert await batcher.submit(2) == 2
        batcher.close()

    asyncio.run(main())


def test_a_wrong_number_of_results_is_an_error() -> None:
    async def main() -> None:
        batcher: MicroBatcher[int, int] = MicroBatcher(lambda items: [], 4)
        with pytest.raises(RuntimeError, match="expected 1 results from one batch, got 0"):
            await batcher.submit(1)
        batcher.close()

    asyncio.run(main())
