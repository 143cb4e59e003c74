"""The spool: records that wait for the database, one line of JSON each, on this machine's disk.

    append   lines and an fsync: what is in it survives the process
    taken    all lines, for as long as they are written to the database; the file is emptied once that is done

Whoever is killed between the two writes the same records twice; the database takes each once. A lock on the file
keeps processes apart, so an old server may still write while its successor starts.
"""

from __future__ import annotations

import base64
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger("candor")

Entry = tuple[str, dict[str, Any]]
"""A table's name and a row."""


class SpoolFull(OSError):
    """The spool has as many bytes as it may have."""


class Spool:
    def __init__(self, path: Path, most_bytes: int) -> None:
        """Raises OSError where the file cannot be written."""
        self.path = path
        self._most_bytes = most_bytes
        with self._opened():
            pass

    @property
    def empty(self) -> bool:
        try:
            return self.path.stat().st_size == 0
        except FileNotFoundError:
            return True

    def append(self, entries: Sequence[Entry]) -> None:
        """Raises OSError, SpoolFull among them; none of the entries is then in it."""
        lines = b"".join(json.dumps(entry, default=_text).encode() + b"\n" for entry in entries)
        with self._opened() as file:
            size = os.fstat(file).st_size
            if size + len(lines) > self._most_bytes:
                raise SpoolFull(f"{self.path} has {size} bytes, and may have {self._most_bytes}")
            # Half a line stands at the end where a process was killed as it wrote.
            whole = size == 0 or os.pread(file, 1, size - 1) == b"\n"
            try:
                _write(file, lines if whole else b"\n" + lines)
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)
                raise

    @contextmanager
    def taken(self) -> Iterator[Iterator[Entry]]:
        """Gives the entries, oldest first, and empties the file at the end of the block unless it raises."""
        with self._opened() as file, os.fdopen(os.dup(file), "rb") as lines:
            lines.seek(0)
            yield self._entries(lines)
            os.ftruncate(file, 0)
            os.fsync(file)

    def refuse(self, entry: Entry, error: Exception) -> None:
        """Puts an entry that the database will never take beside the spool."""
        logger.error("an entry is kept in %s.refused, for the store does not take it: %s", self.path, error)
        with self.path.with_name(self.path.name + ".refused").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, default=_text) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _entries(self, lines: Any) -> Iterator[Entry]:
        for line in lines:
            try:
                table, row = json.loads(line)
            except ValueError:
                logger.warning("%s has half a line, of a process that was killed as it wrote", self.path)
                continue
            yield table, {name: _value(value) for name, value in row.items()}

    @contextmanager
    def _opened(self) -> Iterator[int]:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def _write(file: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(file, left) :]


def _text(value: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(value).decode()}


def _value(value: Any) -> Any:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else value
