"""`POST /v1/reliability`: a given prompt and response are scored by the same rules."""

from __future__ import annotations

from typing import Any

import pytest

from candor.engine.base import EngineDead, EngineError, PromptTooLong


def score(server: Any, **body: Any) -> Any:
    return server.client.post("/v1/reliability", json=body)


def result(response: Any) -> Any:
    assert response.status_code == 200, response.text
    [one] = response.json()["reliability"]["results"]
    return one


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_pair_has_the_verdict_of_its_answer(server: Any) -> None:
    response = score(server, messages=chat("ask"), response="The answer.")
    body = response.json()
    assert body["object"] == "reliability"
    assert body["model"] == "tiny"
    assert body["system_fingerprint"] == "sdm-0123456789ab"
    assert body["reliability"] == server.chat("ask").json()["reliability"]


def test_alpha_and_exemplars(server: Any) -> None:
    one = result(score(server, messages=chat("ask"), response="x", alpha=0.95, exemplars=2, model="tiny"))
    assert (one["alpha"], len(one["exemplars"])) == (0.95, 2)
    for wrong, param in (({"alpha": 0.5}, "alpha"), ({"exemplars": 11}, "exemplars")):
        refused = score(server, messages=chat("ask"), response="x", **wrong)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param


def test_a_plain_prompt_or_a_long_response_is_not_calibrated(server: Any) -> None:
    for body in ({"prompt": "ask", "response": "x"}, {"messages": chat("ask"), "response": "x" * 17}):
        one = result(score(server, **body))
        assert (one["calibrated"], one["reason"]) == (False, "uncalibrated_request")


@pytest.mark.parametrize("state", ["incomplete", "wrong_size"])
def test_an_unscorable_pair_is_unavailable(server: Any, state: str) -> None:
    server.engine.script("ask", state=state)
    assert result(score(server, messages=chat("ask"), response="x"))["region"] == "unavailable"


def test_an_engine_that_cannot_take_its_state(server: Any) -> None:
    server.engine.script("ask", fails=EngineError("no"))
    assert result(score(server, messages=chat("ask"), response="x"))["region"] == "unavailable"
    server.engine.script("ask", fails=EngineDead("gone"))
    assert score(server, messages=chat("ask"), response="x").status_code == 503
    server.engine.script("ask", fails=PromptTooLong("with its tag"))
    assert score(server, messages=chat("ask"), response="x").status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        {"response": "x"},
        {"messages": chat("ask"), "prompt": "ask", "response": "x"},
        {"messages": [], "response": "x"},
        {"prompt": "ask"},
        {"prompt": "", "response": "x"},
        {"prompt": "ask", "response": "x", "mode": "abstain"},
    ],
)
def test_a_body_that_is_not_one_pair(server: Any, body: dict[str, Any]) -> None:
    assert score(server, **body).status_code == 400


def test_too_long(server: Any) -> None:
    refused = score(server, prompt="x" * 300, response="y" * 300)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
