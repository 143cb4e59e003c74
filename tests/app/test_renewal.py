"""Bundles of a server that runs are promoted, rolled back, shadowed and pinned; they are read from the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from candor.app.cli import cli
from candor.app.edge.middleware import scope_of
from candor.app.process import promoted, renewal
from candor.app.process.promoted import Located, PromotedFileError, Promotion, Promotions
from candor.app.store.database import Database
from candor.app.store.reading import answers
from candor.model_store.bundle import Bundle, load_bundle
from candor.model_store.errors import BundleError, BundleNotFound
from candor.model_store.store import publish
from candor.policy.judging import TwoGates

STRICT, LAX = 1.5, 0.9
"""Scores: "follows" has 2, "thin" 1, "edge" 0.75."""

Put = Callable[..., Bundle]


@pytest.fixture
def put(bundle: Bundle, gates: TwoGates, tmp_path: Path) -> Put:
    """Publishes a two-gate bundle that lets through scores from `score_min` on, and returns it as it was loaded."""

    def made(folder: str, score_min: float, **changes: Any) -> Bundle:
        certificate = replace(gates.terms.certificates[0], score_min=score_min)
        terms = replace(gates.terms, certificates=(certificate,))
        manifest = replace(bundle.manifest, rule=terms, **changes)
        publish(tmp_path / folder, manifest, bundle.estimator, bundle.exemplars, bundle.report, gates.rule)
        return load_bundle(tmp_path / folder)

    return made


def promote(server: Any, bundle: str | None = None, **more: Any) -> httpx.Response:
    return server.client.post("/bundles/promote", json={"bundle": bundle, **more})


def rollback(server: Any) -> httpx.Response:
    return server.client.post("/bundles/rollback", json={})


def judged(response: httpx.Response) -> tuple[bool, str]:
    assert response.status_code == 200, response.text
    return response.json()["reliability"]["results"][0]["abstained"], response.headers["x-sdm-bundle"]


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_promoted_and_rolled_back(serve_from: Any, put: Put, engine: Any, tmp_path: Path) -> None:
    old, new = put("old", STRICT), put("new", LAX)
    engine.script("thin one", state="thin")
    with serve_from(tmp_path / "old") as server:
        assert judged(server.chat("thin one")) == (True, old.digest)
        assert error(rollback(server)) == (409, "not_promoted")
        done = promote(server, "new").json()
        assert (done["bundle"], done["previous"]) == (new.digest, old.digest)
        assert judged(server.chat("thin one")) == (False, new.digest)
        assert server.client.get("/v1/models").json()["data"][0]["reliability"]["bundle"] == new.digest
        assert server.client.get("/v1/reliability").json()["bundle"] == new.digest
        assert rollback(server).json() | {"object": ""} == {
            "object": "",
            "model": "tiny",
            "bundle": old.digest,
            "previous": None,
            "shadow": None,
        }
        assert judged(server.chat("thin one")) == (True, old.digest)
        assert error(rollback(server)) == (409, "not_promoted")
        assert promote(server, new.digest[:12]).status_code == 200
        assert judged(server.chat("thin one")) == (False, new.digest)


def test_metrics_name_the_bundle_in_use(serve_from: Any, put: Put, tmp_path: Path) -> None:
    old, new = put("old", STRICT), put("new", LAX)
    with serve_from(tmp_path / "old") as server:
        promote(server, "new")
        page = server.client.get("/metrics").text
        info = [line for line in page.splitlines() if line.startswith("sdm_bundle_info{")]
        assert len(info) == 2
        assert all(new.digest in line and old.digest not in line for line in info)


def test_no_request_fails_while_bundles_change(
    serve_from: Any, put: Put, engine: Any, tmp_path: Path
) -> None:
    """Eight clients ask without a pause, whole and streamed; meanwhile the bundle changes a hundred times."""
    old, new = put("old", STRICT), put("new", LAX)
    engine.script("thin one", state="thin", pause_s=0.002)
    abstains = {old.digest: True, new.digest: False}
    store = tmp_path / "store.db"
    done = threading.Event()
    seen: list[tuple[str, str]] = []  # id, digest of each

    def ask(client: httpx.Client, number: int) -> None:
        while not done.is_set():
            body = {"model": "tiny", "messages": [{"role": "user", "content": "thin one"}]}
            if number % 2:
                answer = client.post("/v1/chat/completions", json=body)
                abstained, digest = judged(answer)
                content = answer.json()
            else:
                text = client.post("/v1/chat/completions", json=body | {"stream": True}).text
                assert text.endswith("data: [DONE]\n\n"), text
                chunks = [json.loads(one.removeprefix("data: ")) for one in text.split("\n\n")[:-2]]
                last = next(chunk for chunk in chunks if "reliability" in chunk)
                content, abstained = last, last["reliability"]["results"][0]["abstained"]
                digest = next(one for one in abstains if last["system_fingerprint"].endswith(one[:12]))
            assert content["system_fingerprint"].endswith(digest[:12])
            assert abstained == abstains[digest]
            seen.append((content["id"], digest))

    with serve_from(tmp_path / "old", store=str(store)) as server, ThreadPoolExecutor(8) as pool:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            asking = [pool.submit(ask, client, number) for number in range(8)]
            try:
                for _ in range(50):
                    assert promote(server, "new").status_code == 200
                    assert rollback(server).status_code == 200
            finally:
                done.set()
            for one in asking:
                one.result(30)
    used = Counter(digest for _, digest in seen)
    assert len(seen) >= 200
    assert min(used[old.digest], used[new.digest]) >= 20, used
    database = Database.open(str(store))
    kept = {
        row["id"]: (row["bundle"], row["abstained"])
        for row in database.read(lambda connection: list(answers(connection, labelled=False)))
    }
    database.close()
    assert kept == {id: (digest, abstains[digest]) for id, digest in seen}


def test_a_request_ends_with_the_bundle_that_it_began_with(
    serve_from: Any, put: Put, engine: Any, tmp_path: Path, wait_until: Any
) -> None:
    old, _ = put("old", STRICT), put("new", LAX)
    engine.script("slow one", state="thin", pause_s=0.5)
    with serve_from(tmp_path / "old") as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.chat, "slow one")
        wait_until(lambda: engine.running == 1)
        assert promote(server, "new").status_code == 200
        assert not asked.done()
        assert judged(asked.result()) == (True, old.digest)


def test_of_two_promotions_at_once_one_wins(
    serve_from: Any, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("old", STRICT), put("new", LAX), put("newer", 1.2)  # type: ignore[unused-ignore]
    held = threading.Event()

    def slowly(path: Path, key: Path | None) -> Bundle:
        assert held.wait(10)
        return load_bundle(path)

    monkeypatch.setattr(renewal, "load_signed", slowly)
    with serve_from(tmp_path / "old") as server, ThreadPoolExecutor(2) as pool:
        both = [pool.submit(promote, server, name) for name in ("new", "newer")]
        while not any(one.done() for one in both):
            time.sleep(0.01)
        assert error(rollback(server)) == (409, "change_under_way")
        held.set()
        assert sorted(one.result().status_code for one in both) == [200, 409]


def test_what_was_promoted_survives_a_restart(serve_from: Any, put: Put, engine: Any, tmp_path: Path) -> None:
    old, new = put("old", STRICT), put("new", LAX)
    with serve_from(tmp_path / "old") as server:
        promote(server, "new")
    with serve_from(tmp_path / "old") as server:
        assert judged(server.chat("hello"))[1] == new.digest
        assert rollback(server).json()["bundle"] == old.digest
    with serve_from(tmp_path / "old") as server:
        assert judged(server.chat("hello"))[1] == old.digest
        promote(server, "new")
    put("other", 1.2)
    with serve_from(tmp_path / "other") as server:  # it has a file of its own
        assert judged(server.chat("hello"))[1] == load_bundle(tmp_path / "other").digest


def made_anew(path: Path, bundle: Bundle, gates: TwoGates) -> None:
    """Puts a bundle of a later date in the place of the one at this path."""
    manifest = replace(bundle.manifest, rule=gates.terms, created="2026-02-02T00:00:00+00:00")
    publish(path, manifest, bundle.estimator, bundle.exemplars, bundle.report, gates.rule, replace=True)


def test_a_bundle_that_is_configured_anew_goes_before_what_was_promoted(
    serve_from: Any, put: Put, bundle: Bundle, gates: TwoGates, tmp_path: Path
) -> None:
    put("old", STRICT), put("new", LAX)  # type: ignore[unused-ignore]
    with serve_from(tmp_path / "old") as server:
        promote(server, "new")
    made_anew(tmp_path / "old", bundle, gates)
    with serve_from(tmp_path / "old") as server:
        assert judged(server.chat("hello"))[1] == load_bundle(tmp_path / "old").digest


def test_a_promoted_bundle_that_is_gone_is_said_at_start(
    serve_from: Any, put: Put, bundle: Bundle, gates: TwoGates, tmp_path: Path
) -> None:
    put("old", STRICT), put("new", LAX)  # type: ignore[unused-ignore]
    with serve_from(tmp_path / "old") as server:
        promote(server, "new")
    made_anew(tmp_path / "new", bundle, gates)
    with pytest.raises(PromotedFileError, match="put it back, or remove the file"):
        serve_from(tmp_path / "old")
    (tmp_path / "new").rename(tmp_path / "away")
    with pytest.raises(BundleNotFound):
        serve_from(tmp_path / "old")
    (tmp_path / "old.promoted.json").unlink()
    with serve_from(tmp_path / "old"):
        pass


@pytest.mark.parametrize("step", ["written", "synced", "replaced"])
def test_a_crash_between_steps_leaves_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Whatever step is the last: what is read next is what was there before, or what was to be."""
    file = tmp_path / "b.promoted.json"
    before, after = (Promotion("o" * 64, Located("/p", name * 64), None) for name in "ab")
    Promotions(file).put("tiny", before)

    class Crash(BaseException): ...

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    if step == "written":
        monkeypatch.setattr(promoted.os, "fsync", crash)
    elif step == "synced":
        monkeypatch.setattr(promoted.os, "replace", crash)
    else:
        monkeypatch.setattr(promoted.os, "open", crash)
    with pytest.raises(Crash):
        Promotions(file).put("tiny", after)
    monkeypatch.undo()
    assert Promotions(file).of("tiny") == (after if step == "replaced" else before)
    configured = Promotion("a" * 64, Located("/p", "a" * 64), None)
    Promotions(file).put("tiny", configured)
    assert Promotions(file).of("tiny") is None


