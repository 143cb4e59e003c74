"""Every error has OpenAI's body, names the field at fault and says what was expected and what came."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from candor.engine.base import EngineDead, EngineError, PromptTooLong

MESSAGES = [{"role": "user", "content": "ask"}]


def error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    kind = "server_error" if status >= 500 else "invalid_request_error"
    assert body["error"]["type"] == kind
    assert body["error"]["message"]
    assert "x-request-id" in response.headers
    return body["error"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("messages", [], "messages"),
        ("messages", "hi", "messages"),
        ("messages", [{"role": "user"}], "messages[0]"),
        ("messages", [{"role": "user", "content": None}], "messages[0]"),
        ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
        ("messages", [*MESSAGES, {"role": "tool", "content": "x"}], "messages[1].role"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
        ("messages", [{"role": "user", "content": ["x"]}], "messages[0].content"),
        ("messages", [{"role": "user", "content": "\ud800"}], "messages[0].content"),
        ("messages", [{"role": "user", "content": "{% x %}"}], "messages"),
        ("model", 5, "model"),
        ("n", 0, "n"),
        ("n", "2", "n"),
        ("n", True, "n"),
        ("n", 1.0, "n"),
        ("n", 17, "n"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", 513, "max_tokens"),
        ("max_completion_tokens", -1, "max_completion_tokens"),
        ("temperature", -0.1, "temperature"),
        ("temperature", 2.1, "temperature"),
        ("temperature", "0", "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("temperature", float("inf"), "temperature"),
        ("temperature", 10**400, "temperature"),
        ("top_p", 0, "top_p"),
        ("top_k", 2**63, "top_k"),
        ("seed", 2**63, "seed"),
        ("stop", "", "stop[0]"),
        ("stop", ["x"] * 17, "stop"),
        ("stop", [1], "stop[0]"),
        ("stream", "true", "stream"),
        ("stream_options", {"include_usage": 1}, "stream_options.include_usage"),
        ("stream_options", {"include_usage": True}, None),
        ("stream_options", {"include_usages": True}, "stream_options.include_usages"),
        ("logprobs", 1, "logprobs"),
        ("top_logprobs", 21, "top_logprobs"),
        ("reliability", "on", "reliability"),
        ("reliability", {"mode": "strict"}, "reliability.mode"),
        ("reliability", {"alhpa": 0.9}, "reliability.alhpa"),
        ("reliability", {"alpha": "0.9"}, "reliability.alpha"),
        ("reliability", {"alpha": float("nan")}, "reliability.alpha"),
        ("reliability", {"exemplars": -1}, "reliability.exemplars"),
        ("reliability", {"exemplars": 11}, "reliability.exemplars"),
        ("reliability", {"stream": "later"}, "reliability.stream"),
    ],
)
def test_a_wrong_field(server: Any, field: str, value: Any, param: str) -> None:
    body = json.dumps({"model": "tiny", "messages": MESSAGES, field: value})  # NaN and all
    response = server.client.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    found = error(response, 400)
    assert found["param"] == param
    assert found["code"] in ("invalid_value", "too_large")
    assert server.engine.asked == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("modalities", ["audio"]),
        ("audio", {"voice": "x"}),
        ("logit_bias", {"5": 1}),
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
        ("ignore_eos", True),
        ("chat_template", "{{ x }}"),
        ("continue_final_message", True),
        ("guided_json", {}),
    ],
)
def test_what_would_change_the_answer_is_refused(server: Any, field: str, value: Any) -> None:
    found = error(server.chat("ask", **{field: value}), 400)
    assert (found["param"], found["code"]) == (field, "unsupported_parameter")
    assert found["message"] == f"{field} is not supported by this server; leave it out"


def test_usage_in_every_chunk_is_not_ignored(server: Any) -> None:
    body = {"messages": [{"role": "user", "content": "ask"}], "model": "tiny", "stream": True}

    def asked(**options: bool) -> Any:
        return server.client.post("/v1/chat/completions", json=body | {"stream_options": options})

    found = error(asked(continuous_usage_stats=True, include_usage=True), 400)
    assert found["param"] == "stream_options.continuous_usage_stats"
    assert asked(continuous_usage_stats=False, include_obfuscation=False).status_code == 200


def test_what_would_not_is_ignored(server: Any) -> None:
    response = server.chat(
        "ask",
        user="u",
        metadata={"a": "b"},
        store=False,
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        logit_bias=None,
        repetition_penalty=1.0,
        ignore_eos=False,
        temperature=None,
        stop=None,
        n=None,
        stream=None,
        reliability=None,
    )
    assert response.status_code == 200


def test_an_unknown_field_is_refused_by_its_name(server: Any) -> None:
    found = error(server.chat("ask", reliabilty={"mode": "abstain"}), 400)
    assert (found["param"], found["code"]) == ("reliabilty", "unknown_parameter")
    assert found["message"] == "there is no field 'reliabilty'; did you mean reliability?"
    plain = {"model": "tiny", "prompt": "ask", "nvext": {"guided_json": {}}}
    found = error(server.client.post("/v1/completions", json=plain), 400)
    assert found["message"] == "there is no field 'nvext'; leave it out"


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"", 400, "invalid_body"),
        (b"[]", 400, "invalid_body"),
        (b'"x"', 400, "invalid_body"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"model": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b'{"model": "tiny"}', 400, "invalid_value"),
    ],
)
def test_a_body_that_is_none(server: Any, content: bytes, status: int, code: str) -> None:
    response = server.client.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert error(response, status)["code"] == code


def test_a_body_without_its_content_type(server: Any) -> None:
    body = json.dumps({"model": "tiny", "messages": MESSAGES})
    found = error(server.client.post("/v1/chat/completions", content=body), 400)
    assert "application/json" in found["message"]


def test_the_message_says_what_came(server: Any) -> None:
    found = error(server.chat("ask", temperature=3.5, top_p=7), 400)
    expected = "temperature: Input should be less than or equal to 2; got 3.5 (and 1 more)"
    assert found["message"] == expected


def test_long_input_is_not_sent_back(server: Any) -> None:
    found = error(server.chat("ask", seed="9" * 10_000), 400)
    assert len(found["message"]) < 250


def test_another_model(server: Any) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/reliability", {"prompt": "x", "response": "y"}),
    ):
        found = error(server.client.post(path, json={"model": "gpt-4", **body}), 404)
        assert (found["param"], found["code"]) == ("model", "model_not_found")
        assert "'tiny'" in found["message"]


def test_path_and_method(server: Any) -> None:
    assert error(server.client.get("/v1/nothing"), 404)["code"] == "not_found"
    response = server.client.get("/v1/chat/completions")
    assert error(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_what_exceeds_the_model(server: Any) -> None:
    for response in (server.chat("x" * 600), server.chat("ask", max_tokens=490)):
        found = error(response, 400)
        assert found["code"] == "context_length_exceeded"
        assert "512" in found["message"]


def test_what_exceeds_the_operators_limits(serve: Any) -> None:
    limits = {"max_prompt_tokens": 60, "max_output_tokens": 50, "max_choices": 2, "max_body_bytes": 600}
    with serve(**limits) as server:
        assert server.chat("ask", n=2, max_tokens=50).status_code == 200
        found = error(server.chat("x" * 60), 400)
        assert (found["param"], found["code"]) == ("messages", "too_large")
        assert "at most 60" in found["message"]
        assert error(server.chat("ask", max_tokens=51), 400)["param"] == "max_tokens"
        assert error(server.chat("ask", n=3), 400)["param"] == "n"
        many = server.client.post("/v1/completions", json={"model": "tiny", "prompt": ["a"] * 3})
        assert error(many, 400)["code"] == "too_large"
        declared = server.chat("x" * 600)
        assert "600 bytes" in error(declared, 413)["message"]
        chunked = server.client.post("/v1/completions", content=(b"x" * 100 for _ in range(7)))
        assert error(chunked, 413)["code"] == "request_entity_too_large"
        assert server.chat("ask").status_code == 200


def test_too_much_at_once(serve: Any, engine: Any, wait_until: Any) -> None:
    engine.script("slow", hangs=True)
    with serve(max_in_flight=3, max_choices=2) as server:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "slow"}], "stream": True, "n": 2}
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            assert server.client.get("/load").json() == {"server_load": 2}
            for stream in (False, True):
                refused = server.chat("ask", n=2, stream=stream)
                assert error(refused, 503)["code"] == "overloaded"
                assert int(refused.headers["retry-after"]) >= 1
            assert server.chat("ask").status_code == 200
        wait_until(lambda: server.client.get("/load").json() == {"server_load": 0})
        assert server.chat("ask", n=2).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (PromptTooLong("with its tag, too long"), 400, "context_length_exceeded"),
        (EngineError("no memory"), 500, "engine_error"),
        (EngineDead("gone"), 503, "engine_dead"),
        (ZeroDivisionError("secret"), 500, "internal_error"),
    ],
)
def test_an_engine_that_fails_before_the_first_token(
    server: Any, failure: Exception, status: int, code: str, stream: bool
) -> None:
    server.engine.script("ask", pieces=(), fails=failure)
    response = server.chat("ask", stream=stream)
    assert error(response, status)["code"] == code
    assert "secret" not in response.text
    assert ("retry-after" in response.headers) is (status == 503)


@pytest.mark.parametrize("failure", [EngineError("no memory"), ZeroDivisionError("secret")])
@pytest.mark.parametrize("n", [1, 2])
def test_an_engine_that_fails_amid_a_stream(server: Any, failure: Exception, n: int) -> None:
    server.engine.script("ask", fails=failure)
    response = server.chat("ask", stream=True, n=n)
    *_, last, end = response.text.split("\n\n")
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "[DONE]" not in response.text
    assert "secret" not in response.text
    assert '"region"' not in response.text
    assert server.engine.running == 0


def test_request_ids(server: Any) -> None:
    given = server.client.get("/livez", headers={"x-request-id": "my-id.7"})
    assert given.headers["x-request-id"] == "my-id.7"
    for strange in ("", "a b", "x" * 200, "é".encode()):
        made = server.client.get("/livez", headers={"x-request-id": strange}).headers["x-request-id"]
        assert len(made) == 32


@pytest.mark.parametrize(
    ("body", "headers", "told"),
    [
        ('{"model": "é"}'.encode("latin-1"), {}, "expected UTF-8, but byte 11 of the body is not"),
        ('{"model": "é"}'.encode("utf-16"), {}, "expected UTF-8, but byte 0"),
        (gzip.compress(b"{}", mtime=0), {}, "expected UTF-8, but byte 1"),
        (
            gzip.compress(b"{}", mtime=0),
            {"content-encoding": "gzip"},
            "the body is compressed ('gzip'); send it as it is",
        ),
        (b"[" * 20_000, {}, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", {}, "a number of too many digits"),
        (b"[" * 40_000, {}, "32768 brackets and braces, this one has 40000"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_why(
    server: Any, body: bytes, headers: dict[str, str], told: str
) -> None:
    refused = server.client.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json", **headers}
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "invalid_json"
    assert told in refused.json()["error"]["message"]


def test_a_byte_order_mark_is_no_error(server: Any) -> None:
    body = b'\xef\xbb\xbf{"model":"tiny","messages":[{"role":"user","content":"ask"}]}'
    answered = server.client.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answered.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_engines_own_words_stay_in_the_log(server: Any, stream: bool) -> None:
    server.engine.script(
        "ask", pieces=("a",) if stream else (), fails=EngineError("SECRET /path of a prompt")
    )
    response = server.chat("ask", stream=stream)
    assert "the server's log has the reason" in response.text
    assert "SECRET" not in response.text
