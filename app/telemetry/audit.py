"""The audit log: who asked what kind of thing, of which model, and got which verdict. It holds no texts.

    {"time": "2026-11-26T00:00:00.000Z", "request_id": "...", "caller": "alice", "address": "10.0.0.7",
     "method": "POST", "route": "/v1/chat/completions", "status": 200, "seconds": 0.41, "model": "tiny",
     "bundle": "0123...",
     "verdicts": [{"index": 0, "region": "high", "reason": null, "abstained": false, "alpha": 0.9,
                   "escalated": false}]}

One line for each request, those that were refused included; probes, metrics and the console's page have none. A route
is its pattern, so that nothing a client made up gets in. Lines are written by a thread of their own; the file may be
moved away (logrotate), then a new one is begun.
"""

from __future__ import annotations

import json
import logging
import queue
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import QueueListener, WatchedFileHandler
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.types import Scope

from candor.policy.decision import Verdict

logger = logging.getLogger("candor")

_MOST_WAITING = 10_000


class AuditFileError(Exception):
    """The file cannot be used; the message says what to do."""


@dataclass
class AuditRecord:
    """What a handler knows of its request. verdicts: by index of the choice. escalated: indices of those that another
    model answered in place of the withheld one."""

    model: str | None = None
    bundle: str | None = None
    verdicts: list[tuple[int, Verdict]] = field(default_factory=list)
    escalated: list[int] = field(default_factory=list)


def audited(request: Request, model: str, bundle: str) -> AuditRecord:
    """Returns the request's record, to which the handler adds its verdicts."""
    record = request.state.audit = AuditRecord(model, bundle)
    return record


class AuditLog:
    """path: the file; None keeps none."""

    def __init__(self, path: Path | None) -> None:
        """Raises AuditFileError."""
        self._queue: queue.Queue[Any] = queue.Queue(_MOST_WAITING)
        self._listener: QueueListener | None = None
        if path is None:
            return
        try:
            self._file = WatchedFileHandler(path, encoding="utf-8")
        except OSError as error:
            raise AuditFileError(
                f"cannot write the audit log to {path}: {error}; give CANDOR_AUDIT_LOG another"
            ) from error
        self._listener = QueueListener(self._queue, self._file)
        self._listener.start()

    def write(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        """Queues the line of a request that was answered. scope: with its `state` and `route`."""
        if self._listener is None:
            return
        state = scope.get("state", {})
        record: AuditRecord = state.get("audit") or AuditRecord()
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "request_id": request_id,
            "caller": state.get("caller"),
            "address": scope["client"][0] if scope.get("client") else None,
            "method": scope["method"],
            "route": getattr(scope.get("route"), "path", None),
            "status": status,
            "seconds": round(seconds, 4),
            "model": record.model,
            "bundle": record.bundle,
            "verdicts": [
                {
                    "index": index,
                    "region": verdict.region,
                    "reason": verdict.reason,
                    "abstained": verdict.abstained,
                    "alpha": verdict.alpha,
                    "escalated": index in record.escalated,
                }
                for index, verdict in sorted(record.verdicts, key=lambda pair: pair[0])
            ],
        }
        try:
            self._queue.put_nowait(logging.makeLogRecord({"msg": json.dumps(line)}))
        except queue.Full:
            logger.error("a line of the audit log is lost: the disk is too slow")

    def close(self) -> None:
        """Writes what waits."""
        if self._listener is not None:
            self._listener.stop()
            self._file.close()
