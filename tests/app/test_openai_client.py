"""The real `openai` client, unchanged, gets answers and their reliability."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

REFUSAL = "I do not know this reliably enough to answer."
ASK: Any = [{"role": "user", "content": "ask"}]


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def strange(server: Any) -> None:
    server.engine.script("ask", state="far")


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=ASK)
    assert answer.choices[0].message.content == "The answer."
    assert answer.choices[0].message.refusal is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert answer.system_fingerprint == "sdm-0123456789ab"
    assert answer.reliability["results"][0]["region"] == "high"  # type: ignore[attr-defined]


def test_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "The answer."
    assert chunks[-1].usage is not None
    for chunk in chunks[-2:]:
        assert chunk.reliability["results"][0]["region"] == "high"  # type: ignore[attr-defined]


def test_stream_helper_accumulates(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=ASK) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.content == "The answer."


def test_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=ASK, n=2, extra_headers={"x-request-id": "r-1"}
    )
    assert raw.headers["x-sdm-region"] == "high,high"
    assert raw.headers["x-sdm-abstained"] == "false,false"
    assert raw.headers["x-sdm-bundle"] == "0123456789abcdef" * 4
    answer = raw.parse()
    assert answer._request_id == "r-1"
    assert len(answer.choices) == 2


@pytest.mark.usefixtures("strange")
class TestAbstention:
    def test_chat(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="tiny", messages=ASK, extra_body={"reliability": {"mode": "abstain"}}
        )
        message = answer.choices[0].message
        assert (message.content, message.refusal) == (None, REFUSAL)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.reliability["results"][0]["abstained"] is True  # type: ignore[attr-defined]

    def test_parse(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.parse(
            model="tiny", messages=ASK, extra_body={"reliability": {"mode": "abstain"}}
        )
        message = answer.choices[0].message
        assert (message.parsed, message.refusal) == (None, REFUSAL)

    @pytest.mark.parametrize("how", ["buffered", "optimistic"])
    def test_stream_helper(self, client: openai.OpenAI, how: str) -> None:
        options = {"mode": "abstain", "stream": how}
        with client.chat.completions.stream(
            model="tiny", messages=ASK, extra_body={"reliability": options}
        ) as stream:
            kinds = [event.type for event in stream]
            message = stream.get_final_completion().choices[0].message
        assert "refusal.delta" in kinds
        assert ("content.delta" in kinds) is (how == "optimistic")
        assert message.refusal == REFUSAL

    def test_a_refusal_goes_back_as_history(self, client: openai.OpenAI, server: Any) -> None:
        first = client.chat.completions.create(
            model="tiny", messages=ASK, extra_body={"reliability": {"mode": "abstain"}}
        )
        history: Any = [*ASK, first.choices[0].message, {"role": "user", "content": "and now?"}]
        client.chat.completions.create(model="tiny", messages=history)
        assert f"assistant:{REFUSAL}" in server.engine.asked[-1][0]


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Once", logprobs=1)
    assert answer.choices[0].text == "The answer."
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["The", " answer", "."]
    stream = client.completions.create(model="tiny", prompt="Once", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "The answer."


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").reliability["alphas"] == [0.9, 0.95]  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_are_the_clients_own(client: openai.OpenAI, server: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=ASK)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="tiny", messages=ASK, extra_body={"reliability": {"alpha": 0.5}})
    assert wrong.value.param == "reliability.alpha"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 600}])
    assert long.value.code == "context_length_exceeded"
    server.engine.script("break", fails=RuntimeError("broken"))
    with pytest.raises(openai.APIError, match="the server failed"):
        list(
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "break"}], stream=True
            )
        )
