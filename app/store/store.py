"""The server's store: a thread writes what is given to it; only feedback and labels wait for it.

    note    a verdict that is about to be sent     queued, nobody waits
    take    a client's feedback                    returns once it is durable
    label   a reviewer's label                     likewise

Waiting items share one transaction, so one fsync. Where the database cannot be written (locked by a backup, a full
disk, a server that is away), they go to the spool, and from there into the database once it can be written again, by
the next server at the latest. Durable means: committed there, or in the spool, with an fsync. Where neither can be
written, verdicts wait in memory and labels are told to come back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import Connection, delete, exists, func, select, update
from sqlalchemy.exc import SQLAlchemyError

from candor.app.store.database import Answered, Database, url_of
from candor.app.store.drawing import Drawing
from candor.app.store.records import (
    Dispute,
    Draw,
    Feedback,
    GivenVerdict,
    Label,
    LabelledVerdict,
    LabelNotKept,
    NoSuchAnswer,
    Outcome,
    Receipt,
    StoreError,
    plain,
)
from candor.app.store.spool import Entry, Spool
from candor.app.store.tables import DISPUTES, contents, labels, thumbs, verdicts

logger = logging.getLogger("candor")

Keep = Literal["none", "drawn", "all"]
Result = TypeVar("Result")

_MOST_WAITING = 10_000
"""Items that wait for the thread, and verdicts that it remembers; further verdicts are lost, and said to be."""
_LARGEST_BATCH = 512
_RETRY_S = 1.0
_CLOSE_S = 10.0
_TIDY_S = 60.0
_SAY_S = 10.0
_DAY_S = 86_400.0


@dataclass(frozen=True)
class Keeping:
    """texts, states: of which answers they are kept. days: after which they go, with every comment.

    verdicts: how many are kept; beyond, the oldest that were neither drawn nor labelled go.
    """

    texts: Keep = "none"
    states: Keep = "none"
    days: float = 30.0
    verdicts: int = 1_000_000


@dataclass(frozen=True, eq=False)
class _Item:
    """An entry on its way, and who waits for it. make: None where somebody only waits for those before."""

    make: Callable[[], Entry] | None
    future: Future[Answered] | None = None


class VerdictStore:
    """One store for all replicas, or one of a replica's own. Its spool belongs to this machine."""

    def __init__(
        self,
        store: str,
        spool: Path | None = None,
        *,
        drawing: Drawing | None = None,
        keeping: Keeping | None = None,
        most_spooled_bytes: int = 1 << 28,
    ) -> None:
        """store: a file or a database's URL. spool: by default beside the file. Raises StoreError."""
        url = url_of(store)
        if spool is None:
            if url.get_backend_name() != "sqlite" or url.database is None:
                raise StoreError(
                    "expected CANDOR_STORE_SPOOL, a file on this machine's disk for what comes while the database "
                    "is away; got none"
                )
            spool = Path(url.database + ".spool")
        self._where = url.render_as_string(hide_password=True)
        self.database = Database.open(store)
        try:
            self._spool = Spool(spool, most_spooled_bytes)
        except OSError as error:
            self.database.close()
            raise StoreError(
                f"cannot write the spool {spool}: {error}; give CANDOR_STORE_SPOOL another"
            ) from error
        self._drawing = drawing or Drawing(0.0)
        self._keeping = keeping or Keeping()
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._held: deque[Entry] = deque()  # verdicts that can be written nowhere
        self._recent: OrderedDict[tuple[str, int], LabelledVerdict] = OrderedDict()
        self._spooled: dict[tuple[str, ...], Entry] = {}  # labels that wait, to tell those that come again
        self._retry_at = 0.0
        self._tidy_at = 0.0
        self._say_at = 0.0
        self.lost = 0
        """Verdicts that were given while neither database nor spool could be written, and for too long."""
        self._thread = threading.Thread(target=self._run, name="candor-store", daemon=True)
        self._thread.start()

    @property
    def behind(self) -> bool:
        """Whether something waits for the database."""
        return bool(self._held) or not self._spool.empty

    def note(self, answers: Iterable[GivenVerdict]) -> None:
        """Queues verdicts that are about to be sent, and draws those that are audited. Nobody waits for them."""
        for given in answers:
            if self._queue.qsize() >= _MOST_WAITING:
                self._lose(1)
                continue
            draw = self._drawing.draw(given)
            self._queue.put(_Item(lambda given=given, draw=draw: self._verdict(given, draw)))  # type: ignore[misc]

    def dispute(self, dispute: Dispute) -> None:
        """Queues the flag of a verdict that was noted. Nobody waits for it."""
        if self._queue.qsize() < _MOST_WAITING:  # a flag that is lost costs nothing but attention
            self._queue.put(_Item(lambda: (DISPUTES, dispute.row())))

    async def take(self, feedback: Feedback) -> Receipt:
        """Returns once the feedback is durable. Raises NoSuchAnswer or LabelNotKept; it is then not stored."""
        return await self._submit(feedback.id, feedback.index, (thumbs.name, feedback.row()))

    async def label(self, label: Label) -> Receipt:
        """Returns once the label is durable. Raises NoSuchAnswer or LabelNotKept; it is then not stored."""
        return await self._submit(label.id, label.index, (labels.name, label.row()))

    async def read(self, ask: Callable[[Connection], Result]) -> Result:
        """Returns what `ask` finds, in another thread. Raises StoreUnavailable."""
        return await asyncio.to_thread(self.database.read, ask)

    async def written(self) -> None:
        """Returns once all that was given before is written, or spooled."""
        future: Future[Answered] = Future()
        self._queue.put(_Item(None, future))
        await asyncio.wrap_future(future)

    async def close(self) -> None:
        """Writes what waits, to the database or the spool, and closes both."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join, _CLOSE_S)
        if self._held:
            self._lose(len(self._held))
        self.database.close()

    async def _submit(self, id: str, index: int, entry: Entry) -> Receipt:
        future: Future[Answered] = Future()
        self._queue.put(_Item(lambda: entry, future))
        found = await asyncio.wrap_future(future)
        if isinstance(found, Receipt):
            return found
        if found is not None:
            raise LabelNotKept("it could not be kept; send it again later") from found
        raise NoSuchAnswer(
            f"no verdict of this server has the id {id[:100]!a} and the index {index}: give those of a response with "
            "a `reliability` object"
        )

    def _verdict(self, given: GivenVerdict, draw: Draw) -> Entry:
        row = given.row(draw)
        if given.content is not None:
            if _kept(self._keeping.texts, draw):
                row["conversation"] = json.dumps(given.content.conversation, ensure_ascii=False)
                row["answer"] = given.content.answer
            if _kept(self._keeping.states, draw):
                row |= given.content.states()
        return verdicts.name, row

    # What follows runs in the thread.

    def _run(self) -> None:
        ending = False
        while not ending:
            items, ending = self._batch()
            try:
                self._work(items, last=ending)
            except Exception as error:  # nobody may be left waiting
                logger.exception("the store of verdicts failed")
                for item in items:
                    if item.future and not item.future.done():
                        item.future.set_result(error)

    def _batch(self) -> tuple[list[_Item], bool]:
        """Waits for items; returns them, and whether they are the last."""
        items: list[_Item] = []
        timeout = _RETRY_S if self.behind else _TIDY_S
        while len(items) < _LARGEST_BATCH:
            try:
                item = self._queue.get(timeout=0 if items else timeout)
            except queue.Empty:
                break
            if item is None:
                return items, True
            items.append(item)
        return items, False

    def _work(self, items: list[_Item], *, last: bool) -> None:
        asking = [item for item in items if item.make is None]
        items = [item for item in items if item.make is not None]
        made = [item.make() for item in items if item.make is not None]
        entries = [(table, plain(row)) for table, row in made]
        for table, row in entries:
            if table == verdicts.name and row["kind"] != "escalated":
                self._remember(row)
        now = time.monotonic()
        results: list[Answered] | None = None
        if (entries or self.behind) and (now >= self._retry_at or last):
            results = self._to_database(entries)
        if results is None:
            results = self._to_spool(entries)
        for item, result in zip([*items, *asking], [*results, *([None] * len(asking))], strict=True):
            if item.future:
                item.future.set_result(result)
        if now >= max(self._tidy_at, self._retry_at):
            self._tidy_at = now + _TIDY_S
            self._tidy()

    def _to_database(self, entries: list[Entry]) -> list[Answered] | None:
        held = list(self._held)
        try:
            results = self.database.write([*held, *entries], self._spool)[len(held) :]
        except (SQLAlchemyError, OSError) as error:
            if self._retry_at == 0.0:
                reason = getattr(error, "orig", None) or error
                logger.error("verdicts wait, for they cannot be written to %s: %s", self._where, reason)
            self._retry_at = time.monotonic() + _RETRY_S
            return None
        if self._retry_at:
            logger.info("what waited is written to %s", self._where)
        self._retry_at = 0.0
        self._held.clear()
        self._spooled.clear()
        return results

    def _to_spool(self, entries: list[Entry]) -> list[Answered]:
        """Keeps what the database does not take. A label is acknowledged if its answer was given by this server."""
        results = [self._seen(entry) for entry in entries]
        kept = [
            entry
            for entry, result in zip(entries, results, strict=True)
            if entry[0] in (verdicts.name, DISPUTES) or isinstance(result, Receipt)
        ]
        kept = [*self._held, *kept]
        if not kept:
            return results
        try:
            self._spool.append(kept)
        except OSError as error:
            self._complain(error)
            waiting = [entry for entry in kept if entry[0] == verdicts.name]
            self._lose(max(0, len(waiting) - _MOST_WAITING))
            self._held = deque(waiting, maxlen=_MOST_WAITING)
            return [error if isinstance(result, Receipt) else result for result in results]
        self._held.clear()
        for entry in kept:
            if entry[0] in (thumbs.name, labels.name):
                self._spooled[_name(entry)] = entry
        return results

    def _seen(self, entry: Entry) -> Answered:
        """Returns the receipt of a label that is to be spooled."""
        table, row = entry
        if table in (verdicts.name, DISPUTES):
            return None
        judged = self._recent.get((row["id"], row["choice"]))
        if judged is None:
            return LabelNotKept("the answer is not known here, and the database cannot be asked")
        before = self._spooled.get(_name(entry))
        said = ("correct", "comment", "answer")
        outcome: Outcome = "recorded"
        if before is not None:
            same = all(before[1].get(name) == row.get(name) for name in said)
            outcome = "unchanged" if same else "replaced"
        return Receipt(judged, outcome)

    def _remember(self, row: dict[str, Any]) -> None:
        self._recent[row["id"], row["choice"]] = LabelledVerdict(
            row["region"], row["bundle"], row["abstained"], row["covered"]
        )
        if len(self._recent) > _MOST_WAITING:
            self._recent.popitem(last=False)

    def _tidy(self) -> None:
        """Deletes what is too old or too much."""
        oldest = time.time() - self._keeping.days * _DAY_S
        labelled = [
            exists().where(table.c.id == verdicts.c.id, table.c.choice == verdicts.c.choice)
            for table in (thumbs, labels)
        ]
        try:
            with self.database.changing() as connection:
                connection.execute(delete(contents).where(contents.c.time < oldest))
                for table in (thumbs, labels):
                    old = (table.c.time < oldest, table.c.comment.is_not(None))
                    connection.execute(update(table).where(*old).values(comment=None))
                newest = connection.scalar(select(func.max(verdicts.c.number))) or 0
                connection.execute(
                    delete(verdicts).where(
                        verdicts.c.number <= newest - self._keeping.verdicts,
                        ~verdicts.c.drawn,
                        *(~one for one in labelled),
                    )
                )
        except SQLAlchemyError as error:
            logger.warning("old verdicts and texts stay for now: %s", getattr(error, "orig", None) or error)

    def _complain(self, error: OSError) -> None:
        if time.monotonic() >= self._say_at:
            self._say_at = time.monotonic() + _SAY_S
            logger.error("neither %s nor its spool can be written: %s", self._where, error)

    def _lose(self, count: int) -> None:
        self.lost += count
        if count and time.monotonic() >= self._say_at:
            self._say_at = time.monotonic() + _SAY_S
            logger.error("%d verdicts are lost by now: %s cannot keep pace", self.lost, self._where)


def forget(database: Database, id: str, index: int | None = None) -> int:
    """Deletes texts, states, comments, human answers and the key's name of an answer; figures and labels stay.

    index: None takes all its choices. Returns how many choices there were. Raises SQLAlchemyError.
    """

    def of(table: Any) -> list[Any]:
        return [table.c.id == id] + ([] if index is None else [table.c.choice == index])

    with database.changing() as connection:
        connection.execute(delete(contents).where(*of(contents)))
        connection.execute(update(thumbs).where(*of(thumbs)).values(comment=None))
        connection.execute(update(labels).where(*of(labels)).values(comment=None, answer=None))
        return connection.execute(update(verdicts).where(*of(verdicts)).values(caller=None)).rowcount


def _kept(keep: Keep, draw: Draw) -> bool:
    return keep == "all" or (keep == "drawn" and draw.drawn)


def _name(entry: Entry) -> tuple[str, ...]:
    table, row = entry
    return (table, row["id"], str(row["choice"]), row.get("reviewer", ""))
