"""The store: what is acknowledged is durable, counted once and belongs to an answer that was given.

Held on a real SQLite file and, where there is one, on a real PostgreSQL.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import inspect, select, text
from typer.testing import CliRunner

from candor.app.cli import cli
from candor.app.store import reading
from candor.app.store.database import Database, url_of
from candor.app.store.drawing import Drawing
from candor.app.store.records import (
    Content,
    Dispute,
    Draw,
    Feedback,
    GivenVerdict,
    Label,
    LabelledVerdict,
    LabelNotKept,
    NoSuchAnswer,
    Receipt,
    StoreError,
)
from candor.app.store.spool import Spool
from candor.app.store.store import Keeping, VerdictStore, forget
from candor.app.store.tables import metadata
from candor.engine.base import HiddenSummary, PromptStates, Representation
from candor.policy.agreement import Agreement
from candor.policy.certificate import RuleCertificate
from candor.policy.decision import RuleFigures, Verdict

ROOT = Path(__file__).resolve().parents[2]
HIGH = Verdict("high", False, None, 0.9, calibrated=True)
LOW = Verdict("low", True, "below_score_threshold", 0.9, calibrated=True)
CERTIFICATE = RuleCertificate(0.9, 0.95, 0.95, 1.5, 400, 200, 198, 300, 0.96)
COVERED = Verdict(
    "high",
    False,
    None,
    0.9,
    calibrated=True,
    certificate=CERTIFICATE,
    rule=RuleFigures(True, 0.4, False, 2.0, 1.5, 0.97),
)
JUDGED = LabelledVerdict("high", "digest", False, False)


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A file, or the URL of a new database."""
    if request.param == "sqlite":
        return str(tmp_path / "store.db")
    return str(request.getfixturevalue("postgres").database())


@pytest.fixture
def opened(where: str, tmp_path: Path) -> Callable[..., VerdictStore]:
    return lambda **more: VerdictStore(where, tmp_path / "spool", **more)


def given(number: int | str, verdict: Verdict = HIGH, **more: Any) -> GivenVerdict:
    return GivenVerdict(f"a{number}", 0, verdict, "digest", "tiny", "two-gates", **more)


def thumb(number: int | str, correct: bool = True, comment: str | None = None, **more: Any) -> Feedback:
    return Feedback(f"a{number}", 0, correct, comment, "alice", **more)


def rows(where: str, table: str) -> list[dict[str, Any]]:
    database = Database.open(where)
    try:
        asked = select(metadata.tables[table])
        return database.read(lambda connection: [dict(row) for row in connection.execute(asked).mappings()])
    finally:
        database.close()


def with_store(store: VerdictStore, work: Callable[[VerdictStore], Any]) -> Any:
    async def main() -> Any:
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(main())


def test_what_is_given_and_what_comes_back(opened: Any, where: str) -> None:
    async def work(store: VerdictStore) -> None:
        store.note([given(1, COVERED, caller="bob"), given(2, LOW)])
        assert await store.take(thumb(1, comment="no\0")) == Receipt(
            LabelledVerdict("high", "digest", False, True), "recorded"
        )
        assert (await store.take(thumb(1, comment="no\0"))).outcome == "unchanged"
        assert (await store.take(thumb(1, False))).outcome == "replaced"
        assert (await store.label(Label("a1", 0, True, "ann"))).outcome == "recorded"
        assert (await store.label(Label("a1", 0, None, "ben"))).outcome == "recorded"
        for unknown in (
            thumb(3),
            Feedback("a1", 1, True, None, "x"),
            Feedback("' OR 1=1 --", 0, True, None, "x"),
        ):
            with pytest.raises(NoSuchAnswer):
                await store.take(unknown)

    with_store(opened(), work)
    one, two = rows(where, "verdicts")
    assert (one["id"], one["covered"], one["accuracy"], one["score"], one["caller"]) == (
        "a1",
        True,
        0.95,
        2.0,
        "bob",
    )
    assert (one["prompt_p_value"], one["probability"], one["reason"]) == (0.4, 0.97, None)
    assert (two["abstained"], two["reason"], two["covered"], two["accuracy"]) == (
        True,
        "below_score_threshold",
        False,
        None,
    )
    [kept] = rows(where, "thumbs")
    assert (kept["correct"], kept["comment"]) == (False, None)
    assert {one["reviewer"]: one["correct"] for one in rows(where, "labels")} == {"ann": True, "ben": None}


