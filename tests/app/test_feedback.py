"""Feedback over HTTP: what is acknowledged is in the store, counted once, and belongs to an answer that was given."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest


def rows(path: Path, what: str = "*", table: str = "thumbs") -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as file:
        return file.execute(f"SELECT {what} FROM {table} ORDER BY id, choice").fetchall()


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
    with serve(store=str(path)) as server:
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
            'certified="false",correct="true",decision="answered",model_name="tiny",region="high"': 2,
            'certified="false",correct="false",decision="answered",model_name="tiny",region="high"': 1,
            'certified="false",correct="false",decision="abstained",model_name="tiny",region="ood"': 1,
            'certified="false",correct="true",decision="abstained",model_name="tiny",region="low"': 1,
        }
    kept = {(id, choice): rest for id, choice, *rest in rows(path, "id, choice, correct, comment, caller")}
    assert kept[high, 1] == [0, "no", "anyone"]
    assert len(kept) == 5


def test_said_again_and_taken_back(serve: Any, tmp_path: Path) -> None:
    with serve(store=str(tmp_path / "f")) as server:
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
    with serve(store=str(path)) as server:
        given = server.chat("ask").json()["id"]
    server.engine.closed = False
    with serve(store=str(path)) as server:
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
    with serve(store=str(tmp_path / "f")) as server:
        body["id"] = body["id"].replace("GIVEN", server.chat("ask").json()["id"])
        refused = send(server, **body)
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "answer_not_found"
    assert rows(tmp_path / "f") == []


def test_an_unchecked_answer_has_no_verdict_to_judge(serve: Any, tmp_path: Path) -> None:
    with serve(store=str(tmp_path / "f")) as server:
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
    with serve(store=str(tmp_path / "f")) as server:
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
    assert "CANDOR_STORE" in refused.json()["error"]["message"]


def test_let_through_and_withheld_are_counted_apart(serve: Any, tmp_path: Path) -> None:
    """The region high holds both: an answer that was judged wrong, and rightly so, is no wrong answer let through."""
    with serve(store=str(tmp_path / "f")) as server:
        server.engine.script("wrong", state="not_following")
        for prompt, correct in (
            ("ask", True),
            ("ask", True),
            ("wrong", False),
            ("wrong", False),
            ("wrong", True),
        ):
            given = server.chat(prompt).json()
            assert given["reliability"]["results"][0]["region"] == "high"
            send(server, id=given["id"], correct=correct)
        counted = counts(server)
        one = 'certified="false",correct="{}",decision="{}",model_name="tiny",region="high"'
        assert counted == {
            one.format("true", "answered"): 2,
            one.format("false", "abstained"): 2,
            one.format("true", "abstained"): 1,
        }


def test_what_is_kept_of_an_answer(serve: Any, gates: Any, tmp_path: Path) -> None:
    path = tmp_path / "f"
    with serve(store=str(path), keep_texts="all", keep_states="all", audit_share=1, gates=gates) as server:
        server.engine.script("far", kind="stranger")
        asked = [server.chat("ask", n=2), server.chat("far", reliability={"mode": "abstain"})]
        pair = server.client.post("/v1/reliability", json={"prompt": "a", "response": "b"}).json()["id"]
        plain = server.client.post(
            "/v1/completions", json={"model": "tiny", "prompt": ["one", "two"], "n": 2}
        )
        ids = [one.json()["id"] for one in (*asked, plain)]
    columns = (
        "id, choice, kind, model, rule, alpha, region, reason, covered, caller, audit_probability, drawn"
    )
    kept = {(id, choice): rest for id, choice, *rest in rows(path, columns, "verdicts")}
    let_through = ["answer", "tiny", "two-gates", 0.9, "high", None, 1, "anyone"]
    assert kept[ids[0], 0] == [*let_through, 1.0, 1]
    assert kept[ids[0], 1] == [*let_through, 0.0, 0]  # of the choices for one prompt only the first is drawn
    assert kept[ids[1], 0][:8] == [
        "answer",
        "tiny",
        "two-gates",
        0.9,
        "ood",
        "out_of_distribution",
        0,
        "anyone",
    ]
    assert kept[pair, 0][0] == "pair"
    assert kept[pair, 0][-1] == 0
    texts = {
        (id, choice): (json.loads(said), answer, h and len(h), states and len(states))
        for id, choice, said, answer, h, states in rows(
            path, "id, choice, conversation, answer, h, prompt_states", "contents"
        )
    }
    turns = [{"role": "user", "content": "ask"}]
    assert texts[ids[0], 1] == (turns, "The answer.", 8 * 4, 8 * 4)
    assert texts[ids[1], 0] == ([{"role": "user", "content": "far"}], "", None, 8 * 4)  # refused unwritten
    assert [texts[ids[2], index][0] for index in range(4)] == ["one", "one", "two", "two"]
    assert (pair, 0) not in texts
