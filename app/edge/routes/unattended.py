"""Responses that are written while nobody waits for them: `background` of /v1/responses.

    begin -> "queued" -> look: "in_progress" -> done: the stored response, with its reliability
                                             -> "failed", with what an attended request would have been told
                         cancel -> "cancelled"

They are kept in this process, as stored responses are, and end with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, cast

from candor.app.edge.errors import broke_off, describe

_KEPT = 1000
"""Ended ones at most of which it is still said how they ended."""
_CANCEL_S = 5.0
"""Seconds at most to wait for cancelled work to end."""


@dataclass(frozen=True)
class _Work:
    caller: str
    queued: dict[str, Any]
    task: asyncio.Task[object]

    @property
    def body(self) -> dict[str, Any] | None:
        """None once it is done, and the response is stored."""
        if not self.task.done():
            return self.queued | {"status": "in_progress"}
        if self.task.cancelled():
            return self.queued | {"status": "cancelled"}
        error = cast(Exception | None, self.task.exception())
        if error is None:
            return None
        said = describe(error)
        return self.queued | {
            "status": "failed",
            "error": {"code": said.code or "server_error", "message": said.message},
        }


class Unattended:
    def __init__(self) -> None:
        self._works: dict[str, _Work] = {}

    def begin(
        self,
        response_id: str,
        caller: str,
        queued: dict[str, Any],
        work: Coroutine[Any, Any, object],
        after: Callable[[], None],
    ) -> dict[str, Any]:
        """Returns `queued`, the response's body before there is one. after: runs when the work ended in any way."""
        task = asyncio.create_task(work, name=response_id)
        task.add_done_callback(lambda _: after())
        task.add_done_callback(_told)
        self._works[response_id] = _Work(caller, queued, task)
        ended = [name for name, one in self._works.items() if one.task.done()]
        for name in ended[:-_KEPT]:
            del self._works[name]
        return queued

    def look(self, response_id: str, caller: str) -> dict[str, Any] | None:
        """Returns the body of one that runs, failed or was cancelled; None for any other, or another caller's."""
        work = self._works.get(response_id)
        return work.body if work is not None and work.caller == caller else None

    async def cancel(self, response_id: str, caller: str) -> dict[str, Any] | None:
        """Cancels one that runs. Returns as `look`."""
        work = self._works.get(response_id)
        if work is not None and work.caller == caller and work.task.cancel():
            await asyncio.wait({work.task}, timeout=_CANCEL_S)
        return self.look(response_id, caller)

    async def close(self) -> None:
        """Cancels what still runs."""
        running = [one.task for one in self._works.values() if one.task.cancel()]
        if running:
            await asyncio.wait(running, timeout=_CANCEL_S)


def _told(task: asyncio.Task[object]) -> None:
    """Logs what is the server's own fault."""
    error = None if task.cancelled() else cast(Exception | None, task.exception())
    if error is not None and describe(error).status >= 500:
        broke_off(f"the response {task.get_name()}", error)