def test_a_server_killed_amid_a_change_comes_back_with_one_of_the_two(
    serve_from: Any, put: Put, tmp_path: Path
) -> None:
    """kill -9 in the real server, at each step: what answers next is what the disk had, and no label is lost."""
    steps = {
        "checked": False,
        "written": False,
        "in place": True,
        "switched": True,
    }  # and whether it is changed
    cases = []
    for number, (change, step) in enumerate(product(("promote", "rollback"), steps)):
        folder = f"case {number}"
        (tmp_path / folder).mkdir()
        digests = {"promote": (put(f"{folder}/old", STRICT).digest, put(f"{folder}/new", LAX).digest)}
        digests["rollback"] = digests["promote"][::-1]
        cases.append({"folder": str(tmp_path / folder), "change": change, "step": step})
        cases[-1]["wanted"] = digests[change][steps[step]]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_promotion.py"))],
        input=json.dumps(cases),
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for case, (answer, ended) in zip(cases, json.loads(done.stdout), strict=True):
        assert ended == signal.SIGKILL, case
        folder = Path(case["folder"])
        with serve_from(folder / "old", store=str(folder / "store.db")) as server:
            assert judged(server.chat("hello"))[1] == case["wanted"], case
            again = server.client.post("/v1/reliability/feedback", json={"id": answer, "correct": True})
            assert again.json()["outcome"] == "unchanged", case  # it is known, with its label
            changed = case["wanted"] == load_bundle(folder / "new").digest
            next_ = rollback(server) if changed else promote(server, "new")  # and it can change again
            assert next_.status_code == 200, (case, next_.text)


