"""Replicas that share one PostgreSQL: one bundle for all, keys counted together, any answer known to any of them."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from candor.app.edge.keys import make_key
from candor.app.process.replicas import SharedPromotions, promotions_of
from candor.app.store import together
from candor.app.store.database import Database
from candor.app.store.records import StoreError
from candor.app.store.tables import replicas, wanted
from candor.app.store.together import Taken
from candor.model_store.bundle import Bundle, load_bundle
from candor.model_store.store import publish

Replica = Callable[..., AbstractContextManager[Any]]


@pytest.fixture
def store(postgres: Any) -> str:
    return str(postgres.database())


@pytest.fixture
def put(bundle: Bundle, gates: Any, tmp_path: Path) -> Callable[[str, float], Bundle]:
    """Publishes a two-gate bundle that lets through scores from `score_min` on: "follows" has 2, "thin" 1."""

    def made(folder: str, score_min: float) -> Bundle:
        terms = replace(
            gates.terms, certificates=(replace(gates.terms.certificates[0], score_min=score_min),)
        )
        manifest = replace(bundle.manifest, rule=terms)
        publish(tmp_path / folder, manifest, bundle.estimator, bundle.exemplars, bundle.report, gates.rule)
        return load_bundle(tmp_path / folder)

    return made


@pytest.fixture
def replica(serve_from: Any, make_engine: Any, store: str, tmp_path: Path) -> Replica:
    """`with replica() as server`: one more that serves the bundle `old`; its engine answers "thin" thinly."""
    made: list[Path] = []

    @contextmanager
    def start(directory: str = "old", **given: Any) -> Iterator[Any]:
        made.append(tmp_path / f"spool.{len(made)}")
        engine = make_engine()
        engine.script("thin", state="thin")
        with serve_from(tmp_path / directory, engine, store=store, store_spool=made[-1], **given) as server:
            yield server

    return start


def promote(server: Any, bundle: str) -> Any:
    return server.client.post("/bundles/promote", json={"bundle": bundle})


def serves(server: Any) -> str:
    return str(server.client.get("/version").json()["bundle"])


def ready(server: Any) -> tuple[int, str]:
    response = server.client.get("/readyz")
    return response.status_code, response.json().get("error", {}).get("message", "")


def test_all_are_promoted_together_and_rolled_back(
    replica: Replica, put: Any, wait_until: Any, tmp_path: Path
) -> None:
    old, new = put("old", 1.5), put("new", 0.9)
    with replica() as one, replica() as two, replica() as three:
        all_three = (one, two, three)
        seen: Counter[tuple[str, int, str]] = Counter()
        switched: dict[int, float] = {}
        end = threading.Event()

        def ask(index: int) -> None:
            while not end.is_set():
                response = all_three[index].chat("thin")
                by = response.headers.get("x-sdm-bundle", "")
                seen[
                    by, response.status_code, str(response.json()["reliability"]["results"][0]["abstained"])
                ] += 1
                if by == new.digest:
                    switched.setdefault(index, time.monotonic())

        askers = [threading.Thread(target=ask, args=[index]) for index in range(3)]
        for asker in askers:
            asker.start()
        time.sleep(0.5)
        assert promote(two, "new").json()["bundle"] == new.digest
        wait_until(lambda: len(switched) == 3)
        end.set()
        for asker in askers:
            asker.join()
        # Each answer is judged by the bundle that it names, none is refused, and they switched as one.
        assert {key[:2] for key in seen} == {(old.digest, 200), (new.digest, 200)}
        assert {key for key in seen if key[0] == old.digest} == {(old.digest, 200, "True")}
        assert {key for key in seen if key[0] == new.digest} == {(new.digest, 200, "False")}
        assert max(switched.values()) - min(switched.values()) < 1.0
        assert [ready(server)[0] for server in all_three] == [200] * 3
        # Another than the one that promoted rolls back, and again all follow.
        back = three.client.post("/bundles/rollback", json={}).json()
        assert (back["bundle"], back["previous"]) == (old.digest, None)
        wait_until(lambda: {serves(server) for server in all_three} == {old.digest})
        assert not (tmp_path / "old.promoted.json").exists()


def test_one_that_cannot_follow_stops_the_promotion(replica: Replica, put: Any, tmp_path: Path) -> None:
    old, new = put("old", 1.5), put("new", 0.9)
    with replica() as one, replica() as two:
        two.engine.known.clear()  # its golden prompts would give other states
        refused = promote(one, "new")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_promoted")
        assert "golden prompt" in refused.json()["error"]["message"]
        assert {serves(one), serves(two)} == {old.digest}
        assert [ready(server)[0] for server in (one, two)] == [200] * 2
    with replica() as one:  # who has left stops nobody
        assert promote(one, "new").json()["bundle"] == new.digest


def test_one_that_missed_it_is_not_ready_and_says_why(
    replica: Replica, put: Any, store: str, wait_until: Any, tmp_path: Path
) -> None:
    old, new = put("old", 1.5), put("new", 0.9)
    with replica() as one:
        database = Database.open(store)
        with database.changing() as connection:  # as if it had been out of reach while the others went on
            there = {"digest": new.digest, "path": str(tmp_path / "elsewhere")}
            connection.execute(update(wanted).values(**there))
        wait_until(lambda: ready(one)[0] == 503)
        assert old.digest[:12] in ready(one)[1]
        assert new.digest[:12] in ready(one)[1]
        refused = one.chat("ask")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "bundle_behind")
        assert refused.headers["retry-after"] == "1"
        wait_until(lambda: "elsewhere" in ready(one)[1] and "made ready" not in ready(one)[1])
        with database.changing() as connection:  # it is there now
            connection.execute(update(wanted).values(path=str(tmp_path / "new")))
        wait_until(lambda: ready(one)[0] == 200, 20)
        assert serves(one) == new.digest
        database.close()


def test_a_proposal_that_could_not_be_ended_is_ended_later(
    replica: Replica, put: Any, store: str, wait_until: Any, tmp_path: Path
) -> None:
    old, new = put("old", 1.5), put("new", 0.9)
    with replica() as one:
        database = Database.open(store)

        def row() -> Any:
            return database.read(lambda connection: connection.execute(select(wanted)).mappings().one())

        with (
            database.changing() as connection
        ):  # as a replica leaves it whose database went away amid a promotion
            (name,) = connection.scalars(select(replicas.c.replica))
            values = {
                "proposed_digest": new.digest,
                "proposed_path": str(tmp_path / "new"),
                "proposed_by": name,
            }
            connection.execute(update(wanted).values(**values))
        wait_until(lambda: row()["proposed_by"] is None)
        assert (row()["digest"], serves(one)) == (old.digest, old.digest)
        database.close()


def test_a_late_replica_takes_what_was_promoted(replica: Replica, put: Any, tmp_path: Path) -> None:
    put("old", 1.5)
    new = put("new", 0.9)
    with replica() as one:
        promote(one, "new").raise_for_status()
        with replica() as late:
            assert serves(late) == new.digest
            assert ready(late) == (200, "")
    shutil.rmtree(tmp_path / "new")
    with pytest.raises(Exception, match="new"):
        replica().__enter__()


def test_another_configured_bundle_waits_until_it_is_wanted(
    replica: Replica, put: Any, wait_until: Any, tmp_path: Path
) -> None:
    old, new = put("old", 1.5), put("new", 0.9)
    with replica():
        with replica("new") as two:
            # It could answer by the others' bundle, and does once it has made it ready.
            wait_until(lambda: ready(two)[0] == 200)
            assert serves(two) == old.digest
    with replica("new") as alone:  # nobody else lives: the operator configured another
        assert serves(alone) == new.digest
        assert ready(alone)[0] == 200


def test_who_has_another_bundle_and_no_other_can_be_made_the_one_that_counts(
    replica: Replica, put: Any, wait_until: Any, tmp_path: Path
) -> None:
    """As with a new model, whose replicas cannot answer by the old one's bundle: all change to theirs, or none."""
    old, new = put("old", 1.5), put("new", 0.9)
    with replica() as one:
        (tmp_path / "old").rename(tmp_path / "gone")
        with replica("new") as two:
            wait_until(lambda: "there is no bundle" in ready(two)[1])
            assert {serves(one), serves(two)} == {old.digest, new.digest}
            assert promote(two, "new").json()["bundle"] == new.digest
            wait_until(lambda: ready(two)[0] == 200)
            wait_until(lambda: serves(one) == new.digest)


