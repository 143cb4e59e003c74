"""Escalation over HTTP: what is withheld is put to another model; one that misbehaves gives the ordinary refusal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from candor.app.answering import escalation
from candor.app.answering.escalation import Circuit
from candor.app.edge.limits import Refused
from candor.policy.cascade import CascadeCertificate, CascadeTerms
from candor.policy.policy import Policy
from tests.app import upstream as fakes

REFUSAL = "I do not know this reliably enough to answer."
ESCALATE = {"mode": "abstain", "on_abstain": "escalate"}
WITHIN_S = 3.0
"""What the upstream is given: a busy machine stops a process for a second, and that is no timeout."""
CASCADE = CascadeTerms(
    "big", 16, 7.0, 3.0, (CascadeCertificate(0.9, 0.95, 400, 200, 0.55, 390, 360, 0.9001),)
)


@pytest.fixture
def escalating(serve: Any, upstream: Any, gates: Any) -> Any:
    """`with escalating(...) as server`: two gates, and the fake as its upstream."""

    def start(**given: Any) -> AbstractContextManager[Any]:
        return serve(gates=gates, **{"escalate_url": upstream.url, "escalate_model": "big", **given})

    return start


@pytest.fixture
def server(escalating: Any) -> Iterator[Any]:
    """`thin` is withheld at its end, `strange` at prefill."""
    with escalating(escalate_retries=1, escalate_timeout_s=WITHIN_S) as server:
        server.engine.script("thin", state="thin")
        server.engine.script("strange", kind="stranger", hangs=True)
        yield server


def metric(server: Any, name: str, **labels: str) -> float:
    for line in server.client.get("/metrics").text.splitlines():
        if line.startswith(name + "{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"no {name} with {labels}")


def came_of(server: Any) -> dict[str, float]:
    """Outcomes that were counted."""
    lines = server.client.get("/metrics").text.splitlines()
    counted = (line for line in lines if line.startswith("sdm_escalations_total{"))
    every = {line.split('outcome="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in counted}
    return {outcome: count for outcome, count in every.items() if count}


def message(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]


def result(response: Any) -> dict[str, Any]:
    return response.json()["reliability"]["results"][0]


def contents(chunks: list[dict[str, Any]], index: int = 0) -> list[str]:
    """Texts of one choice, piece by piece."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return [text for one in choices if (text := one["delta"].get("content"))]


def refusals(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("refusal") or "" for chunk in chunks for choice in chunk["choices"])


@pytest.mark.parametrize("prompt", ["thin", "strange"])
def test_the_other_model_answers_what_is_withheld(server: Any, upstream: Any, prompt: str) -> None:
    response = server.chat(prompt, reliability=ESCALATE, logprobs=True)
    assert message(response) == {"role": "assistant", "content": "Theirs.", "refusal": None}
    [choice] = response.json()["choices"]
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    one = result(response)
    assert one["abstained"] is True
    assert one["escalated"] == {
        "model": "big",
        "certified": None,
        "prompt_tokens": 7,
        "completion_tokens": 3,
    }
    assert response.headers["x-sdm-abstained"] == "true"
    [asked] = upstream.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.body == {
        "model": "big",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}],
        "max_tokens": 16,
        "stream": False,
    }
    assert came_of(server) == {"answered": 1}
    assert metric(server, "sdm_escalation_duration_seconds_count") == 1
    assert metric(server, "sdm_escalation_tokens_total", kind="completion") == 3
    assert metric(server, "sdm_escalation_circuit") == 0


def test_what_is_let_through_is_not_put_to_it(server: Any, upstream: Any) -> None:
    response = server.chat("ask", reliability=ESCALATE)
    assert message(response)["content"] == "The answer."
    assert result(response)["escalated"] is None
    assert contents(server.chunks("ask", reliability=ESCALATE)) == ["The answer."]
    server.chat("thin", reliability={"on_abstain": "escalate"})  # nothing is withheld in mode annotate
    server.chat("thin", reliability={"mode": "abstain"})
    assert not upstream.asked


