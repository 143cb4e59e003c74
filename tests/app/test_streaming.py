"""Streams: the chunks of OpenAI, the verdict where it belongs, nothing unreliable when buffered."""

from __future__ import annotations

from typing import Any

import pytest

REFUSAL = "I do not know this reliably enough to answer."


def deltas(chunks: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


def test_optimistic(server: Any) -> None:
    chunks = server.chunks("ask")
    assert deltas(chunks) == [
        {"role": "assistant", "content": ""},
        {"content": "The"},
        {"content": " answer"},
        {"content": "."},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, None, None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert all(chunk["system_fingerprint"] == "sdm-0123456789ab" for chunk in chunks)
    assert ["reliability" in chunk for chunk in chunks] == [False] * 4 + [True]
    assert all("usage" not in chunk for chunk in chunks)
    [one] = chunks[-1]["reliability"]["results"]
    assert (one["region"], one["index"]) == ("high", 0)


def test_same_result_as_without_streaming(server: Any) -> None:
    whole = server.chat("ask", reliability={"exemplars": 2}).json()["reliability"]
    assert server.chunks("ask", reliability={"exemplars": 2})[-1]["reliability"] == whole


def test_headers_of_a_stream(server: Any) -> None:
    optimistic = server.chat("ask", stream=True)
    assert optimistic.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "x-request-id" in optimistic.headers
    assert not [name for name in optimistic.headers if name.startswith("x-sdm")]
    buffered = server.chat("ask", stream=True, reliability={"stream": "buffered"})
    assert buffered.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert buffered.headers["x-sdm-region"] == "high"
    assert buffered.headers["x-sdm-abstained"] == "false"


def test_usage_chunk_repeats_the_verdict(server: Any) -> None:
    chunks = server.chunks("ask", stream_options={"include_usage": True}, n=2)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    last = chunks[-1]
    assert last["choices"] == []
    prompt = len("|system:Be brief.||user:ask||")
    assert last["usage"] == {"prompt_tokens": prompt, "completion_tokens": 6, "total_tokens": prompt + 6}
    assert [one["index"] for one in last["reliability"]["results"]] == [0, 1]


def test_several_choices(server: Any) -> None:
    server.engine.script("ask", pause_s=0.002)
    chunks = server.chunks("ask", n=3)
    for index in range(3):
        text = "".join(delta.get("content", "") for delta in deltas(chunks, index))
        assert text == "The answer."
    finished = [chunk for chunk in chunks if "reliability" in chunk]
    assert sorted(chunk["choices"][0]["index"] for chunk in finished) == [0, 1, 2]
    for chunk in finished:
        [one] = chunk["reliability"]["results"]
        assert one["index"] == chunk["choices"][0]["index"]
        assert chunk["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("options", [{"mode": "abstain"}, {"mode": "abstain", "stream": "buffered"}])
def test_abstain_withholds_by_default(server: Any, options: dict[str, Any]) -> None:
    server.engine.script("ask", state="far")
    response = server.chat("ask", stream=True, reliability=options, logprobs=True)
    assert "The" not in response.text
    assert response.headers["x-sdm-region"] == "ood"
    chunks = server.chunks("ask", reliability=options)
    assert deltas(chunks) == [{"role": "assistant", "content": None}, {"refusal": REFUSAL}, {}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["reliability"]["results"][0]["reason"] == "out_of_distribution"


def test_abstain_passes_a_reliable_answer_on(server: Any) -> None:
    chunks = server.chunks("ask", reliability={"mode": "abstain"})
    assert deltas(chunks) == [{"role": "assistant", "content": ""}, {"content": "The answer."}, {}]


def test_buffered_placeholder_stands_alone(server: Any) -> None:
    server.engine.script("ask", state="far")
    chunks = server.chunks("ask", reliability={"mode": "abstain", "on_abstain": "content"})
    assert deltas(chunks)[1:] == [{"content": REFUSAL}, {}]


@pytest.mark.parametrize(
    ("on_abstain", "taken_back"),
    [("refusal", {"refusal": REFUSAL}), ("content", {"content": f"\n\n{REFUSAL}"})],
)
def test_optimistic_abstention_takes_back_what_was_sent(
    server: Any, on_abstain: str, taken_back: dict[str, str]
) -> None:
    server.engine.script("ask", state="far", finish="length")
    options = {"mode": "abstain", "stream": "optimistic", "on_abstain": on_abstain}
    chunks = server.chunks("ask", reliability=options)
    assert deltas(chunks)[-3:] == [{"content": "."}, taken_back, {}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["reliability"]["results"][0]["abstained"] is True


def test_mode_off(server: Any) -> None:
    chunks = server.chunks("ask", reliability={"mode": "off"}, stream_options={"include_usage": True})
    assert not [chunk for chunk in chunks if "reliability" in chunk]
    assert chunks[-1]["usage"]["completion_tokens"] == 3


def test_logprobs(server: Any) -> None:
    for options in ({}, {"stream": "buffered"}):
        chunks = server.chunks("ask", logprobs=True, top_logprobs=1, reliability=options)
        tokens = [
            token["token"]
            for chunk in chunks
            for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
        assert tokens == ["The", " answer", "."]


def test_no_raw_line_separators(server: Any) -> None:
    """Some clients split lines at U+2028 and U+0085: they may stand in a stream only as escapes."""
    server.engine.script("ask", pieces=("a\u2028b", "\x85c"))
    response = server.chat("ask", stream=True)
    assert response.text.isascii()
    contents = [delta.get("content") for delta in deltas(server.chunks("ask"))]
    assert contents == ["", "a\u2028b", "\x85c", None]


def test_an_empty_answer(server: Any) -> None:
    server.engine.script("ask", pieces=())
    for options in ({}, {"stream": "buffered"}):
        chunks = server.chunks("ask", reliability=options)
        assert deltas(chunks) == [{"role": "assistant", "content": ""}, {}]


def test_a_stream_begins_with_the_first_token_though_nothing_may_be_shown_yet(server: Any) -> None:
    server.engine.script("ask", hangs=True, pieces=("",))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "ask"}], "stream": True}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert '"role":"assistant","content":""' in next(response.iter_lines())


def test_tokens_come_as_they_are_written(server: Any) -> None:
    """The first token is here while the engine still waits to write the second."""
    server.engine.script("ask", hangs=True, pieces=("first",))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "ask"}], "stream": True}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert '"first"' in next(line for line in lines if "first" in line)
