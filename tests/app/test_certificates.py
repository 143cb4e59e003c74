"""How certificates stand: in answers, metrics and the bundle's report; what a server does where one is suspended."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from candor.app.cli import cli
from candor.app.edge.keys import make_key

Label = Callable[..., Any]


def label(server: Any, id: str, correct: bool | None, **more: Any) -> Any:
    body = {"id": id, "correct": correct, **more}
    return server.client.post("/v1/reliability/labels", json=body)


def ask(server: Any, prompt: str = "ask", **options: Any) -> tuple[str, dict[str, Any]]:
    body = server.chat(prompt, **({"reliability": options} if options else {})).json()
    return body["id"], body["reliability"]["results"][0]


def audited(server: Any, *labels: bool | None) -> None:
    """Answers that a certificate covers, each with its label."""
    for one in labels:
        id, result = ask(server)
        assert result["certificate"] is not None
        assert label(server, id, one).status_code == 200


def standing(server: Any) -> dict[str, Any]:
    report = server.client.get("/v1/reliability").json()
    [one] = report["standings"]
    return dict(one)


def stands(server: Any, name: str) -> Callable[[], bool]:
    return lambda: standing(server)["standing"] == name


def metric(server: Any, name: str) -> dict[str, float]:
    lines = server.client.get("/metrics").text.splitlines()
    return {
        line.split("{")[1].split("}")[0]: float(line.split()[-1])
        for line in lines
        if line.startswith(f"{name}{{")
    }


def test_from_upheld_to_suspended_to_renewed(
    serve: Any, gates: Any, tmp_path: Path, wait_until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(store=str(tmp_path / "s"), gates=gates, audit_share=1) as server:
        assert ask(server)[1]["certificate"]["standing"] == "upheld"
        assert standing(server) | {"open": 0, "renewal": 0} == {
            "rule": "two-gates",
            "alpha": 0.9,
            "standing": "upheld",
            "alarm": 0.0,
            "renewal": 0,
            "threshold": pytest.approx(1.301, abs=0.001),
            "right": 0,
            "wrong": 0,
            "open": 0,
            "since": 0,
        }
        audited(server, *[False] * 6)
        wait_until(stands(server, "suspended"), 20)
        found = standing(server)
        assert found["alarm"] >= found["threshold"]
        _, result = ask(server)
        assert result["certificate"]["standing"] == "suspended"
        assert (result["abstained"], result["reason"]) == (
            False,
            None,
        )  # annotate: it is said, and nothing withheld
        _, strict = ask(server, certified=True)
        assert (strict["abstained"], strict["reason"]) == (True, "certificate_suspended")

        where = 'alpha="0.9",model_name="tiny",rule="two-gates"'
        assert metric(server, "sdm_certificate_standing") == {
            f'{where},standing="{name}"': float(name == "suspended")
            for name in ("upheld", "suspended", "renewed")
        }
        assert metric(server, "sdm_certificate_audits")[f'alpha="0.9",label="wrong",{where[12:]}'] == 6
        evidence = metric(server, "sdm_certificate_evidence")
        assert evidence[f'alpha="0.9",direction="alarm",{where[12:]}'] == pytest.approx(found["alarm"])

        audited(server, *[True] * 80)
        wait_until(stands(server, "renewed"), 20)
        assert ask(server)[1]["certificate"]["standing"] == "renewed"
    said = [record.message for record in caplog.records if "certificate" in record.message]
    assert [("suspended" in line, "renewed" in line) for line in said] == [(True, False), (False, True)]


def test_an_operator_may_have_it_withhold(serve: Any, gates: Any, tmp_path: Path, wait_until: Any) -> None:
    """And what is withheld then is written and drawn all the same, so that audits can renew the certificate."""
    with serve(
        store=str(tmp_path / "s"), gates=gates, audit_share=1, on_suspended="abstain", keep_texts="drawn"
    ) as server:
        audited(server, *[False] * 6)
        wait_until(stands(server, "suspended"), 20)
        body = server.chat("ask", reliability={"mode": "abstain"}).json()
        [result] = body["reliability"]["results"]
        assert (result["region"], result["reason"]) == ("high", "certificate_suspended")
        assert "no longer" in result["explanation"]
        assert result["certificate"]["standing"] == "suspended"
        assert body["choices"][0]["message"]["content"] is None
        assert label(server, body["id"], True).json()["outcome"] == "recorded"
        queue = server.client.get("/v1/reliability/queue").json()
        assert queue["items"] == []
        id, _ = ask(server)
        [item] = server.client.get("/v1/reliability/queue").json()["items"]
        assert (item["id"], item["answer"]) == (id, "The answer.")
        assert label(server, id, True).status_code == 200
        audited(server, *[True] * 80)
        wait_until(stands(server, "renewed"), 20)
        assert ask(server)[1]["reason"] is None


def test_a_standing_is_known_from_the_first_answer_and_to_every_replica(
    serve: Any, gates: Any, tmp_path: Path, wait_until: Any
) -> None:
    with serve(store=str(tmp_path / "s"), gates=gates, audit_share=1) as server:
        audited(server, *[False] * 6)
        server.engine.closed = False
    with serve(store=str(tmp_path / "s"), gates=gates, audit_share=1, on_suspended="abstain") as server:
        assert ask(server)[1]["reason"] == "certificate_suspended"


def test_thumbs_move_no_certificate(serve: Any, gates: Any, tmp_path: Path) -> None:
    with serve(store=str(tmp_path / "s"), gates=gates, audit_share=1) as server:
        for _ in range(20):
            id, _result = ask(server)
            sent = server.client.post("/v1/reliability/feedback", json={"id": id, "correct": False})
            assert sent.status_code == 200
        audited(server, True)
        found = standing(server)
        assert (found["standing"], found["wrong"]) == ("upheld", 0)


def test_without_a_store_nobody_watches(serve: Any, gates: Any) -> None:
    with serve(gates=gates) as server:
        assert ask(server)[1]["certificate"]["standing"] is None
        assert server.client.get("/v1/reliability").json()["standings"] == []
        for path in ("queue", "answers/x"):
            refused = server.client.get(f"/v1/reliability/{path}")
            assert refused.status_code == 404
            assert "CANDOR_STORE" in refused.json()["error"]["message"]


def test_drift_is_shown_by_model_and_key(serve: Any, gates: Any) -> None:
    with serve(gates=gates) as server:
        server.engine.script("far", kind="stranger")
        for _ in range(60):
            server.chat("far")
        evidence = metric(server, "sdm_prompt_drift_evidence")
        assert (
            evidence['key="",model_name="tiny"']
            > metric(server, "sdm_prompt_drift_threshold")['model_name="tiny"']
        )
        assert evidence['key="anyone",model_name="tiny"'] > 5
        before = evidence
        server.client.post("/v1/completions", json={"model": "tiny", "prompt": "far"})
        assert (
            metric(server, "sdm_prompt_drift_evidence") == before
        )  # it departs from the policy, and is said to


def test_evidence_of_drift_goes_on_after_a_restart(serve: Any, gates: Any, tmp_path: Path) -> None:
    """With what is in the store, of whichever replica; of this bundle's prompts alone, and each once."""
    store = str(tmp_path / "s")
    with serve(store=store, gates=gates) as server:
        server.engine.script("far", kind="stranger")
        for _ in range(20):
            server.chat("far")
        server.chat("near", n=2)
        server.client.post(
            "/v1/completions", json={"model": "tiny", "prompt": "far"}
        )  # it departs from the policy
        pair = {"messages": [{"role": "user", "content": "far"}], "response": "yes"}
        server.client.post("/v1/reliability", json=pair)
        before = metric(server, "sdm_prompt_drift_evidence")
    assert before['key="",model_name="tiny"'] > 2
    with serve(store=store, gates=gates) as server:
        assert metric(server, "sdm_prompt_drift_evidence") == pytest.approx(before)
    with closing(sqlite3.connect(store)) as file:
        [first] = file.execute("SELECT id FROM verdicts ORDER BY number LIMIT 1").fetchone()
    CliRunner().invoke(cli, ["store", "forget", first, "--store", store])
    with serve(store=store, gates=gates) as server:  # the prompt counts, and nobody asked it
        after = metric(server, "sdm_prompt_drift_evidence")
        assert after['key="",model_name="tiny"'] == pytest.approx(before['key="",model_name="tiny"'])
        assert after['key="anyone",model_name="tiny"'] < before['key="anyone",model_name="tiny"']
    with closing(sqlite3.connect(store)) as file, file:
        file.execute("UPDATE verdicts SET bundle = 'another'")
    with serve(store=store, gates=gates) as server:
        assert metric(server, "sdm_prompt_drift_evidence") == {'key="",model_name="tiny"': 0.0}