def test_nothing_of_the_client_or_of_the_withheld_answer_leaves(
    escalating: Any, upstream: Any, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("sk-theirs\n")
    with escalating(escalate_key_file=key) as server:
        server.engine.script("thin", state="thin", pieces=("SECRET",))
        headers = {"authorization": "Bearer client-key", "x-request-id": "mine", "cookie": "a=b"}
        messages = [{"role": "user", "content": "thin", "name": "me"}]
        body = {"model": "tiny", "messages": messages, "user": "me", "reliability": ESCALATE}
        assert server.client.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
        [asked] = upstream.asked
        assert set(asked.headers) == {
            "accept",
            "accept-encoding",
            "authorization",
            "connection",
            "content-length",
            "content-type",
            "host",
            "user-agent",
        }
        assert asked.headers["authorization"] == "Bearer sk-theirs"
        assert asked.headers["accept-encoding"] == "identity"
        assert "SECRET" not in json.dumps(asked.body)
        key.write_text("sk-newer")
        server.chat("thin", reliability=ESCALATE)
        assert upstream.asked[-1].headers["authorization"] == "Bearer sk-newer"
        key.unlink()
        assert message(server.chat("thin", reliability=ESCALATE))["refusal"] == REFUSAL


def test_its_cookies_and_the_environments_proxies_are_not_used(
    escalating: Any, upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # for this test's own requests
    content = json.dumps(fakes.completion("Theirs.")).encode()
    upstream.behaves(fakes.reply(200, content, "application/json", "set-cookie: who=this; Path=/"))
    with escalating(escalate_url=upstream.url.replace("127.0.0.1", "localhost")) as server:
        server.engine.script("thin", state="thin")
        for _ in range(2):
            assert message(server.chat("thin", reliability=ESCALATE))["content"] == "Theirs."
    assert len(upstream.asked) == 2
    assert not any("cookie" in asked.headers for asked in upstream.asked)


def test_a_buffered_stream_passes_it_on_as_it_comes(server: Any, upstream: Any) -> None:
    upstream.behaves(fakes.pieces(["One", " two"], hangs=True))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "thin"}], "stream": True}
    began = time.monotonic()
    with server.client.stream(
        "POST", "/v1/chat/completions", json=body | {"reliability": ESCALATE}
    ) as response:
        lines = response.iter_lines()
        assert "One" in next(line for line in lines if "One" in line)
        assert time.monotonic() - began < WITHIN_S  # it has not ended yet
        assert "The answer" not in "".join(lines)
    assert upstream.asked[0].body["stream"] is True


def test_a_buffered_stream(server: Any, upstream: Any) -> None:
    chunks = server.chunks("thin", reliability=ESCALATE, stream_options={"include_usage": True})
    assert contents(chunks) == list("Theirs.")
    last = chunks[-2]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["reliability"]["results"][0]["escalated"]["model"] == "big"
    assert chunks[-1]["reliability"] == last["reliability"]
    assert upstream.asked[0].body["stream_options"] == {"include_usage": True}
    response = server.chat("thin", stream=True, reliability=ESCALATE)
    assert not [name for name in response.headers if name.startswith("x-sdm")]


def test_an_optimistic_stream_sets_it_off(server: Any) -> None:
    chunks = server.chunks("thin", reliability=ESCALATE | {"stream": "optimistic"})
    assert contents(chunks) == ["The", " answer", ".", "\n\nT", *"heirs."]
    assert refusals(chunks) == ""
    strange = server.chunks("strange", reliability=ESCALATE | {"stream": "optimistic"})
    assert contents(strange) == list("Theirs.")