def test_many_at_once_are_all_kept(opened: Any, where: str) -> None:
    async def work(store: VerdictStore) -> Any:
        store.note(given(number) for number in range(1500))
        return await asyncio.gather(*(store.take(thumb(number)) for number in range(1500)))

    assert with_store(opened(), work) == [Receipt(JUDGED, "recorded")] * 1500
    assert len(rows(where, "thumbs")) == 1500
    assert [row["id"] for row in rows(where, "verdicts")] == [f"a{number}" for number in range(1500)]


def test_it_is_known_after_a_restart_and_to_every_replica(opened: Any, where: str, tmp_path: Path) -> None:
    async def first(store: VerdictStore) -> None:
        store.note([given(1)])

    with_store(opened(), first)
    other = VerdictStore(where, tmp_path / "other")
    assert with_store(other, lambda store: store.take(thumb(1))) == Receipt(JUDGED, "recorded")


def test_of_two_thumbs_the_later_stands_whichever_comes_first(opened: Any, where: str) -> None:
    async def work(store: VerdictStore) -> Any:
        store.note([given(1)])
        await store.take(thumb(1, True, time=2000.0))
        return await store.take(thumb(1, False, time=1000.0))

    assert with_store(opened(), work).outcome == "unchanged"
    assert [row["correct"] for row in rows(where, "thumbs")] == [True]


def test_the_tables_are_those_of_the_migrations(where: str) -> None:
    database = Database.open(where)
    with database.engine.connect() as connection:
        seen = inspect(connection)
        for name, table in metadata.tables.items():
            columns = {one["name"]: one for one in seen.get_columns(name)}
            assert set(columns) == set(table.c.keys())
            assert {name: one["nullable"] for name, one in columns.items()} == {
                column.name: bool(column.nullable) for column in table.c
            }
            assert seen.get_pk_constraint(name)["constrained_columns"] == [
                one.name for one in table.primary_key
            ]
            assert {one["name"] for one in seen.get_indexes(name)} >= {one.name for one in table.indexes}
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == "0003"
    database.close()
    Database.open(where).close()  # nothing to do the second time


def test_a_store_of_a_newer_candor_is_refused(where: str) -> None:
    database = Database.open(where)
    with database.changing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(StoreError, match="a newer Candor"):
        Database.open(where)


@pytest.mark.parametrize(
    ("store", "why"),
    [
        ("{folder}", "CANDOR_STORE"),
        ("{folder}/none/f", "CANDOR_STORE"),
        ("{folder}/text", "not a database"),
        ("mysql://x/y", "expected a file, or the URL"),
        ("://", "expected a file or a database"),
        ("postgresql://u:secret@127.0.0.1:9/none", "CANDOR_STORE"),
    ],
)
def test_a_store_that_cannot_be_used(tmp_path: Path, store: str, why: str) -> None:
    (tmp_path / "text").write_text("this is no database, but long enough to look like one" * 10)
    with pytest.raises(StoreError, match=why) as refused:
        VerdictStore(store.format(folder=tmp_path), tmp_path / "spool")
    assert "secret" not in str(refused.value)


def test_postgresql_needs_a_spool() -> None:
    with pytest.raises(StoreError, match="CANDOR_STORE_SPOOL"):
        VerdictStore("postgresql://127.0.0.1/x")


def test_a_plain_file_is_sqlite() -> None:
    assert (url_of("/a/b%c.db").drivername, url_of("/a/b%c.db").database) == ("sqlite", "/a/b%c.db")


# --- what cannot be written


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Another process holds the file, as a backup may."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


