"""Feedback: what is acknowledged is on the disk, counted once, and belongs to an answer that was given."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from candor.app.feedback import (
    Feedback,
    FeedbackFileError,
    FeedbackLost,
    FeedbackStore,
    GivenVerdict,
    NoSuchAnswer,
    Receipt,
)
from candor.policy.decision import Verdict

ROOT = Path(__file__).resolve().parents[2]
HIGH = Verdict("high", False, None, 0.9, calibrated=True)


def rows(path: Path, what: str = "*", table: str = "feedback") -> list[tuple[Any, ...]]:
    with sqlite3.connect(path) as file:
        found = file.execute(f"SELECT {what} FROM {table} ORDER BY id, choice").fetchall()
    file.close()
    return found


def send(server: Any, **body: Any) -> Any:
    return server.client.post("/v1/reliability/feedback", json=body)


def counts(server: Any) -> dict[str, float]:
    lines = server.client.get("/metrics").text.splitlines()
    found = {
        line.split("{")[1].split("}")[0]: float(line.split()[-1])
        for line in lines
        if line.startswith("sdm_feedback_total{")
    }
    return {labels: count for labels, count in found.items() if count}


def test_from_answer_to_metric(serve: Any, tmp_path: Path) -> None:
    path = tmp_path / "feedback.db"
    with serve(feedback=path) as server:
        server.engine.script("far", state="far")
        high = server.chat("ask", n=2).json()["id"]
        streamed = server.chunks("far")[0]["id"]
        buffered = server.chunks("ask", reliability={"mode": "abstain"})[0]["id"]
        pair = server.client.post("/v1/reliability", json={"prompt": "a", "response": "b"}).json()["id"]
        receipt = send(server, id=high, correct=True)
        assert receipt.status_code == 200
        assert receipt.json() == {
            "object": "reliability.feedback",
            "id": high,
            "index": 0,
            "correct": True,
            "region": "high",
            "outcome": "recorded",
        }
        assert send(server, id=high, index=1, correct=False, comment="no").json()["region"] == "high"
        assert send(server, id=streamed, correct=False).json()["region"] == "ood"
        assert send(server, id=buffered, correct=True).json()["region"] == "high"
        assert send(server, id=pair, correct=True).json()["region"] == "low"
        assert counts(server) == {
            'correct="true",model_name="tiny",region="high"': 2,
            'correct="false",model_name="tiny",region="high"': 1,
            'correct="false",model_name="tiny",region="ood"': 1,
            'correct="true",model_name="tiny",region="low"': 1,
        }
    kept = {
        (id, choice): rest for id, choice, *rest in rows(path, "id, choice, correct, comment, caller, region")
    }
    assert kept[high, 1] == [0, "no", "anyone", "high"]
    assert len(kept) == 5


def test_said_again_and_taken_back(serve: Any, tmp_path: Path) -> None:
    with serve(feedback=tmp_path / "f") as server:
        given = server.chat("ask").json()["id"]
        outcomes = [
            send(server, id=given, correct=correct).json()["outcome"]
            for correct in (True, True, False, False)
        ]
        assert outcomes == ["recorded", "unchanged", "replaced", "unchanged"]
        assert sum(counts(server).values()) == 1
    assert rows(tmp_path / "f", "correct") == [(0,)]


def test_it_is_known_after_a_restart(serve: Any, tmp_path: Path) -> None:
    path = tmp_path / "f"
    with serve(feedback=path) as server:
        given = server.chat("ask").json()["id"]
    server.engine.closed = False
    with serve(feedback=path) as server:
        assert send(server, id=given, correct=True).json()["region"] == "high"


@pytest.mark.parametrize(
    "body",
    [
        {"id": "chatcmpl-none", "correct": True},
        {"id": "' OR 1=1 --", "correct": True},
        {"id": "", "correct": True},
        {"id": "GIVEN", "index": 1, "correct": True},
        {"id": "GIVEN", "index": 2**62, "correct": True},
    ],
)
def test_an_answer_that_was_not_given(serve: Any, tmp_path: Path, body: dict[str, Any]) -> None:
    with serve(feedback=tmp_path / "f") as server:
        body["id"] = body["id"].replace("GIVEN", server.chat("ask").json()["id"])
        refused = send(server, **body)
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "answer_not_found"
    assert rows(tmp_path / "f") == []


def test_an_unchecked_answer_has_no_verdict_to_judge(serve: Any, tmp_path: Path) -> None:
    with serve(feedback=tmp_path / "f") as server:
        given = server.chat("ask", reliability={"mode": "off"}).json()["id"]
        assert send(server, id=given, correct=True).status_code == 404


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("correct", 1),
        ("correct", "true"),
        ("correct", None),
        ("index", -1),
        ("index", 2**63),
        ("index", 0.0),
        ("id", 5),
        ("id", "x" * 201),
        ("id", "\ud800"),
        ("comment", "x" * 4001),
        ("comment", "\udfff"),
        ("region", "high"),
    ],
)
def test_a_wrong_field(serve: Any, tmp_path: Path, field: str, value: Any) -> None:
    import json

    with serve(feedback=tmp_path / "f") as server:
        refused = server.client.post(
            "/v1/reliability/feedback",
            content=json.dumps({"id": "x", "correct": True, field: value}),
            headers={"content-type": "application/json"},
        )
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == field


def test_a_server_that_keeps_none_says_so(server: Any) -> None:
    refused = send(server, id="x", correct=True)
    assert refused.status_code == 404
    assert "CANDOR_FEEDBACK" in refused.json()["error"]["message"]


def test_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no database, but long enough to look like one" * 10)
    for path in (tmp_path, tmp_path / "none" / "f", tmp_path / "text"):
        with pytest.raises(FeedbackFileError, match="CANDOR_FEEDBACK"):
            FeedbackStore(path)


def store_run(path: Path, kept: int, work: Any) -> Any:
    async def main() -> Any:
        store = FeedbackStore(path, kept)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(main())


def test_only_the_last_verdicts_are_kept_but_all_feedback(tmp_path: Path) -> None:
    async def work(store: FeedbackStore) -> Any:
        store.note([GivenVerdict("first", 0, HIGH, "digest")])
        await store.take(Feedback("first", 0, True, None, "a"))
        for number in range(10):
            store.note([GivenVerdict(f"a{number}", 0, HIGH, "digest")])
        receipts = [
            await store.take(Feedback("a9", 0, True, None, "a")),
            await store.take(Feedback("first", 0, False, None, "a")),
        ]
        with pytest.raises(NoSuchAnswer):
            await store.take(Feedback("a0", 0, True, None, "a"))
        return receipts

    assert store_run(tmp_path / "f", 3, work) == [
        Receipt("high", "digest", "recorded"),
        Receipt("high", "digest", "replaced"),
    ]
    assert [row for (row,) in rows(tmp_path / "f", "id", "verdicts")] == ["a7", "a8", "a9"]


def test_many_at_once_are_all_kept(tmp_path: Path) -> None:
    async def work(store: FeedbackStore) -> Any:
        store.note(GivenVerdict(f"a{number}", 0, HIGH, "digest") for number in range(500))
        return await asyncio.gather(
            *(store.take(Feedback(f"a{number}", 0, number % 2 == 0, None, "a")) for number in range(500))
        )

    assert store_run(tmp_path / "f", 1000, work) == [Receipt("high", "digest", "recorded")] * 500
    assert len(rows(tmp_path / "f")) == 500


def test_a_full_disk_acknowledges_nothing_and_loses_nothing(tmp_path: Path) -> None:
    """SQLite's own limit on the file's pages stands for the disk: the same error, at the same place."""

    async def work(store: FeedbackStore) -> int:
        store.note(GivenVerdict(f"a{number}", 0, HIGH, "digest") for number in range(200))
        await store.take(Feedback("a0", 0, True, None, "a"))
        pages = store._file.execute("PRAGMA page_count").fetchone()[0]
        store._file.execute(f"PRAGMA max_page_count = {pages + 2}")
        acknowledged = 1
        for number in range(1, 200):
            try:
                await store.take(Feedback(f"a{number}", 0, True, "x" * 1000, "a"))
            except FeedbackLost:
                break
            acknowledged += 1
        store._file.execute(f"PRAGMA max_page_count = {pages + 1000}")
        await store.take(Feedback("a199", 0, True, None, "a"))
        return acknowledged + 1

    acknowledged = store_run(tmp_path / "f", 1000, work)
    assert 1 < acknowledged < 199
    assert len(rows(tmp_path / "f")) == acknowledged


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process holds the file, as a backup may."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


def test_a_locked_file_loses_no_verdict(serve: Any, tmp_path: Path, wait_until: Any) -> None:
    """S7: longer than SQLite waits (5 s). Feedback is told to come back, not that there was no such answer."""
    path = tmp_path / "f"
    with serve(feedback=path) as server:
        with locked(path):
            given = [server.chat("ask").json()["id"] for _ in range(3)]
            time.sleep(6)
            given.append(server.chat("ask").json()["id"])
            refused = send(server, id=given[0], correct=True)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "feedback_not_kept")
            assert refused.headers["retry-after"]
        wait_until(lambda: {send(server, id=one, correct=True).status_code for one in given} == {200}, 20)
    assert {id for (id,) in rows(path, "id")} == set(given)


def test_what_waits_at_the_end_is_taken_up_by_the_next_server(tmp_path: Path) -> None:
    path = tmp_path / "f"

    async def first(store: FeedbackStore) -> None:
        store._file.execute("PRAGMA busy_timeout = 100")
        with locked(path):
            store.note(GivenVerdict(f"a{number}", 0, HIGH, "digest") for number in range(20))
            await store.close()

    async def second(store: FeedbackStore) -> Any:
        with pytest.raises(NoSuchAnswer):
            await store.take(Feedback("b", 0, True, None, "a"))
        return [await store.take(Feedback(f"a{number}", 0, True, None, "a")) for number in range(20)]

    asyncio.run(opened(path, first))
    spool = tmp_path / "f.spool"
    assert spool.read_text().count("\n") == 20
    spool.write_text(spool.read_text() + '["half')  # the process was killed as it wrote
    assert store_run(path, 1000, second) == [Receipt("high", "digest", "recorded")] * 20
    assert sorted(one.name for one in tmp_path.iterdir()) == ["f"]


async def opened(path: Path, work: Any) -> None:
    await work(FeedbackStore(path))


def test_more_than_may_wait_goes_to_the_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("candor.app.feedback._MOST_WAITING", 5)
    path = tmp_path / "f"

    async def work(store: FeedbackStore) -> Any:
        store._file.execute("PRAGMA busy_timeout = 100")
        with locked(path):
            store.note(GivenVerdict(f"a{number}", 0, HIGH, "digest") for number in range(20))
            await asyncio.sleep(0.5)
        found = []
        for number in range(20):
            while True:
                try:
                    found.append(await store.take(Feedback(f"a{number}", 0, True, None, "a")))
                    break
                except FeedbackLost:
                    await asyncio.sleep(0.1)
        return found

    assert store_run(path, 1000, work) == [Receipt("high", "digest", "recorded")] * 20


WRITER = """
import asyncio, sys
from pathlib import Path
from candor.app.feedback import Feedback, FeedbackStore, GivenVerdict
from candor.policy.decision import Verdict

async def main():
    store = FeedbackStore(Path(sys.argv[1]))
    verdict = Verdict("high", False, None, 0.9, calibrated=True)
    for number in range(100_000):
        store.note([GivenVerdict(f"a{number}", 0, verdict, "d")])
        await store.take(Feedback(f"a{number}", 0, True, None, "a"))
        print(number, flush=True)

asyncio.run(main())
"""


def test_killed_amid_writing_all_that_was_acknowledged_is_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline() for _ in range(50)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += writer.stdout.readlines()
    kept = {row for (row,) in rows(path, "id")}
    assert len(acknowledged) >= 50
    assert {f"a{line.strip()}" for line in acknowledged} <= kept