@pytest.mark.parametrize("stream", ["buffered", "optimistic"])
def test_each_choice_has_its_own(server: Any, upstream: Any, stream: str) -> None:
    server.engine.script("thin", state="thin", pause_s=0.002)
    whole = server.chat("thin", n=3, reliability=ESCALATE).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["Theirs."] * 3
    assert len(upstream.asked) == 3
    chunks = server.chunks("thin", n=3, reliability=ESCALATE | {"stream": stream})
    own = "The answer.\n\n" if stream == "optimistic" else ""
    for index in range(3):
        assert "".join(contents(chunks, index)) == own + "Theirs."
    ends = [chunk["reliability"]["results"][0] for chunk in chunks if "reliability" in chunk]
    assert sorted(one["index"] for one in ends) == [0, 1, 2]
    assert {one["escalated"]["model"] for one in ends} == {"big"}
    assert came_of(server) == {"answered": 6}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_plain_prompt_is_continued_there(server: Any, upstream: Any, streamed: bool) -> None:
    body = {"model": "tiny", "prompt": ["thin", "other"], "stream": streamed, "reliability": ESCALATE}
    response = server.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    if streamed:
        lines = [line for line in response.text.split("\n\n") if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line[6:])["choices"]]
        texts = ["".join(one["text"] for one in choices if one["index"] == index) for index in (0, 1)]
    else:
        texts = [choice["text"] for choice in response.json()["choices"]]
    assert texts == ["Theirs.", "Theirs."]
    assert sorted((asked.path, asked.body["prompt"]) for asked in upstream.asked) == [
        ("/v1/completions", "other"),
        ("/v1/completions", "thin"),
    ]


def test_after_the_last_attempt_only(escalating: Any, upstream: Any) -> None:
    conversations = replace(Policy().conversations, turns=("user",))
    policy = Policy(temperature=0.7, max_tokens=16, resample=3, conversations=conversations)
    with escalating(policy=policy) as server:
        server.engine.script("thin", state="thin")
        one = result(server.chat("thin", reliability=ESCALATE))
        assert (one["attempts"], one["escalated"]["model"]) == (3, "big")
        assert contents(server.chunks("thin", reliability=ESCALATE | {"stream": "optimistic"})) == list(
            "Theirs."
        )
        assert len(upstream.asked) == 2


