"""The database: opened and brought up to date, and one transaction that writes entries of all kinds.

Each entry may come twice (a spool that is taken up again, a client that sends again): a verdict counts the first
time, and of two labels of one answer by one reviewer the later stands, whichever comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import alembic.command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import (
    Connection,
    Engine,
    Table,
    and_,
    create_engine,
    event,
    inspect,
    make_url,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DataError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from candor.app.store.records import LabelledVerdict, Outcome, Receipt, Row, StoreError, StoreUnavailable
from candor.app.store.spool import Entry, Spool
from candor.app.store.tables import DISPUTES, contents, labels, thumbs, verdicts

Result = TypeVar("Result")
Answered = Receipt | Exception | None
"""What became of an entry: a label's receipt; None for a verdict, or a label of an answer that is not known."""

_CHUNK = 256
_CONTENT = ("conversation", "answer", "h", "prompt_states")
_MIGRATING = 8_213_559  # names the lock that replicas migrate under; any number


def is_shared(store: str | None) -> bool:
    """Returns whether replicas can agree through the store: a PostgreSQL database. Raises StoreError."""
    return store is not None and url_of(store).get_backend_name() == "postgresql"


def url_of(store: str) -> URL:
    """Returns the database's URL; a plain path names an SQLite file. Raises StoreError."""
    if "://" not in store:
        return URL.create("sqlite", database=store)
    try:
        url = make_url(store)
    except ArgumentError as error:
        raise StoreError(f"expected a file or a database's URL as CANDOR_STORE: {error}") from error
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError(
            f"expected a file, or the URL of SQLite or PostgreSQL, as CANDOR_STORE; got {url.drivername}://"
        )
    return url