# --- review


def test_the_queues(serve: Any, gates: Any, tmp_path: Path) -> None:
    with serve(store=str(tmp_path / "s"), gates=gates, audit_share=1, keep_texts="all") as server:
        server.engine.script("thin", state="thin")
        first, _ = ask(server, "first")
        second, _ = ask(server, "second")
        withheld, _ = ask(server, "thin", mode="abstain")
        server.client.post("/v1/reliability/feedback", json={"id": second, "correct": False})

        def queue(kind: str, **more: Any) -> dict[str, Any]:
            return dict(server.client.get("/v1/reliability/queue", params={"kind": kind, **more}).json())

        sampled = queue("sampled")
        assert [(one["id"], one["thumb"]) for one in sampled["items"]] == [(first, None), (second, False)]
        assert sampled["items"][0]["conversation"] == [{"role": "user", "content": "first"}]
        assert sampled["waiting"] == {"sampled": 2, "withheld": 1, "disputed": 0}
        assert "region" not in sampled["items"][0]  # whoever labels must not know the verdict
        assert [one["id"] for one in queue("withheld")["items"]] == [withheld]
        assert len(queue("sampled", limit=1)["items"]) == 1
        assert label(server, first, None).json()["outcome"] == "recorded"
        assert label(server, withheld, False, answer="mine").json()["outcome"] == "recorded"
        assert [one["id"] for one in queue("sampled")["items"]] == [second]
        assert queue("sampled")["waiting"] == {"sampled": 1, "withheld": 0, "disputed": 0}
        assert label(server, "none", True).status_code == 404
        for wrong in ({"kind": "all"}, {"limit": 0}):
            assert server.client.get("/v1/reliability/queue", params=wrong).status_code == 400
        assert server.client.post("/v1/reliability/labels", json={"id": first}).status_code == 400

        ticket = server.client.get(f"/v1/reliability/answers/{withheld}").json()
        assert ticket["results"] == [
            {
                "index": 0,
                "region": "low",
                "abstained": True,
                "reason": "below_score_threshold",
                "labelled": True,
                "correct": False,
                "answer": "mine",
            }
        ]
        waiting = server.client.get(f"/v1/reliability/answers/{second}").json()["results"][0]
        assert (waiting["labelled"], waiting["correct"], waiting["answer"]) == (False, None, None)