LIES: dict[str, tuple[str, Any]] = {
    "no_json": ("invalid", lambda f: f.reply(200, b"<html>")),
    "half_json": ("invalid", lambda f: f.reply(200, b'{"choices": [')),
    "a_list": ("invalid", lambda f: f.reply(200, b"[1]")),
    "nan": (
        "invalid",
        lambda f: f.reply(200, b'{"choices":[{"message":{"content":"x"},"finish_reason":"stop","p":NaN}]}'),
    ),
    "infinite": (
        "invalid",
        lambda f: f.reply(200, b'{"choices":[{"message":{"content":"x"},"finish_reason":"stop","p":1e999}]}'),
    ),
    "half_a_surrogate": (
        "invalid",
        lambda f: f.reply(200, b'{"choices":[{"message":{"content":"\\ud800"},"finish_reason":"stop"}]}'),
    ),
    "no_utf8": (
        "invalid",
        lambda f: f.reply(200, b'{"choices":[{"message":{"content":"\xff"},"finish_reason":"stop"}]}'),
    ),
    "nested": ("invalid", lambda f: f.reply(200, b"[" * 50_000)),
    "no_choices": ("invalid", lambda f: f.reply(200, b'{"choices": null}')),
    "only_usage": ("invalid", lambda f: f.reply(200, b'{"choices": []}')),
    "choice_is_none": ("invalid", lambda f: f.reply(200, b'{"choices": [null]}')),
    "text_is_a_number": ("invalid", lambda f: f.whole(7)),
    "another_end": ("invalid", lambda f: f.whole(None, "tool_calls")),
    "an_end_of_a_kind": ("invalid", lambda f: f.whole("x", ["stop"])),
    "html": ("invalid", lambda f: f.reply(200, b"x", "text/html")),
    "no_type": ("invalid", lambda f: f.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")),
    "compressed": ("invalid", lambda f: f.reply(200, b"{}", "application/json", "content-encoding: gzip")),
    "shorter_than_it_says": (
        "invalid",
        lambda f: f.raw(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n{"),
    ),
    "longer_than_it_says": (
        "invalid",
        lambda f: f.raw(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 3\r\n\r\n"
            + json.dumps(f.completion("Theirs.")).encode()
        ),
    ),
    "huge": ("invalid", lambda f: f.whole("x" * 200_000)),
    "redirect": ("invalid", lambda f: f.reply(307, b"", "text/plain", "location: /v1/chat/completions")),
    "not_modified": ("invalid", lambda f: f.raw(b"HTTP/1.1 304 No\r\n\r\n")),
    "no_http": ("unavailable", lambda f: f.raw(b"SSH-2.0-x\r\n")),
    "an_endless_head": ("unavailable", lambda f: f.raw(b"HTTP/1.1 200 OK\r\nx: " + b"x" * 200_000)),
    "hangs_up": ("unavailable", lambda f: f.raw(b"")),
    "busy": ("unavailable", lambda f: f.reply(429, b"", "text/plain", "retry-after: 0")),
    "broken": ("unavailable", lambda f: f.reply(503, b"{}")),
    "retry_after_nonsense": ("unavailable", lambda f: f.reply(503, b"{}", "text/plain", "retry-after: nan")),
    "an_error_in_200": ("unavailable", lambda f: f.reply(200, b'{"error": {"message": "no"}}')),
    "forbidden": ("rejected", lambda f: f.reply(401, b"{}")),
    "not_found": ("rejected", lambda f: f.reply(404, b"<html>", "text/html")),
    "refusal": ("withheld", lambda f: f.whole(None, refusal="I will not.")),
    "filtered": ("withheld", lambda f: f.whole("Half of", "content_filter")),
    "nothing": ("withheld", lambda f: f.whole("")),
    "never": ("timeout", lambda f: f.hangs),
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_upstream_that_lies_gives_the_refusal(
    server: Any, upstream: Any, name: str, streamed: bool
) -> None:
    """Whatever comes in place of an answer, also of a stream."""
    outcome, made = LIES[name]
    upstream.behaves(made(fakes))
    began = time.monotonic()
    if streamed:
        chunks = server.chunks("thin", reliability=ESCALATE)
        assert (contents(chunks), refusals(chunks)) == ([], REFUSAL)
        one = chunks[-1]["reliability"]["results"][0]
    else:
        response = server.chat("thin", reliability=ESCALATE)
        assert message(response) == {"role": "assistant", "content": None, "refusal": REFUSAL}
        one = result(response)
    assert (one["escalated"], one["reason"]) == (None, "below_score_threshold")
    assert came_of(server) == {outcome: 1}
    assert len(upstream.asked) == (2 if outcome == "unavailable" else 1)
    assert time.monotonic() - began < 2 * WITHIN_S


STREAMS: dict[str, tuple[str, Any]] = {
    "breaks_off": ("invalid", lambda f: f.pieces(["Half"], None, done=False)),
    "done_without_an_end": ("invalid", lambda f: f.pieces(["Half"], None)),
    "hangs": ("timeout", lambda f: f.pieces(["Half"], None, done=False, hangs=True)),
    "an_error": ("unavailable", lambda f: f.events(HALF, '{"error": {"message": "no"}}')),
    "no_json": ("invalid", lambda f: f.events(HALF, "{")),
    "nan": ("invalid", lambda f: f.events(HALF, '{"choices": [], "x": NaN}')),
    "a_refusal": ("withheld", lambda f: f.events(HALF, '{"choices":[{"delta":{"refusal":"No."}}]}')),
    "endless": ("invalid", lambda f: f.events(*[HALF.replace("Half", "x" * 99)] * 2000, done=False)),
    "one_endless_event": ("invalid", lambda f: f.events(HALF, "x" * 70_000)),
}
HALF = '{"choices":[{"index":0,"delta":{"content":"Half"},"finish_reason":null}]}'


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_breaks_off_is_taken_back(server: Any, upstream: Any, name: str) -> None:
    """Its pieces are out: a refusal follows them, as in an optimistic stream, and nobody is said to have answered."""
    outcome, made = STREAMS[name]
    upstream.behaves(made(fakes))
    chunks = server.chunks("thin", reliability=ESCALATE)
    assert contents(chunks)
    assert refusals(chunks) == REFUSAL
    assert chunks[-1]["reliability"]["results"][0]["escalated"] is None
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert came_of(server) == {outcome: 1}
    assert len(upstream.asked) == 1


def test_text_after_the_end_is_not_passed_on(server: Any, upstream: Any) -> None:
    end = '{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
    upstream.behaves(fakes.events(HALF, end, HALF.replace("Half", "More")))
    chunks = server.chunks("thin", reliability=ESCALATE)
    assert contents(chunks) == ["Half"]
    assert came_of(server) == {"invalid": 1}


def test_a_count_that_does_not_come_keeps_no_answer_back(server: Any, upstream: Any) -> None:
    end = '{"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}'
    upstream.behaves(fakes.events(HALF, end, done=False, hangs=True))
    chunks = server.chunks("thin", reliability=ESCALATE)
    assert contents(chunks) == ["Half"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    one = chunks[-1]["reliability"]["results"][0]["escalated"]
    assert (one["model"], one["prompt_tokens"]) == ("big", None)


def test_what_is_busy_is_asked_again(server: Any, upstream: Any) -> None:
    upstream.behaves(fakes.reply(503, b""), fakes.answers())
    assert message(server.chat("thin", reliability=ESCALATE))["content"] == "Theirs."
    upstream.behaves(fakes.reply(429, b""), fakes.answers())
    assert contents(server.chunks("thin", reliability=ESCALATE)) == list("Theirs.")
    assert came_of(server) == {"answered": 2}
    assert len(upstream.asked) == 4


def test_nobody_is_there(escalating: Any) -> None:
    with escalating(escalate_url="http://127.0.0.1:9/v1", escalate_retries=1) as server:
        server.engine.script("thin", state="thin")
        assert message(server.chat("thin", reliability=ESCALATE))["refusal"] == REFUSAL
        assert came_of(server) == {"unavailable": 1}


@pytest.mark.parametrize("streamed", [False, True])
def test_it_has_what_is_left_of_the_requests_time(
    escalating: Any, upstream: Any, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """A client that gives little time gets its refusal within it, and does not open the circuit for others."""
    monkeypatch.setattr(escalation, "_MARGIN_S", WITHIN_S)
    upstream.behaves(fakes.hangs)
    with escalating(escalate_failures=1) as server:
        server.engine.script("thin", state="thin")

        def ask(within_s: float, **given: Any) -> httpx.Response:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "thin"}], **given}
            headers = {"x-request-timeout": f"{within_s}"}
            return server.client.post(
                "/v1/chat/completions", json=body | {"reliability": ESCALATE}, headers=headers
            )

        began = time.monotonic()
        response = ask(WITHIN_S + 1.5, stream=streamed)
        assert response.status_code == 200
        assert REFUSAL in response.text
        assert time.monotonic() - began < WITHIN_S + 1.5
        assert came_of(server) == {"timeout": 1}
        assert metric(server, "sdm_escalation_circuit") == 0
        assert message(ask(WITHIN_S - 0.1))["refusal"] == REFUSAL
        assert len(upstream.asked) == 1


def test_a_client_that_leaves_ends_it(server: Any, upstream: Any, wait_until: Any) -> None:
    upstream.behaves(fakes.hangs)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "thin"}], "reliability": ESCALATE}
    with pytest.raises(httpx.ReadTimeout):
        server.client.post(
            "/v1/chat/completions", json=body, timeout=1.5
        )  # long enough to reach the upstream
    wait_until(lambda: came_of(server) == {"cancelled": 1})
    assert server.client.get("/load").json() == {"server_load": 0}
    assert metric(server, "sdm_escalation_circuit") == 0


