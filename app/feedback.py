"""The feedback store: one SQLite file with the verdicts that were given and the labels that clients sent for them.

    an answer leaves   -> (id, index, region, ...)          written soon
    feedback comes     -> (id, index, correct, comment)     on the disk before it is acknowledged

Everything goes through one queue and one thread, so an answer's row is written before the feedback on it is looked
up. Waiting items share one transaction, so one fsync. Acknowledged feedback survives the process (write-ahead
log, synchronous = FULL). The store keeps no prompts or answers, except what a client puts into `comment`.

A file that cannot be written (locked by a backup, a full disk) loses no verdict. Those given meanwhile wait, and are
tried again every second. What is too much to wait, or still waits at the end, goes to a spool beside the file, which
is taken up once the file can be written, by the next server at the latest. Feedback on such an answer is told to come
back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

from candor.app.answering.batching import MicroBatcher
from candor.policy.decision import RegionName, Verdict

logger = logging.getLogger("candor")

KEPT_VERDICTS = 1_000_000
"""Maximum verdicts kept. Older ones are deleted by count, so a clock set forward loses none. Feedback stays."""

_MOST_WAITING = 10_000
_RETRY_S = 1.0
_CLOSE_S = 10.0
_LARGEST_BATCH = 512

_SCHEMA = """
CREATE TABLE IF NOT EXISTS verdicts (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL, choice INTEGER NOT NULL,
    region TEXT NOT NULL, reason TEXT, alpha REAL NOT NULL, bundle TEXT NOT NULL,
    UNIQUE (id, choice)
);
CREATE TABLE IF NOT EXISTS feedback (
    id TEXT NOT NULL, choice INTEGER NOT NULL,
    correct INTEGER NOT NULL, comment TEXT, caller TEXT NOT NULL,
    region TEXT NOT NULL, reason TEXT, alpha REAL NOT NULL, bundle TEXT NOT NULL,
    received TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (id, choice)
);
"""


_INSERT = (
    "INSERT OR IGNORE INTO verdicts (id, choice, region, reason, alpha, bundle) VALUES (?, ?, ?, ?, ?, ?)"
)


class NoSuchAnswer(Exception):
    """Feedback refers to an answer, or an index, that this server does not know."""


class FeedbackLost(Exception):
    """Feedback could not be stored, and was not acknowledged."""


class FeedbackFileError(Exception):
    """The file cannot be used; the message says what to do."""


@dataclass(frozen=True)
class GivenVerdict:
    """A verdict that was sent. id: of the response. index: of the choice. bundle: digest of the judging bundle."""

    id: str
    index: int
    verdict: Verdict
    bundle: str


def _row(given: GivenVerdict) -> list[str | int | float | None]:
    verdict = given.verdict
    return [given.id, given.index, verdict.region, verdict.reason, verdict.alpha, given.bundle]


@dataclass(frozen=True)
class Feedback:
    """correct: whether the answer follows its instruction. caller: name of the key that sent it."""

    id: str
    index: int
    correct: bool
    comment: str | None
    caller: str


@dataclass(frozen=True)
class Receipt:
    """The outcome of feedback: it is new, unchanged, or replaces earlier feedback on the same choice.

    region, bundle: those of the verdict that it refers to.
    """

    region: RegionName
    bundle: str
    outcome: Literal["recorded", "unchanged", "replaced"]


class FeedbackStore:
    """Owns the SQLite file. Only one process may use the file at a time."""

    def __init__(self, path: Path, kept: int = KEPT_VERDICTS) -> None:
        """Raises FeedbackFileError."""
        self._path = path
        self._kept = kept
        try:
            self._file = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = FULL")
            self._file.executescript(_SCHEMA)
        except sqlite3.Error as error:
            if hasattr(self, "_file"):
                self._file.close()
            raise FeedbackFileError(
                f"cannot keep feedback in {path}: {error}; give CANDOR_FEEDBACK a file in a directory that can be "
                "written"
            ) from error
        self._batcher: MicroBatcher[GivenVerdict | Feedback, Receipt | None] = MicroBatcher(
            self._write, _LARGEST_BATCH
        )
        self._waiting: dict[tuple[str, int], GivenVerdict] = {}
        self._spool = path.with_name(path.name + ".spool")
        self._taken = path.with_name(path.name + ".spool.taken")
        self._spool_lock = Lock()
        self._spooled = self._spool.exists() or self._taken.exists()
        self._failing = False

    def note(self, answers: Iterable[GivenVerdict]) -> None:
        """Queues verdicts that are about to be sent; they are written soon, and nobody waits for them."""
        for one in answers:
            if len(self._waiting) >= _MOST_WAITING:
                self._put_aside([one])
            else:
                self._waiting[one.id, one.index] = one
                self._queue(one)

    async def take(self, feedback: Feedback) -> Receipt:
        """Returns once the feedback is on disk. Raises NoSuchAnswer or FeedbackLost; it is then not stored."""
        try:
            receipt = await self._batcher.submit(feedback)
        except sqlite3.Error as error:
            logger.error("feedback could not be kept in %s: %s", self._path, error)
            raise FeedbackLost("the feedback could not be kept; send it again later") from error
        if receipt is None and ((feedback.id, feedback.index) in self._waiting or self._spooled):
            raise FeedbackLost("the answer's verdict is not on the disk yet; send the feedback again later")
        if receipt is None:
            raise NoSuchAnswer(
                f"no verdict of this server has the id {feedback.id[:100]!a} and the index {feedback.index}: give "
                "those of a response with a `reliability` object"
            )
        return receipt

    async def close(self) -> None:
        """Writes the waiting items (for at most 10 s; then to the spool) and closes the file."""
        deadline = asyncio.get_running_loop().time() + _CLOSE_S
        while self._waiting and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        self._batcher.close()
        if self._waiting:
            self._put_aside(self._waiting.values())
        self._file.close()

    def _queue(self, one: GivenVerdict) -> None:
        row = self._batcher.put(one)
        row.add_done_callback(lambda row: self._noted(one, row))

    def _noted(self, one: GivenVerdict, row: asyncio.Future[Receipt | None]) -> None:
        if row.cancelled():
            return
        if error := row.exception():
            if not self._failing:
                logger.error("verdicts wait, for they cannot be written to %s: %s", self._path, error)
            self._failing = True
            row.get_loop().call_later(_RETRY_S, self._queue, one)
        else:
            self._failing = False
            self._waiting.pop((one.id, one.index), None)

    def _put_aside(self, verdicts: Iterable[GivenVerdict]) -> None:
        """Appends verdicts to the spool."""
        try:
            with self._spool_lock, self._spool.open("a", encoding="utf-8") as spool:
                spool.writelines(json.dumps(_row(one)) + "\n" for one in verdicts)
        except OSError as error:
            logger.error("verdicts are lost: neither %s nor its spool can be written: %s", self._path, error)
        else:
            self._spooled = True

    def _take_up(self, cursor: sqlite3.Cursor) -> None:
        """Writes what the spool holds, half a last line excepted. It is moved first: more may come."""
        with self._spool_lock:
            if not self._taken.exists():
                self._spool.replace(self._taken)
        for line in self._taken.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                cursor.execute(_INSERT, json.loads(line))

    def _write(self, items: Sequence[GivenVerdict | Feedback]) -> list[Receipt | None]:
        """Writes the items in one transaction; it runs in the batcher's thread."""
        with closing(self._file.cursor()) as cursor:
            cursor.execute("BEGIN IMMEDIATE")
            took_up = self._spooled
            try:
                if took_up:
                    self._take_up(cursor)
                receipts: list[Receipt | None] = []
                for one in items:
                    if isinstance(one, Feedback):
                        receipts.append(self._keep(cursor, one))
                    else:
                        cursor.execute(_INSERT, _row(one))
                        receipts.append(None)
                cursor.execute(
                    "DELETE FROM verdicts WHERE number <= (SELECT max(number) FROM verdicts) - ?",
                    [self._kept],
                )
                cursor.execute("COMMIT")
            except BaseException:
                if self._file.in_transaction:  # SQLite has already rolled back on a full disk
                    cursor.execute("ROLLBACK")
                raise
            if took_up:
                self._taken.unlink()
                self._spooled = self._spool.exists()
        return receipts

    def _keep(self, cursor: sqlite3.Cursor, new: Feedback) -> Receipt | None:
        where = [new.id, new.index]
        verdict = cursor.execute(
            "SELECT region, reason, alpha, bundle FROM verdicts WHERE id = ? AND choice = ?", where
        ).fetchone()
        before = cursor.execute(
            "SELECT region, reason, alpha, bundle, correct, comment FROM feedback WHERE id = ? AND choice = ?",
            where,
        ).fetchone()
        verdict = verdict or (before and before[:4])
        if verdict is None:
            return None
        if before and (bool(before[4]), before[5]) == (new.correct, new.comment):
            return Receipt(verdict[0], verdict[3], "unchanged")
        cursor.execute(
            "INSERT OR REPLACE INTO feedback (id, choice, correct, comment, caller, region, reason, alpha, bundle) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [*where, new.correct, new.comment, new.caller, *verdict],
        )
        return Receipt(verdict[0], verdict[3], "replaced" if before else "recorded")