def test_a_key_is_counted_over_all(replica: Replica, put: Any, wait_until: Any, tmp_path: Path) -> None:
    put("old", 1.5)
    secret, key = make_key("alice", ["answer"])
    (tmp_path / "keys").write_text(key.line().replace("\n", " tokens-per-day=100000\n"))
    given = {"keys": tmp_path / "keys", "requests_per_minute": 12}
    headers = {"authorization": f"Bearer {secret}"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "ask"}]}
    answered: Counter[int] = Counter()
    with replica(**given) as one, replica(**given) as two, replica(**given) as three:
        for _ in range(8):
            for server in (one, two, three):
                answered[
                    server.client.post("/v1/chat/completions", json=body, headers=headers).status_code
                ] += 1
            time.sleep(0.4)  # longer than they take to tell each other
    # 12 in the bucket, and one every five seconds; without telling each other it would be all 24.
    assert set(answered) == {200, 429}
    assert 12 <= answered[200] <= 15, answered


def test_a_quota_is_counted_over_all_and_outlives_them(replica: Replica, put: Any, tmp_path: Path) -> None:
    put("old", 1.5)
    secret, key = make_key("alice", ["answer"])
    headers = {"authorization": f"Bearer {secret}"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "ask"}]}

    def ask(server: Any) -> int:
        time.sleep(0.4)
        return int(server.client.post("/v1/chat/completions", json=body, headers=headers).status_code)

    (tmp_path / "keys").write_text(key.line().replace("\n", " tokens-per-day=150\n"))
    with replica(keys=tmp_path / "keys") as one, replica(keys=tmp_path / "keys") as two:
        asked = [ask(server) for _ in range(5) for server in (one, two)]
    used = asked.count(200)
    assert asked == [200] * used + [429] * (10 - used)
    with replica(keys=tmp_path / "keys") as three:
        ask(three)  # who has not been heard of here is let in once
        assert ask(three) == 429