def test_the_circuit_opens_and_closes(escalating: Any, upstream: Any, wait_until: Any) -> None:
    how = {"escalate_failures": 2, "escalate_pause_s": 0.5, "escalate_retries": 0}
    with escalating(**how) as server:
        server.engine.script("thin", state="thin")
        upstream.behaves(fakes.reply(500, b""))
        for _ in range(5):
            assert message(server.chat("thin", reliability=ESCALATE))["refusal"] == REFUSAL
        assert len(upstream.asked) == 2
        assert came_of(server) == {"unavailable": 2, "open": 3}
        assert metric(server, "sdm_escalation_circuit") == 2
        wait_until(lambda: metric(server, "sdm_escalation_circuit") == 1)
        server.chat("thin", reliability=ESCALATE)  # the one that tries fails: open again
        assert metric(server, "sdm_escalation_circuit") == 2
        wait_until(lambda: metric(server, "sdm_escalation_circuit") == 1)
        upstream.behaves(fakes.answers())
        for _ in range(2):
            assert message(server.chat("thin", reliability=ESCALATE))["content"] == "Theirs."
        assert metric(server, "sdm_escalation_circuit") == 0


def test_the_half_open_circuit_lets_one_in() -> None:
    now = [0.0]
    circuit = Circuit(2, 10, lambda: now[0])
    assert all(circuit.enter() for _ in range(5))
    circuit.leave(True)
    assert circuit.enter()
    circuit.leave(True)
    assert (circuit.level, circuit.enter()) == (2, False)
    now[0] = 10.0
    assert (circuit.level, circuit.enter(), circuit.enter()) == (1, True, False)
    circuit.leave(None)  # its client left: the next may try
    assert circuit.enter()
    circuit.leave(False)
    assert (circuit.level, circuit.enter(), circuit.enter()) == (0, True, True)