class Database:
    """The verdicts and labels, in SQLite or PostgreSQL. Several processes may have it open."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._insert: Any = (
            postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
        )  # the same clauses

    @classmethod
    def open(cls, store: str) -> Database:
        """Opens a file or URL, and makes or mends its tables. Raises StoreError."""
        url = url_of(store)
        try:
            engine = _engine(url)
            try:
                _migrate(engine)
            except BaseException:
                engine.dispose()
                raise
        except (SQLAlchemyError, ImportError, OSError, CommandError) as error:
            raise StoreError(_why(url, error)) from error
        return cls(engine)

    def close(self) -> None:
        self.engine.dispose()

    def read(self, ask: Callable[[Connection], Result]) -> Result:
        """Returns what `ask` finds in one transaction that reads. Raises StoreUnavailable."""
        try:
            with self.engine.connect() as connection:
                return ask(connection)
        except SQLAlchemyError as error:
            raise StoreUnavailable("the store of verdicts cannot be read now; try again later") from error

    @contextmanager
    def changing(self) -> Iterator[Connection]:
        """Gives a connection in one transaction that writes. Raises SQLAlchemyError."""
        with self.engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    def write(self, entries: Sequence[Entry], spool: Spool | None = None) -> list[Answered]:
        """Writes the entries in one transaction, those of the spool before them.

        Raises SQLAlchemyError or OSError; nothing is then written, and the spool is as it was. An entry that the
        database will never take has its error as its result, and goes beside the spool.
        """
        with self.engine.connect().execution_options(writes=True) as connection:
            transaction = connection.begin()
            waiting: AbstractContextManager[Iterator[Entry]] = nullcontext(iter(()))
            if spool and not spool.empty:
                waiting = spool.taken()
            with waiting as spooled:
                chunk: list[Entry] = []
                for entry in spooled:
                    chunk.append(entry)
                    if len(chunk) == _CHUNK:
                        self._put(connection, chunk, spool)
                        chunk = []
                self._put(connection, chunk, spool)
                results = self._put(connection, entries, spool)
                transaction.commit()
        return results

    def _put(self, connection: Connection, entries: Sequence[Entry], spool: Spool | None) -> list[Answered]:
        if not entries:
            return []
        try:
            with connection.begin_nested():
                return self._put_all(connection, entries)
        except (DataError, IntegrityError) as error:
            if len(entries) > 1:
                return [found for entry in entries for found in self._put(connection, [entry], spool)]
            if spool:
                spool.refuse(entries[0], error)
            return [error]

    def _put_all(self, connection: Connection, entries: Sequence[Entry]) -> list[Answered]:
        self._put_verdicts(connection, [row for table, row in entries if table == verdicts.name])
        return [self._put_about(connection, table, row) for table, row in entries]

    def _put_about(self, connection: Connection, name: str, row: Row) -> Receipt | None:
        """Puts what is said of a verdict that is there by now."""
        if name == DISPUTES:
            of_it = and_(verdicts.c.id == row["id"], verdicts.c.choice == row["choice"])
            connection.execute(update(verdicts).where(of_it).values(disputed_by=row["disputed_by"]))
        return self._put_label(connection, name, row) if name in (thumbs.name, labels.name) else None

    def _put_verdicts(self, connection: Connection, rows: Sequence[Row]) -> None:
        if not rows:
            return
        key = tuple_(verdicts.c.id, verdicts.c.choice)
        asked = select(verdicts.c.id, verdicts.c.choice).where(
            key.in_([(row["id"], row["choice"]) for row in rows])
        )
        known = {(id, choice) for id, choice in connection.execute(asked)}
        new = {
            (row["id"], row["choice"]): row
            for row in reversed(rows)
            if (row["id"], row["choice"]) not in known
        }
        if not new:
            return
        fresh = list(reversed(new.values()))
        figures = [{name: value for name, value in row.items() if name not in _CONTENT} for row in fresh]
        connection.execute(self._insert(verdicts).on_conflict_do_nothing(), figures)
        # A forgotten answer's verdict is known, so its texts do not come back.
        kept = [
            {name: row.get(name) for name in ("id", "choice", "time", *_CONTENT)}
            for row in fresh
            if any(row.get(name) is not None for name in _CONTENT)
        ]
        if kept:
            connection.execute(self._insert(contents).on_conflict_do_nothing(), kept)

    def _put_label(self, connection: Connection, name: str, row: Row) -> Receipt | None:
        table = {thumbs.name: thumbs, labels.name: labels}[name]
        asked = select(verdicts.c.region, verdicts.c.bundle, verdicts.c.abstained, verdicts.c.covered).where(
            verdicts.c.id == row["id"], verdicts.c.choice == row["choice"]
        )
        if table is thumbs:  # one on another model's answer says nothing of ours
            asked = asked.where(verdicts.c.kind != "escalated")
        judged = connection.execute(asked).first()
        if judged is None:
            return None
        return Receipt(LabelledVerdict(*judged), self._keep(connection, table, row))

    def _keep(self, connection: Connection, table: Table, row: Row) -> Outcome:
        keys = [column.name for column in table.primary_key]
        before = (
            connection.execute(select(table).where(*(table.c[key] == row[key] for key in keys)))
            .mappings()
            .first()
        )
        said = [column.name for column in table.c if column.name in ("correct", "comment", "answer")]
        if before and (before["time"] > row["time"] or all(before[name] == row[name] for name in said)):
            return "unchanged"
        insert = self._insert(table).values(row)
        rest = {name: insert.excluded[name] for name in row if name not in keys}
        connection.execute(insert.on_conflict_do_update(index_elements=keys, set_=rest))
        return "replaced" if before else "recorded"


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": 1.0})

        @event.listens_for(engine, "connect")
        def _prepare(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # we begin transactions ourselves
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                connection.execute(f"PRAGMA {pragma}")

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            # A transaction that reads first and writes later would fail at once where another has written meanwhile.
            writes = connection.get_execution_options().get("writes", False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

        return engine
    limits = {"connect_timeout": 3, "tcp_user_timeout": 5000, "options": "-c statement_timeout=10000"}
    return create_engine(url, connect_args=limits, pool_pre_ping=True, pool_size=3)


def _migrate(engine: Engine) -> None:
    config = Config()
    folder = Path(__file__).with_name("migrations")
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _MIGRATING})
        tables = set(inspect(connection).get_table_names())
        if "feedback" in tables and "alembic_version" not in tables:
            raise CommandError(
                "it is the feedback file of an earlier Candor: give a new file, and take the old one over with "
                "`candor store import`"
            )
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")


def _why(url: URL, error: Exception) -> str:
    where = url.render_as_string(hide_password=True)
    if isinstance(error, ImportError | NoSuchModuleError):
        return f"{where} needs psycopg: install candor[postgres]"
    reason = str(getattr(error, "orig", None) or error).strip()
    if "Can't locate revision" in reason:
        reason = "a newer Candor has made it; use that one, or a copy from before"
    return (
        f"cannot keep verdicts in {where}: {reason}; expected as CANDOR_STORE a file in a directory that can be "
        "written, or the URL of a PostgreSQL database whose tables this user may make"
    )