async def until(holds: Callable[[], bool], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        await asyncio.sleep(0.05)


def test_a_locked_file_holds_nothing_up(tmp_path: Path) -> None:
    """Longer than SQLite waits: feedback on answers of this server is taken all the same, and all of it arrives."""
    path = str(tmp_path / "store.db")

    async def work(store: VerdictStore) -> list[str]:
        with locked(path):
            store.note(given(number) for number in range(300))
            receipts = await asyncio.gather(*(store.take(thumb(number)) for number in range(200)))
            receipts += [await store.take(thumb(0)), await store.take(thumb(0, False))]
            assert store.behind
            with pytest.raises(LabelNotKept):
                await store.take(thumb("unknown"))
            time.sleep(1.5)
            receipts.append(await store.take(thumb(250)))
        await until(lambda: not store.behind)
        receipts.append(await store.take(thumb(0, False)))
        with pytest.raises(NoSuchAnswer):
            await store.take(thumb("unknown"))
        return [one.outcome for one in receipts]

    outcomes = with_store(VerdictStore(path), work)
    assert outcomes == ["recorded"] * 200 + ["unchanged", "replaced", "recorded", "unchanged"]
    assert [row["id"] for row in rows(path, "verdicts")] == [f"a{number}" for number in range(300)]
    kept = {row["id"]: row["correct"] for row in rows(path, "thumbs")}
    assert len(kept) == 201
    assert kept["a0"] is False


def test_a_database_that_is_away(postgres: Any, tmp_path: Path) -> None:
    where = postgres.database()

    async def work(store: VerdictStore) -> None:
        store.note([given("before")])
        await store.take(thumb("before"))
        postgres.stop(kill=True)
        try:
            started = time.monotonic()
            store.note(given(number, COVERED) for number in range(50))
            for number in range(50):
                assert (await store.take(thumb(number))).outcome == "recorded"
            assert time.monotonic() - started < 10  # nobody waits for each connection that fails
            assert store.behind
            with pytest.raises(LabelNotKept):
                await store.take(thumb("unknown"))
        finally:
            await asyncio.to_thread(postgres.start)
        await until(lambda: not store.behind)
        assert (await store.take(thumb(7))).outcome == "unchanged"

    with_store(VerdictStore(where, tmp_path / "spool"), work)
    assert len(rows(where, "verdicts")) == len(rows(where, "thumbs")) == 51


def test_a_full_disk_takes_nothing_and_loses_nothing(tmp_path: Path) -> None:
    """SQLite's own limit on the file's pages stands for the disk: the same error, at the same place."""
    path = str(tmp_path / "store.db")

    async def work(store: VerdictStore) -> int:
        store.note(given(number) for number in range(200))
        await store.take(thumb(0))
        await until(lambda: not store.behind)

        def limited(pages: int) -> None:
            store.database.engine.dispose()
            with store.database.engine.connect() as connection:  # the pool keeps this one connection
                connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        limited(1)  # less than it has: no page can be added
        store._spool._most_bytes = 100_000
        acknowledged = 1
        for number in range(1, 200):
            try:
                await store.take(thumb(number, comment="x" * 1000))
            except LabelNotKept:
                break
            acknowledged += 1
        store.note([given("held")])
        with pytest.raises(LabelNotKept):
            await store.take(thumb(199, comment="x" * 1000))
        store._spool._most_bytes = 1 << 20
        limited(100_000)
        await until(lambda: not store.behind)
        assert (await store.take(thumb("held"))).outcome == "recorded"
        return acknowledged

    acknowledged = with_store(VerdictStore(path), work)
    assert 20 < acknowledged < 199
    assert len(rows(path, "thumbs")) == acknowledged + 1


def test_nothing_can_be_written_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest verdicts wait in memory; how many are lost is counted."""
    monkeypatch.setattr("candor.app.store.store._MOST_WAITING", 50)
    path = str(tmp_path / "store.db")

    async def work(store: VerdictStore) -> int:
        store._spool._most_bytes = 0
        with locked(path):
            for start in range(0, 120, 20):
                store.note(given(number) for number in range(start, start + 20))
                await until(store._queue.empty)
            await until(lambda: store.lost > 0)
        await until(lambda: not store.behind)
        return store.lost

    lost = with_store(VerdictStore(path), work)
    kept = [row["id"] for row in rows(path, "verdicts")]
    assert len(kept) + lost == 120
    assert kept == [f"a{number}" for number in range(lost, 120)]


def test_what_waits_at_the_end_is_taken_up_by_the_next_server(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")

    async def first(store: VerdictStore) -> None:
        with locked(path):
            store.note(given(number) for number in range(20))
            await store.close()

    async def second(store: VerdictStore) -> Any:
        with pytest.raises(NoSuchAnswer):
            await store.take(thumb("b"))
        return [await store.take(thumb(number)) for number in range(20)]

    asyncio.run(first(VerdictStore(path)))
    spool = tmp_path / "store.db.spool"
    assert spool.read_text().count("\n") == 20
    spool.write_text(spool.read_text() + '["half')  # the process was killed as it wrote
    assert with_store(VerdictStore(path), second) == [Receipt(JUDGED, "recorded")] * 20
    assert spool.read_text() == ""


def test_a_spool_that_is_taken_up_twice_counts_once(where: str, tmp_path: Path) -> None:
    """Killed between the commit and the emptying of the spool."""
    content = Content([{"role": "user", "content": "q"}], "a", None, None, Representation())
    entries = [("verdicts", given(1).row(Drawing(1).draw(given(1))) | {"conversation": "q", "answer": "a"})]
    entries += [("thumbs", thumb(1).row()), ("labels", Label("a1", 0, True, "ann").row())]
    assert content.answer == "a"
    database = Database.open(where)
    for _ in range(2):
        spool = Spool(tmp_path / "spool", 1 << 20)
        spool.append(entries)
        database.write([], spool)
        assert spool.empty
        forget(database, "a1")  # and what was forgotten does not come back
    database.close()
    assert [len(rows(where, table)) for table in ("verdicts", "thumbs", "labels", "contents")] == [1, 1, 1, 0]


def test_an_entry_that_no_database_takes_is_kept_beside(where: str, tmp_path: Path) -> None:
    database = Database.open(where)
    spool = Spool(tmp_path / "spool", 1 << 20)
    bad = given("bad").row(Drawing(0).draw(given("bad"))) | {"model": None}
    spool.append([("verdicts", bad), ("verdicts", given(1).row(Drawing(0).draw(given(1))))])
    database.write([], spool)
    database.close()
    assert [row["id"] for row in rows(where, "verdicts")] == ["a1"]
    [refused] = (tmp_path / "spool.refused").read_text().splitlines()
    assert json.loads(refused)[1]["id"] == "abad"


WRITER = """
import asyncio, sys
from pathlib import Path
from candor.app.store.records import Feedback, GivenVerdict
from candor.app.store.store import VerdictStore
from candor.policy.decision import Verdict

async def main():
    store = VerdictStore(sys.argv[1], Path(sys.argv[2]))
    verdict = Verdict("high", False, None, 0.9, calibrated=True)
    for number in range(int(sys.argv[3]), 100_000):
        store.note([GivenVerdict(f"a{number}", 0, verdict, "d")])
        await store.take(Feedback(f"a{number}", 0, True, None, "a"))
        print(number, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("away", [False, True], ids=["", "locked"])
def test_killed_amid_writing_all_that_was_acknowledged_is_there(
    request: pytest.FixtureRequest, where: str, tmp_path: Path, away: bool
) -> None:
    """kill -9 at any moment, three times; the second time while the database cannot be written for a while."""
    if away and not where.startswith(str(tmp_path)):
        pytest.skip("a database that is away has a test of its own")
    acknowledged: list[int] = []
    for _ in range(3):
        began = len(acknowledged)
        start = acknowledged[-1] + 2 if acknowledged else 0
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, where, str(tmp_path / "spool"), str(start)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        ) as writer:
            assert writer.stdout is not None
            acknowledged += [int(writer.stdout.readline()) for _ in range(20)]
            if away and began:
                with locked(where):
                    acknowledged += [int(writer.stdout.readline()) for _ in range(20)]
                    writer.send_signal(signal.SIGKILL)
            else:
                writer.send_signal(signal.SIGKILL)
            acknowledged += [int(line) for line in writer.stdout.readlines() if line.endswith("\n")]
    with_store(VerdictStore(where, tmp_path / "spool"), lambda store: until(lambda: not store.behind))
    assert len(acknowledged) >= 60
    assert {f"a{number}" for number in acknowledged} <= {row["id"] for row in rows(where, "thumbs")}


# --- texts and states


def content() -> Content:
    hidden = HiddenSummary(torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.zeros(0), 4, complete=True)
    prompt = PromptStates(torch.tensor([5.0]), torch.tensor([6.0]), complete=True)
    return Content([{"role": "user", "content": "q\ud800"}], "an answer\0", hidden, prompt, Representation())


@pytest.mark.parametrize("keep", ["none", "drawn", "all"])
def test_texts_and_states_are_kept_as_the_operator_says(opened: Any, where: str, keep: Any) -> None:
    async def work(store: VerdictStore) -> None:
        store.note(given(number, content=content()) for number in range(200))

    with_store(opened(drawing=Drawing(0.5, seed=1), keeping=Keeping(keep, keep)), work)
    kept = rows(where, "contents")
    drawn = {row["id"] for row in rows(where, "verdicts") if row["drawn"]}
    assert 50 < len(drawn) < 150
    expected = {"none": set(), "drawn": drawn, "all": {f"a{number}" for number in range(200)}}[keep]
    assert {row["id"] for row in kept} == expected
    for row in kept:
        assert row["answer"] == "an answer\ufffd"
        assert json.loads(row["conversation"]) == [{"role": "user", "content": "q?"}]
        assert torch.frombuffer(bytearray(row["h"]), dtype=torch.float32).tolist() == [1, 2, 3]
        assert torch.frombuffer(bytearray(row["prompt_states"]), dtype=torch.float32).tolist() == [5, 6]


def test_texts_go_with_age_and_verdicts_by_number(opened: Any, where: str) -> None:
    old = time.time() - 2 * 86_400

    async def work(store: VerdictStore) -> None:
        store.note([given("old", content=content(), time=old), given("new", content=content())])
        await store.take(thumb("old", comment="secret", time=old))
        await store.take(thumb("new", comment="kept"))
        await store.label(Label("anew", 0, True, "ann"))
        store.note(given(number) for number in range(20))
        await store.take(thumb(19))
        await asyncio.to_thread(store._tidy)

    keeping = Keeping("all", "all", days=1, verdicts=5)
    with_store(opened(keeping=keeping), work)
    assert [row["id"] for row in rows(where, "contents")] == ["anew"]
    assert {row["id"]: row["comment"] for row in rows(where, "thumbs")} == {
        "aold": None,
        "anew": "kept",
        "a19": None,
    }
    # Those with a thumb or a label stay, and the last five.
    assert [row["id"] for row in rows(where, "verdicts")] == [
        "aold",
        "anew",
        *(f"a{number}" for number in range(15, 20)),
    ]


def test_what_was_drawn_stays_whatever_its_number(opened: Any, where: str) -> None:
    async def work(store: VerdictStore) -> None:
        store.note(given(number) for number in range(20))
        store.note([given("last")])
        await store.take(thumb("last"))
        await asyncio.to_thread(store._tidy)

    with_store(opened(drawing=Drawing(1.0), keeping=Keeping(verdicts=5)), work)
    assert len(rows(where, "verdicts")) == 21


def test_an_answer_is_forgotten(where: str, tmp_path: Path) -> None:
    async def work(store: VerdictStore) -> None:
        store.note([given(1, content=content(), caller="alice")])
        await store.take(thumb(1, comment="secret"))
        await store.label(Label("a1", 0, False, "ann", comment="secret", answer="secret"))

    with_store(VerdictStore(where, tmp_path / "spool", keeping=Keeping("all", "all")), work)
    command = ["store", "forget", "a1", "--store", where]
    assert CliRunner().invoke(cli, command).stdout == "forgot 1 answer\n"
    assert rows(where, "contents") == []
    for table in ("thumbs", "labels", "verdicts"):
        [row] = rows(where, table)
        assert "secret" not in str(row)
    assert rows(where, "verdicts")[0]["caller"] is None
    assert [row["correct"] for row in rows(where, "labels")] == [False]
    unknown = CliRunner().invoke(cli, [*command[:2], "b", *command[3:]])
    assert unknown.exit_code == 1
    assert "no such answer" in unknown.stderr


# --- what is read


def labelled(store: VerdictStore, labels: Sequence[Label]) -> Any:
    async def work(store: VerdictStore) -> None:
        store.note(given(number, COVERED if number % 2 else LOW) for number in range(8))
        for label in labels:
            await store.label(label)

    return with_store(store, work)


def test_audits_in_the_order_of_answers(opened: Any, where: str) -> None:
    said = [Label("a5", 0, True, "ann"), Label("a1", 0, False, "ann"), Label("a3", 0, True, "ann")]
    said += [Label("a3", 0, False, "ben"), Label("a5", 0, None, "ben"), Label("a2", 0, True, "ann")]
    labelled(opened(drawing=Drawing(1.0)), said)
    database = Database.open(where)
    [certificate] = database.read(reading.watched)
    assert certificate == ("digest", "two-gates", None, 0.9, 0.95, 0.95)
    found = database.read(lambda connection: reading.audits(connection, certificate))
    # a1 wrong; a3: they differ; a5: one cannot tell; a7: not labelled. Withheld ones are not among them.
    assert found == [(1, 1, False), (1, 1, None), (1, 1, True), (1, 1, None)]
    assert database.read(reading.waiting) == {"sampled": 1, "withheld": 3, "disputed": 0}
    assert database.read(reading.agreements) == {
        ("ann", "ben"): Agreement(both=0, first=1, second=0, neither=0)
    }
    assert [row["id"] for row in database.read(lambda c: list(reading.answers(c)))] == [
        "a1",
        "a2",
        "a3",
        "a5",
    ]
    database.close()


def test_queues(opened: Any, where: str) -> None:
    labelled(opened(drawing=Drawing(1.0)), [Label("a3", 0, True, "ann"), Label("a4", 0, True, "ann")])
    database = Database.open(where)

    def queue(kind: Any, reviewer: str) -> list[str]:
        return [row["id"] for row in database.read(lambda c: reading.queue(c, kind, reviewer))]

    assert queue("sampled", "ann") == ["a1", "a5", "a7"]
    assert queue("sampled", "ben") == ["a1", "a5", "a7", "a3"]  # a second label comes last
    assert queue("withheld", "ann") == ["a6", "a2", "a0"]
    assert queue("withheld", "ben") == ["a6", "a2", "a0", "a4"]
    database.close()


def test_a_store_from_before_disputes_is_brought_up_to_date(where: str) -> None:
    database = Database.open(where)
    database.write([("verdicts", given(1).row(Draw(0.1, 0.1, True)))])
    with database.changing() as connection:
        for later in ("wanted", "replicas", "rates", "used"):
            connection.execute(text(f"DROP TABLE {later}"))
        connection.execute(text("ALTER TABLE verdicts DROP COLUMN disputed_by"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    database.close()
    [row] = rows(where, "verdicts")
    assert (row["id"], row["disputed_by"]) == ("a1", None)


def test_what_a_shadow_disputes(opened: Any, where: str) -> None:
    async def work(store: VerdictStore) -> None:
        store.note([given(1, COVERED), given(2, LOW), given(3)])
        store.dispute(Dispute("a2", 0, "shadow"))
        store.dispute(Dispute("a3", 0, "shadow"))
        store.dispute(Dispute("nobody", 0, "shadow"))
        await store.take(thumb(1))

    with_store(opened(drawing=Drawing(1.0)), work)
    assert [row["disputed_by"] for row in rows(where, "verdicts")] == [None, "shadow", "shadow"]
    database = Database.open(where)
    found = database.read(lambda connection: reading.queue(connection, "disputed", "ann"))
    assert [row["id"] for row in found] == ["a3", "a2"]
    assert database.read(reading.waiting)["disputed"] == 2
    database.close()


def test_a_dispute_waits_with_its_verdict(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")

    async def work(store: VerdictStore) -> None:
        with locked(path):
            store.note([given(1)])
            store.dispute(Dispute("a1", 0, "shadow"))
            await store.take(thumb(1))  # durable, so what came before is too
            assert not store._spool.empty

    with_store(VerdictStore(path), work)
    assert [row["disputed_by"] for row in rows(path, "verdicts")] == ["shadow"]


# --- the draw


def test_answers_are_drawn_with_the_probability_that_is_kept() -> None:
    drawing = Drawing(0.2, seed=3)
    drawn = [drawing.draw(given(number)) for number in range(20_000)]
    assert {one.probability for one in drawn} == {0.2}
    assert abs(sum(one.drawn for one in drawn) / 20_000 - 0.2) < 4 * (0.16 / 20_000) ** 0.5  # four deviations
    assert drawing.draw(given(1, kind="pair")).probability == 0
    assert drawing.draw(GivenVerdict("a", 1, HIGH, "d")).probability == 0  # of several choices only the first


def test_by_doubt_the_less_sure_are_drawn_more_often() -> None:
    def sure(p: float) -> GivenVerdict:
        return given(
            1, Verdict("high", False, None, 0.9, calibrated=True, rule=RuleFigures(True, 1, False, 1, 1, p))
        )

    drawing = Drawing(0.2, "doubt", seed=3)
    for _ in range(2000):
        drawing.draw(sure(0.5))  # sqrt(p (1 - p)) = 0.5
        drawing.draw(sure(0.9))  # 0.3: the mean is 0.4
    assert drawing.draw(sure(0.5)).probability == pytest.approx(0.25, rel=0.01)
    assert drawing.draw(sure(0.9)).probability == pytest.approx(0.15, rel=0.01)
    assert drawing.draw(sure(1.0))[:2] == (0.1, 0.1)  # never less than half of the share
    assert drawing.draw(given(1, LOW)).probability == 0.2


# --- an earlier feedback file


def earlier(path: Path) -> None:
    with closing(sqlite3.connect(path)) as file:
        file.executescript(
            """
            CREATE TABLE verdicts (
                number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, choice INTEGER NOT NULL,
                region TEXT NOT NULL, reason TEXT, alpha REAL NOT NULL, bundle TEXT NOT NULL, UNIQUE (id, choice));
            CREATE TABLE feedback (
                id TEXT NOT NULL, choice INTEGER NOT NULL, correct INTEGER NOT NULL, comment TEXT,
                caller TEXT NOT NULL, region TEXT NOT NULL, reason TEXT, alpha REAL NOT NULL, bundle TEXT NOT NULL,
                received TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, PRIMARY KEY (id, choice));
            INSERT INTO verdicts (id, choice, region, reason, alpha, bundle) VALUES
                ('a', 0, 'high', NULL, 0.9, 'd'), ('b', 1, 'ood', 'out_of_distribution', 0.9, 'd');
            INSERT INTO feedback VALUES
                ('a', 0, 1, 'yes', 'bob', 'high', NULL, 0.9, 'd', '2026-11-01 12:00:00'),
                ('gone', 0, 0, NULL, 'bob', 'high', 'predicted_not_following', 0.9, 'd', '2026-11-01 12:00:01');
            """
        )


def test_an_earlier_feedback_file_is_taken_over(where: str, tmp_path: Path) -> None:
    earlier(tmp_path / "feedback.db")
    with pytest.raises(StoreError, match="candor store import"):
        Database.open(str(tmp_path / "feedback.db"))
    for _ in range(2):  # the second time nothing is new
        done = CliRunner().invoke(cli, ["store", "import", str(tmp_path / "feedback.db"), "--store", where])
        assert done.stdout == "took over 3 verdicts and 2 labels of clients\n"
    assert {row["id"]: (row["abstained"], row["drawn"]) for row in rows(where, "verdicts")} == {
        "a": (False, False),
        "b": (True, False),
        "gone": (True, False),
    }
    assert [(row["id"], row["correct"], row["time"]) for row in rows(where, "thumbs")] == [
        ("a", True, 1793534400.0),
        ("gone", False, 1793534401.0),
    ]
    none = CliRunner().invoke(cli, ["store", "import", str(tmp_path / "none"), "--store", where])
    assert none.exit_code == 1
    assert "expected the feedback file" in none.stderr


def test_the_old_setting_says_what_has_become_of_it(tmp_path: Path) -> None:
    command = ["serve", "--model", str(tmp_path), "--bundle", str(tmp_path)]
    refused = CliRunner(env={"CANDOR_FEEDBACK": "f"}).invoke(cli, command)
    assert refused.exit_code == 2
    assert re.search("CANDOR_STORE.*candor store import", refused.stderr)