def test_a_failure_counts_in_a_row_alone() -> None:
    circuit = Circuit(2, 10)
    for failed in (True, False, True, None, False, True):
        circuit.leave(failed)
        assert circuit.level == 0


@pytest.mark.parametrize(
    ("limit", "given"), [("escalate_requests_per_day", 2), ("escalate_tokens_per_day", 20)]
)
def test_each_key_has_its_budget(
    escalating: Any, upstream: Any, tmp_path: Path, limit: str, given: int
) -> None:
    """Of tokens: those that the upstream counts, 10 an answer; the prompt alone has more letters here."""
    with escalating(**{limit: given, "quotas": tmp_path / "quotas"}) as server:
        server.engine.script("thin", state="thin")
        told = [message(server.chat("thin", reliability=ESCALATE)) for _ in range(3)]
        assert [one["content"] for one in told] == ["Theirs.", "Theirs.", None]
        assert came_of(server) == {"answered": 2, "budget": 1}
    server.engine.closed = False
    with escalating(**{limit: given, "quotas": tmp_path / "quotas"}) as server:  # a restart forgives nothing
        assert message(server.chat("thin", reliability=ESCALATE))["refusal"] == REFUSAL
    assert len(upstream.asked) == 2


def test_what_failed_costs_no_tokens(escalating: Any, upstream: Any) -> None:
    with escalating(escalate_tokens_per_day=20, escalate_retries=0) as server:
        server.engine.script("thin", state="thin")
        upstream.behaves(fakes.reply(500, b""), fakes.reply(500, b""), fakes.answers())
        told = [message(server.chat("thin", reliability=ESCALATE))["content"] for _ in range(3)]
        assert told == [None, None, "Theirs."]


def test_too_many_at_once_are_not_put_to_it(escalating: Any, upstream: Any, wait_until: Any) -> None:
    """So that one that is slow cannot take all places of this server."""
    upstream.behaves(fakes.pieces("ab", pause_s=0.3))
    with escalating(escalate_concurrency=1) as server, ThreadPoolExecutor() as pool:
        server.engine.script("thin", state="thin")
        slow = pool.submit(server.chunks, "thin", reliability=ESCALATE)
        wait_until(lambda: len(upstream.asked) == 1)
        assert message(server.chat("thin", reliability=ESCALATE))["refusal"] == REFUSAL
        assert contents(slow.result()) == ["a", "b"]
        assert came_of(server) == {"answered": 1, "busy": 1}


@pytest.fixture
def certified(escalating: Any, gates: Any) -> Any:
    """A server whose bundle's cascade with "big" was certified at 0.9, 16 tokens."""

    def start(terms: CascadeTerms = CASCADE, **given: Any) -> AbstractContextManager[Any]:
        return escalating(cascade=terms, **given)

    return start


def test_a_cascade_that_was_certified_says_so(certified: Any) -> None:
    with certified() as server:
        server.engine.script("thin", state="thin")
        shown = result(server.chat("thin", reliability=ESCALATE))["escalated"]["certified"]
        assert shown == vars(CASCADE.certificates[0])
        streamed = server.chunks("thin", reliability=ESCALATE)[-1]["reliability"]["results"][0]
        assert streamed["escalated"]["certified"] == shown
        for more in (
            {"temperature": 0.5},
            {"max_tokens": 8},
            {"reliability": ESCALATE | {"alpha": 0.95}},
        ):
            one = result(server.chat("thin", **{"reliability": ESCALATE} | more))
            assert one["escalated"] == {
                "model": "big",
                "certified": None,
                "prompt_tokens": 7,
                "completion_tokens": 3,
            }