def test_who_may_review_and_fetch(serve: Any, gates: Any, tmp_path: Path) -> None:
    scopes = {"alice": "answer", "bob": "answer", "ann": "review", "ben": "review", "op": "operate"}
    made = {name: make_key(name, [scope]) for name, scope in scopes.items()}  # type: ignore[list-item]
    (tmp_path / "keys").write_text("".join(key.line() for _, key in made.values()))
    secrets = {name: secret for name, (secret, _) in made.items()}

    def as_(name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {secrets[name]}"}

    settings = {"store": str(tmp_path / "s"), "keys": tmp_path / "keys", "audit_share": 1, "gates": gates}
    with serve(**settings) as server:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "ask"}]}
        ids = [
            server.client.post("/v1/chat/completions", json=body, headers=as_("alice")).json()["id"]
            for _ in range(4)
        ]
        for name in ("alice", "op"):
            assert server.client.get("/v1/reliability/queue", headers=as_(name)).status_code == 403
        for name, says in (("ann", [True, True, False, True]), ("ben", [True, False, False, None])):
            for id, correct in zip(ids, says, strict=True):
                sent = {"id": id, "correct": correct}
                assert server.client.post("/v1/reliability/labels", json=sent, headers=as_(name)).is_success
        queue = server.client.get("/v1/reliability/queue", headers=as_("ann")).json()
        assert queue["reviewer"] == "ann"
        assert queue["agreement"] == [
            {
                "reviewers": ["ann", "ben"],
                "answers": 3,
                "share": pytest.approx(2 / 3),
                "kappa": pytest.approx(0.4),  # by chance 4 / 9
            }
        ]
        mine = server.client.get(f"/v1/reliability/answers/{ids[1]}", headers=as_("alice"))
        assert mine.json()["results"][0]["correct"] is None  # they differ
        assert server.client.get(f"/v1/reliability/answers/{ids[0]}", headers=as_("bob")).status_code == 404