def test_no_bundle_is_promoted_while_the_database_is_away(
    serve_from: Any, put: Put, postgres: Any, tmp_path: Path, wait_until: Any
) -> None:
    """Replicas could not agree on it. Answers go on, and what is acknowledged meanwhile is in the spool."""
    old = put("old", STRICT)
    new, store = put("new", LAX), postgres.database()
    with serve_from(tmp_path / "old", store=store, store_spool=tmp_path / "spool") as server:

        def thumb(id: str) -> tuple[int, str]:
            sent = server.client.post("/v1/reliability/feedback", json={"id": id, "correct": True})
            return sent.status_code, sent.json().get("outcome")

        before = server.chat("hello").json()["id"]
        postgres.stop(kill=True)
        try:
            assert error(promote(server, "new")) == (503, "change_not_kept")
            answer = server.chat("hello")
            assert judged(answer)[1] == old.digest
            given = [before, answer.json()["id"]]
            assert [thumb(one) for one in given] == [(200, "recorded")] * 2
        finally:
            postgres.start()
        wait_until(lambda: "candor_store_behind 0.0" in server.client.get("/metrics").text, 20)
        assert promote(server, "new").status_code == 200
        assert judged(server.chat("hello"))[1] == new.digest
        assert [thumb(one) for one in given] == [(200, "unchanged")] * 2