def test_any_replica_takes_feedback_on_and_shows_any_answer(
    replica: Replica, put: Any, wait_until: Any, tmp_path: Path
) -> None:
    put("old", 1.5)
    with replica(audit_share=1.0) as one, replica(audit_share=1.0) as two:
        given = [(server, server.chat("ask").json()["id"]) for server in (one, two)]
        for _, id in given:
            for server in (one, two):
                wait_until(
                    lambda server=server, id=id: (
                        server.client.get(f"/v1/reliability/answers/{id}").status_code == 200
                    )
                )
        for server, id in given:
            other = two if server is one else one
            body = {"id": id, "correct": True}
            assert other.client.post("/v1/reliability/feedback", json=body).status_code == 200
            label = {"id": id, "index": 0, "correct": True}
            assert other.client.post("/v1/reliability/labels", json=label).status_code == 200

        def audits(server: Any) -> tuple[int, int]:
            page = server.client.get("/metrics").text
            lines = [line for line in page.splitlines() if line.startswith("sdm_certificate_audits{")]
            counted = {line.split('label="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}
            return int(counted.get("right", 0)), int(counted.get("wrong", 0))

        # One process over both replicas' answers, and both come to the same.
        wait_until(lambda: audits(one) == audits(two) == (2, 0), 15)


def test_while_the_database_is_away_answers_go_on(
    replica: Replica, put: Any, postgres: Any, wait_until: Any, tmp_path: Path
) -> None:
    old, new = put("old", 1.5), put("new", 0.9)
    with replica(requests_per_minute=1000) as one:
        assert one.client.get("/readyz").json() == {"status": "ok"}
        postgres.stop(kill=True)
        try:
            taken = [one.chat("ask") for _ in range(20)]
            assert {response.status_code for response in taken} == {200}
            assert max(response.elapsed.total_seconds() for response in taken) < 1.0
            wait_until(lambda: one.client.get("/readyz").json() == {"status": "ok", "store": "away"})
            refused = promote(one, "new")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "change_not_kept")
            assert serves(one) == old.digest
            body = {"id": taken[0].json()["id"], "correct": True}
            assert one.client.post("/v1/reliability/feedback", json=body).status_code == 200  # in the spool
        finally:
            postgres.start()
        wait_until(lambda: one.client.get("/readyz").json() == {"status": "ok"}, 20)
        assert promote(one, "new").json()["bundle"] == new.digest


def test_buckets_add_up(store: str) -> None:
    database = Database.open(store)

    def take(**amounts: float) -> dict[str, float]:
        with database.changing() as connection:
            return together.take(connection, Taken("requests", 60, amounts))

    assert take(alice=50.0, bob=0.0) == {"alice": 10.0, "bob": 60.0}
    left = take(alice=10.0)["alice"]
    assert 0 <= left < 1  # refilled at one a second
    assert -30 <= take(alice=30.0)["alice"] < -28  # more than is left: paid off later
    assert take(bob=5.0)["bob"] == 55.0  # never more than a minute's worth
    database.close()


def test_of_two_that_propose_one_wins_and_who_died_is_not_waited_for(store: str) -> None:
    from candor.app.process.promoted import Located

    database = Database.open(store)
    a, b = Located("/a", "a" * 64), Located("/b", "b" * 64)
    beat = [together.Beat("tiny", a.digest)]
    with database.changing() as one:
        together.begin(one, "tiny", a)
        for name in ("first", "second"):
            together.beat(one, name, beat)
        assert together.propose(one, "tiny", "first", b, a.digest)
        assert not together.propose(one, "tiny", "second", b, a.digest)
        assert together.unready(one, "tiny", "first", b.digest) == {"second": None}
        assert together.beat(one, "second", beat)["tiny"].proposed == b
        one.execute(update(replicas).where(replicas.c.replica == "first").values(seen=0.0))
        assert together.propose(one, "tiny", "second", b, a.digest)  # the first is gone
        assert not together.settle(one, "tiny", "first", None)
        assert together.unready(one, "tiny", "second", b.digest) == {}
        together.leave(one, "second")
        assert one.execute(select(replicas.c.replica)).all() == []
    database.close()


def test_without_a_shared_store_a_replica_counts_by_itself(settings: Any, store: str, tmp_path: Path) -> None:
    own = promotions_of(settings(bundle=tmp_path / "b", store=str(tmp_path / "store.db")))
    assert not isinstance(own, SharedPromotions)
    with pytest.raises(StoreError, match="CANDOR_QUOTAS"):
        promotions_of(settings(bundle=tmp_path / "b", store=store, quotas=tmp_path / "quotas.db"))
