"""Logging: one line per event, with the id of the request that it belongs to.

    2026-11-22 02:00:00,000 INFO request=my-id.7 POST /v1/chat/completions 200 in 0.412 s for alice

The format `json` writes the same as one JSON object per line. No line contains what clients send, unless the
operator turns on bodies. Control characters are escaped, because a path or a message may contain a line feed and
could forge a line.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Literal

LogFormat = Literal["text", "json"]

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Id of the current request; tasks started for the request inherit it."""

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


def configure(form: LogFormat) -> None:
    """Logs INFO and above to stderr in this format; from uvicorn, only WARNING and above."""
    handler = logging.StreamHandler()
    handler.addFilter(_stamp)
    handler.setFormatter(_json() if form == "json" else OneLine())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class OneLine(logging.Formatter):
    """Formats a record as text on one line; only a traceback has several lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s request=%(request_id)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).translate(_CONTROL)


def _json() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(
        "%(asctime)s %(levelname)s %(name)s %(request_id)s %(message)s",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
    )


def _stamp(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True
