"""Nothing that a client sends within the limits holds the event loop, and what is dear is counted before it is done.

The loop's time is that of its thread on the processor, taken in a server in a process of its own, so that a busy
machine does not count.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

HELD_S = 0.05
JSON = {"content-type": "application/json"}


def test_no_request_holds_the_loop(start_replica: Any, hostile: Any, wait_until: Any) -> None:
    """A megabyte in every shape in every field, the whole corpus, and texts at the length that is let in."""
    replica = start_replica()
    wait_until(lambda: len(replica.held()) > 0)
    statuses: Counter[int] = Counter()
    with httpx.Client(base_url=replica.url, timeout=60) as client:
        for attack in (*hostile.HEAVY, *hostile.BROKEN, *hostile.WRONG):
            statuses[client.post(attack.path, content=attack.body, headers=JSON).status_code] += 1
        longest = "a" * (512 * 4 - 100)
        for text in (*hostile.TEXTS, longest):
            body = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
            statuses[
                client.post("/v1/chat/completions", content=json.dumps(body), headers=JSON).status_code
            ] += 1
        for path in (
            "/metrics",
            "/v1/models",
            "/v1/reliability",
            "/v1/reliability/calibration",
            "/openapi.json",
        ):
            statuses[client.get(path).status_code] += 1
        many = {"logprobs": True, "top_logprobs": 20, "n": 16, "max_tokens": 190}
        body = {"model": "tiny", "messages": [{"role": "user", "content": "ask"}], **many}
        statuses[client.post("/v1/chat/completions", json=body).status_code] += 1
        count = len(replica.held())
        wait_until(lambda: len(replica.held()) > count + 1)
    held = replica.held()
    print(
        f"\n{statuses.total()} requests, held at most {max(held):.4f} s of processor time; {dict(statuses)}"
    )
    assert len(hostile.HEAVY) > 200
    assert set(statuses) <= {200, 400, 404, 413}
    assert max(held) < HELD_S


class Counted:
    """Counts which thread tokenises how many characters."""

    longest_token = 4

    def __init__(self, format_: Any) -> None:
        self._format = format_
        self.threads: set[str] = set()
        self.characters = 0

    def encode_chat(self, messages: Sequence[dict[str, str]], arguments: Any = None) -> list[int]:
        self._count(sum(len(message["content"]) for message in messages))
        ids: list[int] = self._format.encode_chat(messages, arguments)
        return ids

    def encode_text(self, text: str) -> list[int]:
        self._count(len(text))
        ids: list[int] = self._format.encode_text(text)
        return ids

    encode_response = encode_text

    def _count(self, characters: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.characters += characters


@pytest.fixture
def counted(backend: Any) -> Counted:
    return Counted(backend.chat)


def test_texts_are_tokenised_off_the_loop(serve: Any, counted: Counted) -> None:
    with serve(chat=counted) as server:
        counted.threads.clear()  # the golden prompts' own, before the server listened
        server.chat("ask")
        server.client.post("/v1/completions", json={"model": "tiny", "prompt": ["one", "two"]})
        server.client.post("/v1/reliability", json={"prompt": "ask", "response": "x"})
    assert len(counted.threads) == 1
    assert counted.threads.pop().startswith("candor-preparing")


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 3000}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 29_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 17}),
        ("/v1/completions", {"prompt": "a" * 1_000_000}),
        ("/v1/completions", {"prompt": ["a"] * 200_000}),
        ("/v1/completions", {"prompt": ["a"] * 17}),
        ("/v1/reliability", {"prompt": "a", "response": "b" * 1_000_000}),
    ],
)
def test_what_counts_and_lengths_refuse_is_not_tokenised(
    serve: Any, counted: Counted, path: str, more: dict[str, Any]
) -> None:
    with serve(chat=counted) as server:
        counted.characters = 0
        response = server.client.post(path, json={"model": "tiny", **more})
        assert response.status_code in (400,)
        assert response.json()["error"]["code"] in ("context_length_exceeded", "invalid_value", "too_large")
    assert counted.characters == 0


def test_of_a_text_that_is_too_long_only_the_beginning_is_tokenised(serve: Any, counted: Counted) -> None:
    with serve(chat=counted) as server:  # 512 tokens, one a letter here
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 2000}]}),
            ("/v1/completions", {"prompt": "a" * 2000}),
        ):
            counted.characters = 0
            response = server.client.post(path, json={"model": "tiny", **body})
            assert response.json()["error"]["code"] == "context_length_exceeded"
            assert counted.characters == 2 * 512


def test_a_key_is_charged_before_its_texts_are_tokenised(serve: Any, counted: Counted) -> None:
    """And by what they come to afterwards."""
    with serve(chat=counted, tokens_per_minute=60) as server:
        counted.characters = 0
        text = "{% x %}" + "a" * 400  # the template refuses it, after the work was done
        assert server.chat(text).status_code == 400
        tokenised = counted.characters
        assert tokenised > 400
        assert server.chat(text).status_code == 429
        assert counted.characters == tokenised


def test_log_probabilities_are_bounded_by_their_number(serve: Any) -> None:
    with serve() as server:
        many = {"logprobs": True, "top_logprobs": 20, "n": 16}
        assert server.chat("ask", **many, max_tokens=190).status_code == 200
        refused = server.chat("ask", **many, max_tokens=400)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