# --- the command


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, ["audit", *arguments])
    assert done.exit_code == code, done.output
    return done.output


def test_the_command(serve: Any, gates: Any, tmp_path: Path) -> None:
    store = ("--store", str(tmp_path / "s"))
    with serve(store=store[1], gates=gates, audit_share=1, keep_texts="all") as server:
        server.engine.script("thin", state="thin")
        ids = [ask(server)[0] for _ in range(6)] + [ask(server, "thin")[0]]
    assert "upheld" in run("list", *store)
    assert "6 sampled, 1 withheld" in run("list", *store)
    lines = [
        json.loads(line) for line in run("queue", *store, "--reviewer", "ann", "--limit", "2").splitlines()
    ]
    assert [line["id"] for line in lines] == ids[:2]
    assert lines[0]["messages"] == [{"role": "user", "content": "ask"}]
    assert lines[0]["response"] == "The answer."
    assert json.loads(run("queue", *store, "--reviewer", "ann", "--withheld"))["id"] == ids[6]

    assert run("label", ids[0], *store, "--reviewer", "ann", "--as", "wrong") == "recorded\n"
    assert run("label", ids[0], *store, "--reviewer", "ann", "--as", "wrong") == "unchanged\n"
    assert run("label", ids[0], *store, "--reviewer", "ann", "--as", "right") == "replaced\n"
    assert run("label", ids[0], *store, "--reviewer", "ben", "--as", "unclear") == "recorded\n"
    run("label", ids[0], *store, "--reviewer", "ann", "--as", "maybe", code=2)
    assert "no answer in the store" in run(
        "label", "none", *store, "--reviewer", "ann", "--as", "right", code=1
    )

    exported = run("export", *store, "--all").splitlines()
    assert len(exported) == 7
    filled = [json.loads(line) | {"label": 0} for line in exported[1:6]]
    assert filled[0]["audit_probability"] == 1.0
    (tmp_path / "filled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in filled))
    assert run("import", str(tmp_path / "filled.jsonl"), *store, "--reviewer", "ben") == "5 recorded\n"
    assert run("import", str(tmp_path / "filled.jsonl"), *store, "--reviewer", "ben") == "5 unchanged\n"
    assert [json.loads(line)["label"] for line in run("export", *store).splitlines()] == [1, 0, 0, 0, 0, 0]
    assert "suspended; of 6 audits 1 right" in run("list", *store)
    run("label", ids[1], *store, "--reviewer", "ann", "--as", "right")
    assert "ann and ben: 1 answers, the same on 0%" in run("agreement", *store)

    (tmp_path / "bad.jsonl").write_text('{"id": "x", "label": 2}\n')
    assert "line 1" in run("import", str(tmp_path / "bad.jsonl"), *store, "--reviewer", "ann", code=1)
    (tmp_path / "unknown.jsonl").write_text('{"id": "x", "label": 1}\n')
    assert "1 not in the store" in run(
        "import", str(tmp_path / "unknown.jsonl"), *store, "--reviewer", "a", code=1
    )


def test_labelled_answers_can_be_calibrated_on(serve: Any, gates: Any, tmp_path: Path) -> None:
    from candor.calibration.data import load

    store = ("--store", str(tmp_path / "s"))
    with serve(store=store[1], gates=gates, audit_share=1, keep_texts="all") as server:
        for prompt, correct in (("one", True), ("two", False)):
            label(server, ask(server, prompt)[0], correct)
    (tmp_path / "labelled.jsonl").write_text(run("export", *store))
    records = load(tmp_path / "labelled.jsonl").records
    assert [(one.label, one.response) for one in records] == [(1, "The answer."), (0, "The answer.")]


def test_a_command_without_a_store_says_so() -> None:
    assert "CANDOR_STORE" in run("list", code=2)
