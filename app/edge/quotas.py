"""Lasting quotas: the tokens that each key may use in a day (UTC), kept in a file so that a restart forgives nothing.

What was used is counted in memory and written every second; a crash forgives that second. Like a rate, a quota may be
overdrawn by the request that reaches it. Where several replicas count together, `unsent` is told to all, and `told`
has the sums.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from candor.app.edge.limits import TooFast

logger = logging.getLogger("candor")

_DAY_S = 86_400
_WRITTEN_EVERY_S = 1.0
_WAIT_FOR_LOCK_S = 1.0


class QuotaFileError(Exception):
    """The file of quotas cannot be used; the message says what to do."""


class Quotas:
    """Counts the tokens of each key and day. path: SQLite file; None keeps the count in memory alone."""

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time) -> None:
        """Raises QuotaFileError."""
        self._path = path
        self._clock = clock
        self._used: Counter[tuple[str, int]] = Counter()
        self._unwritten: Counter[tuple[str, int]] = Counter()
        self._seen: dict[str, float] = {}  # key: when it last came, s
        if path is not None:
            try:
                with closing(self._open()) as file:
                    file.execute(
                        "CREATE TABLE IF NOT EXISTS used (name TEXT, day INTEGER, tokens INTEGER, "
                        "PRIMARY KEY (name, day))"
                    )
                    rows = file.execute("SELECT name, day, tokens FROM used WHERE day >= ?", [self._day()])
                    self._used.update({(name, day): tokens for name, day, tokens in rows})
            except sqlite3.Error as error:
                raise QuotaFileError(
                    f"cannot keep quotas in {path}: {error}; give CANDOR_QUOTAS a file in a directory that can be "
                    "written"
                ) from error

    def take(self, name: str, tokens: int, per_day: int | None) -> None:
        """Counts tokens of a key. Raises TooFast, and counts nothing, if its quota is used up."""
        self._seen[name] = self._clock()
        if per_day is not None and self._used[name, self._day()] >= per_day:
            left = _DAY_S - int(self._clock()) % _DAY_S
            raise TooFast(f"this key may use {per_day} tokens a day (UTC), and has; try in {left} s", left)
        self.settle(name, tokens)

    def settle(self, name: str, tokens: int) -> None:
        """Corrects what `take` counted. tokens: may be negative."""
        day = self._day()
        self._used[name, day] += tokens
        self._unwritten[name, day] += tokens

    def unsent(self) -> dict[tuple[str, int], int]:
        """Returns what was used since the last call, by key and day; 0 for a key that came within a minute and used
        nothing, since it may have elsewhere."""
        now, day = self._clock(), self._day()
        self._seen = {name: then for name, then in self._seen.items() if now - then < 60}
        unsent, self._unwritten = {(name, day): 0 for name in self._seen} | self._unwritten, Counter()
        return unsent

    def put_back(self, unsent: Mapping[tuple[str, int], int]) -> None:
        """What could not be told is told later."""
        for entry, tokens in unsent.items():
            self._unwritten[entry] += tokens

    def told(self, sums: Mapping[tuple[str, int], int]) -> None:
        """Takes over what each key used everywhere, and adds what it used here since `unsent`."""
        for entry, tokens in sums.items():
            self._used[entry] = tokens + self._unwritten[entry]

    async def run(self) -> None:
        """Writes what was counted, until it is cancelled."""
        while True:
            await asyncio.sleep(_WRITTEN_EVERY_S)
            await asyncio.to_thread(self.write)

    def write(self) -> None:
        """Writes what was counted since the last time. What cannot be written is tried again."""
        if self._path is None or not self._unwritten:
            return
        taken, self._unwritten = self._unwritten, Counter()
        try:
            with closing(self._open()) as file, file:
                file.executemany(
                    "INSERT INTO used VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET tokens = tokens + excluded.tokens",
                    [(name, day, tokens) for (name, day), tokens in taken.items()],
                )
        except sqlite3.Error as error:
            logger.error("what keys used is not written to %s yet: %s", self._path, error)
            for entry, tokens in taken.items():
                self._unwritten[entry] += tokens

    def _open(self) -> sqlite3.Connection:
        assert self._path is not None
        return sqlite3.connect(self._path, timeout=_WAIT_FOR_LOCK_S)

    def _day(self) -> int:
        return int(self._clock()) // _DAY_S