def test_what_cannot_be_written_is_not_promoted(
    serve_from: Any, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = put("old", STRICT), put("new", LAX)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with serve_from(tmp_path / "old") as server:
        monkeypatch.setattr(promoted.os, "replace", full)
        assert error(promote(server, "new")) == (503, "change_not_kept")
        assert judged(server.chat("hello"))[1] == old.digest
        monkeypatch.undo()
        assert promote(server, "new").status_code == 200
        assert judged(server.chat("hello"))[1] == new.digest


def test_a_file_that_says_nothing_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "b.promoted.json"
    for text in ("", "[]", '{"tiny": {"over": 3}}'):
        file.write_text(text)
        with pytest.raises(PromotedFileError, match="remove it to serve the configured bundle"):
            Promotions(file)


def test_what_does_not_fit_is_not_promoted(serve_from: Any, put: Put, bundle: Bundle, tmp_path: Path) -> None:
    old = put("old", STRICT)
    put("policy", LAX, policy=replace(bundle.manifest.policy, max_tokens=8))
    put("model", LAX, model=replace(bundle.manifest.model, weights_sha256="e" * 64))
    put("name", LAX, name="another")
    publish(tmp_path / "regions", bundle.manifest, bundle.estimator, bundle.exemplars, bundle.report)
    put("new", LAX)
    (tmp_path / "damaged").mkdir()
    for file in (tmp_path / "new").iterdir():
        (tmp_path / "damaged" / file.name).write_bytes(
            file.read_bytes() + (b" " if "report" in file.name else b"")
        )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    publish(elsewhere / "one", bundle.manifest, bundle.estimator, bundle.exemplars, bundle.report)
    said = {
        "policy": "max_tokens",
        "model": "weights",
        "name": "another",
        "regions": "two gates",
        "damaged": "report.json",
        str(elsewhere / "one"): "where the configured one lies",
        "old": "answers already",
    }
    with serve_from(tmp_path / "old") as server:
        for reference, words in said.items():
            response = promote(server, reference)
            assert error(response) == (409, "not_promoted"), reference
            assert words in response.json()["error"]["message"], reference
        for reference in ("nowhere", "x" * 900, "\0", "../elsewhere"):
            assert promote(server, reference).status_code in (400, 404, 409), reference
        assert error(promote(server)) == (409, "not_promoted")  # nothing shadows
        assert promote(server, "new", model="nobody").status_code == 404
        assert promote(server, "new", more=1).status_code == 400
        assert judged(server.chat("hello"))[1] == old.digest
    assert not (tmp_path / "old.promoted.json").exists()


def test_a_lesser_promise_is_not_promoted(
    serve_from: Any, put: Put, bundle: Bundle, gates: TwoGates, tmp_path: Path
) -> None:
    put("old", STRICT)
    manifest = replace(bundle.manifest, rule=replace(gates.terms, certificates=()))
    publish(tmp_path / "none", manifest, bundle.estimator, bundle.exemplars, bundle.report, gates.rule)
    with serve_from(tmp_path / "old") as server:
        response = promote(server, "none")
        assert error(response) == (409, "not_promoted")
        assert "promises less" in response.json()["error"]["message"]


def test_other_states_than_calibrated_are_not_promoted(
    serve_from: Any, put: Put, bundle: Bundle, gates: TwoGates, tmp_path: Path
) -> None:
    put("old", STRICT)
    moved = replace(bundle.estimator.support, h_prime=bundle.estimator.support.h_prime + 3.0)
    manifest = replace(bundle.manifest, rule=gates.terms)
    publish(
        tmp_path / "moved",
        manifest,
        replace(bundle.estimator, support=moved),
        bundle.exemplars,
        bundle.report,
        gates.rule,
    )
    with serve_from(tmp_path / "old") as server:
        response = promote(server, "moved")
        assert error(response) == (409, "not_promoted")
        assert "golden prompt" in response.json()["error"]["message"]
        assert server.client.get("/readyz?deep=true").status_code == 200


def test_a_pinned_bundle(serve_from: Any, put: Put, tmp_path: Path) -> None:
    old, new = put("old", STRICT), put("new", LAX)
    pair = {"messages": [{"role": "user", "content": "hello"}], "response": "yes"}
    with serve_from(tmp_path / "old") as server:
        pins = {"headers": {"x-sdm-bundle": old.digest}}, {"reliability": {"bundle": old.digest}}

        def ask() -> list[httpx.Response]:
            body = {"model": "tiny", "messages": pair["messages"]}
            url = "/v1/chat/completions"
            return [
                server.client.post(url, json=body, **pins[0]),
                server.client.post(url, json=body | pins[1]),
                server.client.post("/v1/reliability", json=pair, **pins[0]),
                server.client.post("/v1/reliability", json=pair | {"bundle": old.digest}),
            ]

        assert [one.status_code for one in ask()] == [200] * 4
        promote(server, "new")
        for one in ask():
            assert error(one) == (409, "bundle_changed")
            assert one.headers["x-sdm-bundle"] == new.digest
        rollback(server)
        assert [one.status_code for one in ask()] == [200] * 4
        assert server.chat("hello", reliability={"bundle": "short"}).status_code == 400


def test_the_scope_of_the_routes(serve_from: Any, put: Put, tmp_path: Path) -> None:
    assert {scope_of(path) for path in ("/bundles", "/bundles/promote", "/bundles/rollback")} == {"operate"}


def test_the_commands(serve_from: Any, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = put("old", STRICT), put("new", LAX)
    keys = tmp_path / "keys"
    secrets = {}
    for name in ("answer", "operate"):
        done = CliRunner().invoke(cli, ["key", name, "--scope", name, "--file", str(keys)])
        secrets[name] = done.stdout.split()[-1]
    with serve_from(tmp_path / "old", keys=keys) as server:

        def call(key: str, *words: str) -> Any:
            monkeypatch.setenv("CANDOR_API_KEY", secrets[key])
            return CliRunner().invoke(cli, [*words, "--url", server.url])

        refused = call("answer", "promote", "new")
        assert refused.exit_code == 1
        assert "scope" in refused.stderr
        assert new.digest in call("operate", "promote", "new").stdout
        again = call("operate", "promote", "new")
        assert again.exit_code == 1
        assert "already" in again.stderr
        assert old.digest in call("operate", "rollback").stdout
    assert CliRunner().invoke(cli, ["rollback", "--url", server.url]).exit_code == 1


# Shadow


def test_the_matrix_is_exact(serve_from: Any, put: Put, engine: Any, tmp_path: Path, wait_until: Any) -> None:
    old, new = put("old", STRICT), put("new", LAX)
    for prompt, script in {
        "clear one": {"state": "follows"},
        "thin one": {"state": "thin"},
        "edge one": {"state": "edge"},
        "broken one": {"state": "nan"},
        "strange one": {"kind": "stranger"},
    }.items():
        engine.script(prompt, **script)
    asked = {"clear one": 5, "thin one": 7, "edge one": 3, "broken one": 2, "strange one": 4}
    store = str(tmp_path / "store.db")
    with serve_from(tmp_path / "old", shadow=tmp_path / "new", store=store) as server:
        for prompt, times in asked.items():
            for number in range(times):
                more = {"stream": True} if number % 2 else {}
                server.chat(prompt, **more, reliability={"mode": "annotate"})
        server.chat("strange one", reliability={"mode": "abstain"})  # refused when prefill ends, by both
        server.chat("clear one", reliability={"mode": "off"})  # judged by nobody
        server.chat("clear one", n=2, reliability={"mode": "annotate"})

        def shadow() -> Any:
            return server.client.get("/bundles").json()["data"][0]["shadow"]

        wanted = {
            "answered": {"answered": 7, "abstained": 0, "unknown": 0},
            "abstained": {"answered": 7, "abstained": 8, "unknown": 2},
        }
        wait_until(lambda: sum(sum(row.values()) for row in shadow()["decisions"].values()) == 24)
        assert shadow() == {"bundle": new.digest, "decisions": wanted, "dropped": 0}
        assert server.client.get("/v1/reliability").json()["shadow"] == shadow()
        page = server.client.get("/metrics").text
        for before, row in wanted.items():
            for after, count in row.items():
                labels = f'model_name="tiny",new="{after}",old="{before}"'
                assert f"sdm_shadow_total{{{labels}}} {float(count)}" in page
        assert judged(server.chat("thin one")) == (True, old.digest)  # it decides nothing
    database = Database.open(store)
    rows = database.read(lambda connection: list(answers(connection, labelled=False)))
    database.close()
    disputed = [row for row in rows if row["disputed_by"] is not None]
    assert {row["disputed_by"] for row in disputed} == {new.digest}
    assert Counter((row["score"], row["abstained"]) for row in disputed) == {(1.0, True): 8}


def test_a_slow_shadow_drops_and_holds_up_nobody(
    serve_from: Any, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    put("old", STRICT), put("new", LAX)  # type: ignore[unused-ignore]
    from candor.app.answering import shadow as shadowing

    held = threading.Event()
    decide = shadowing.Shadow._decide

    async def slowly(self: Any, asked: Any) -> Any:
        import asyncio

        await asyncio.to_thread(held.wait, 10)
        return await decide(self, asked)

    monkeypatch.setattr(shadowing.Shadow, "_decide", slowly)
    monkeypatch.setattr(shadowing.Shadow.__init__, "__defaults__", (3,))
    with serve_from(tmp_path / "old", shadow=tmp_path / "new") as server:
        for _ in range(10):
            assert server.chat("hello").status_code == 200
        wait_until(
            lambda: 'sdm_shadow_dropped_total{model_name="tiny"} 7.0' in server.client.get("/metrics").text
        )
        held.set()
        wait_until(lambda: "} 3.0" in server.client.get("/metrics").text)


def test_what_shadows_is_promoted(serve_from: Any, put: Put, tmp_path: Path, wait_until: Any) -> None:
    old, new = put("old", STRICT), put("new", LAX)
    with serve_from(tmp_path / "old", shadow=tmp_path / "new") as server:
        server.chat("hello")
        done = promote(server).json()
        assert (done["bundle"], done["previous"], done["shadow"]) == (new.digest, old.digest, None)
        assert judged(server.chat("hello"))[1] == new.digest
        assert rollback(server).json()["shadow"]["bundle"] == new.digest  # it shadows on
        server.chat("hello")
        wait_until(
            lambda: (
                server.client.get("/bundles").json()["data"][0]["shadow"]["decisions"]["answered"]["answered"]
                == 2
            )
        )


def test_a_shadow_that_does_not_fit_is_refused_at_start(
    serve_from: Any, put: Put, bundle: Bundle, tmp_path: Path
) -> None:
    put("old", STRICT)
    put("policy", LAX, policy=replace(bundle.manifest.policy, max_tokens=8))
    with pytest.raises(BundleError, match="max_tokens"):
        serve_from(tmp_path / "old", shadow=tmp_path / "policy")
