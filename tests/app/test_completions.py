"""`POST /v1/completions` over HTTP."""

from __future__ import annotations

import json
from typing import Any

REFUSAL = "I do not know this reliably enough to answer."


def complete(server: Any, prompt: Any = "Once", **more: Any) -> Any:
    return server.client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, **more})


def chunks(server: Any, **more: Any) -> list[Any]:
    *lines, done, end = complete(server, stream=True, **more).text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_plain_prompt_is_answered_but_never_calibrated(server: Any) -> None:
    response = complete(server)
    body = response.json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    vllms = dict.fromkeys(("prompt_logprobs", "prompt_token_ids", "token_ids"))
    assert body["choices"] == [
        {"index": 0, "text": "The answer.", "refusal": None, "logprobs": None, "finish_reason": "stop"}
        | vllms
    ]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    [one] = body["reliability"]["results"]
    assert (one["region"], one["reason"], one["calibrated"]) == ("low", "uncalibrated_request", False)
    assert server.engine.asked[-1][0] == "Once"
    assert response.headers["x-sdm-region"] == "low"


def test_several_prompts_times_n(server: Any) -> None:
    server.engine.script("B", pieces=("b",))
    server.engine.script("A", pieces=("a",))
    body = complete(server, ["A", "B"], n=2, seed=5, temperature=1).json()
    assert [choice["text"] for choice in body["choices"]] == ["a", "a", "b", "b"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 2
    assert sorted(sampling.seed for _, sampling, _ in server.engine.asked) == [5, 6, 7, 8]


def test_abstain_empties_the_text(server: Any) -> None:
    [choice] = complete(server, reliability={"mode": "abstain"}, logprobs=1).json()["choices"]
    assert (choice["text"], choice["refusal"], choice["logprobs"]) == ("", REFUSAL, None)
    options = {"mode": "abstain", "on_abstain": "content"}
    [choice] = complete(server, reliability=options).json()["choices"]
    assert (choice["text"], choice["refusal"]) == (REFUSAL, None)


def test_logprobs_have_the_older_shape(server: Any) -> None:
    [choice] = complete(server, logprobs=2).json()["choices"]
    assert choice["logprobs"] == {
        "tokens": ["The", " answer", "."],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{token: -0.5, "other": -9999.0} for token in ("The", " answer", ".")],
        "text_offset": [0, 3, 10],
    }
    [choice] = complete(server, logprobs=1).json()["choices"]
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [["The"], [" answer"], ["."]]


def test_stream(server: Any) -> None:
    got = chunks(server, stream_options={"include_usage": True}, logprobs=0)
    assert {chunk["object"] for chunk in got} == {"text_completion"}
    texts = [choice["text"] for chunk in got for choice in chunk["choices"]]
    assert texts == ["The", " answer", ".", ""]
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in got[:3]]
    assert offsets == [[0], [3], [10]]
    assert got[3]["choices"][0]["finish_reason"] == "stop"
    assert "reliability" in got[3]
    assert got[4]["usage"]["total_tokens"] == 7
    assert "reliability" in got[4]


def test_streamed_abstention(server: Any) -> None:
    got = chunks(server, reliability={"mode": "abstain"})
    assert [choice["text"] for chunk in got for choice in chunk["choices"]] == ["", ""]
    assert got[0]["choices"][0]["refusal"] == REFUSAL


def test_token_ids_and_empty_prompts_are_refused(server: Any) -> None:
    for prompt in ([1, 2], [[1, 2]], "", ["a", ""], []):
        response = complete(server, prompt)
        assert response.status_code == 400, prompt
        assert response.json()["error"]["param"].startswith("prompt")