def test_of_another_model_nothing_is_promised(certified: Any) -> None:
    with certified(escalate_model="bigger") as server:
        server.engine.script("thin", state="thin")
        one = result(server.chat("thin", reliability=ESCALATE))["escalated"]
        assert (one["model"], one["certified"]) == ("bigger", None)
    server.engine.closed = False
    with certified(rule="sdm") as server:  # the region withholds others than the gates did
        server.engine.script("far", state="far")
        assert result(server.chat("far", reliability=ESCALATE))["escalated"]["certified"] is None


@pytest.mark.parametrize("by", ["operator", "request"])
def test_where_only_certified_answers_count(certified: Any, upstream: Any, by: str) -> None:
    given, asked = (
        ({"certified_only": True}, ESCALATE) if by == "operator" else ({}, ESCALATE | {"certified": True})
    )
    poor = replace(CASCADE, certificates=(replace(CASCADE.certificates[0], lower_bound=0.85),))
    with certified(**given) as server:
        server.engine.script("thin", state="thin")
        assert message(server.chat("thin", reliability=asked))["content"] == "Theirs."
        assert message(server.chat("thin", reliability=asked, max_tokens=8))["refusal"] == REFUSAL
        assert came_of(server) == {"answered": 1, "uncertified": 1}
    server.engine.closed = False
    with certified(poor, **given) as server:  # a bound below alpha keeps no promise of alpha
        assert message(server.chat("thin", reliability=asked))["refusal"] == REFUSAL
    assert len(upstream.asked) == 1


def test_no_label_of_its_answer_is_taken_for_the_withheld_one(escalating: Any, tmp_path: Path) -> None:
    with escalating(store=str(tmp_path / "f")) as server:
        server.engine.script("thin", state="thin")
        for reliability, status in ((ESCALATE, 404), ({"mode": "abstain"}, 200)):
            given = server.chat("thin", reliability=reliability).json()["id"]
            label = {"id": given, "correct": True}
            assert server.client.post("/v1/reliability/feedback", json=label).status_code == status


def test_the_audit_log_tells_what_left(escalating: Any, tmp_path: Path) -> None:
    with escalating(audit_log=tmp_path / "audit") as server:
        server.engine.script("thin", state="thin")
        server.chat("thin", reliability=ESCALATE)
        server.chat("ask", reliability=ESCALATE)
    lines = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert [line["verdicts"][0]["escalated"] for line in lines] == [True, False]


def test_without_an_upstream_it_is_refused(serve: Any) -> None:
    with serve() as server:
        refused = server.chat("ask", reliability=ESCALATE)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "reliability.on_abstain"
        assert server.chat("ask", reliability={"on_abstain": "escalate"}).status_code == 200
        assert "sdm_escalations_total{" not in server.client.get("/metrics").text


@pytest.mark.parametrize(
    "given",
    [
        {"escalate_url": "ftp://x/v1"},
        {"escalate_url": "http://"},
        {"escalate_url": "http://[::1"},
        {"escalate_url": "http://user:word@x/v1"},
        {"escalate_url": "http://x/v1?key=1"},
        {"escalate_model": " "},
        {"escalate_key_file": "nowhere"},
        {"escalate_key_file": "empty"},
        {"escalate_key_file": "two"},
    ],
)
def test_an_upstream_that_cannot_be_asked_is_said_at_start(
    serve: Any, tmp_path: Path, given: dict[str, Any]
) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "two").write_text("one\ntwo\n")
    given = {name: tmp_path / value if name.endswith("file") else value for name, value in given.items()}
    with pytest.raises(Refused, match="CANDOR_ESCALATE_URL"):
        with serve(**{"escalate_url": "http://127.0.0.1:9/v1", "escalate_model": "big", **given}):
            pass


def test_url_and_model_go_together(settings: Any) -> None:
    with pytest.raises(ValidationError, match="go together"):
        settings(escalate_url="http://127.0.0.1:9/v1")
