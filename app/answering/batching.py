"""Micro-batching: work that costs little more for many items than for one runs in batches, off the event loop.

Items that arrive while a batch runs form the next batch. No item waits for a batch to fill: an item that arrives
when nothing runs starts at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class MicroBatcher(Generic[Item, Result]):
    """Calls `work` on lists of at most `largest` items, in one thread, in order of arrival.

    `work` returns one result per item, in their order.
    """

    def __init__(self, work: Callable[[list[Item]], Sequence[Result]], largest: int) -> None:
        self._work = work
        self._largest = largest
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._runner: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="candor-scoring")

    def put(self, item: Item) -> asyncio.Future[Result]:
        """Queues the item at once. The future gets its result, or the exception that `work` raised on its batch."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return future

    async def submit(self, item: Item) -> Result:
        """Returns the item's result, or raises what `work` raised on its batch. Cancelling drops the item."""
        return await self.put(item)

    def close(self) -> None:
        """Stops taking work and drops the items that wait."""
        if self._runner is not None:
            self._runner.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._work_on(self._next_batch())
        finally:
            self._runner = None

    def _next_batch(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._waiting and len(batch) < self._largest:
            item, future = self._waiting.popleft()
            if not future.done():  # a future that is done was cancelled
                batch.append((item, future))
        return batch

    async def _work_on(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        if not batch:
            return
        items = [item for item, _ in batch]
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self._work, items)
            if len(results) != len(items):
                raise RuntimeError(f"expected {len(items)} results from one batch, got {len(results)}")
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)
