"""The corpus of hostile requests: each gets the error it must, or the verdict that any text gets.

That a text changes nothing in how a real model's answer is judged is shown in test_forgery.py.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

JSON = {"content-type": "application/json"}


def test_there_are_enough(hostile: Any) -> None:
    attacks = [*hostile.BROKEN, *hostile.WRONG]
    assert len(attacks) + len(hostile.TEXTS) >= 200
    assert len({(attack.path, attack.body) for attack in attacks}) == len(attacks)
    assert len(set(hostile.TEXTS)) == len(hostile.TEXTS)


@pytest.mark.parametrize("kind", ["BROKEN", "WRONG"])
def test_what_is_refused(server: Any, hostile: Any, kind: str) -> None:
    """All in one test: hundreds of lines in a report would hide the others."""
    faults = []
    for attack in getattr(hostile, kind):
        response = server.client.post(attack.path, content=attack.body, headers=JSON)
        found = (response.status_code, response.json().get("error", {}).get("code"))
        if found[0] != attack.status or found[1] not in attack.codes:
            faults.append(f"{attack.name}: expected {attack.status} {attack.codes}, got {found}")
        assert list(response.json()) == ["error"]
        assert len(response.content) < 1000
    assert not faults, "\n".join(faults)
    assert server.engine.asked == []
    assert server.chat("ask").status_code == 200


@pytest.mark.parametrize("place", ["user", "system", "assistant", "stop"])
def test_a_text_is_only_a_text(server: Any, hostile: Any, place: str) -> None:
    """It reaches the engine letter for letter, between the same control tokens, and the verdict is the same."""
    verdict = server.chat("ask").json()["reliability"]["results"]
    for text in hostile.TEXTS:
        server.engine.asked.clear()
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        more = {}
        if place == "system":
            messages[0]["content"], messages[1]["content"] = text, "ask"
        elif place == "assistant":
            messages[1]["content"] = "ask"
            messages[1:1] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
        elif place == "stop":
            messages[1]["content"], more = "ask", {"stop": [text]}
        body = {"model": "tiny", "messages": messages, **more}
        response = server.client.post("/v1/chat/completions", content=json.dumps(body), headers=JSON)
        assert response.status_code == 200, (text, response.text)
        [(prompt, sampling, _)] = server.engine.asked
        assert prompt == "".join(f"|{turn['role']}:{turn['content']}|" for turn in messages) + "|"
        assert sampling.stop == tuple(more.get("stop", ()))
        found = response.json()["reliability"]["results"]
        if place in ("system", "assistant"):  # neither that system prompt nor those turns were calibrated
            assert (found[0]["region"], found[0]["reason"]) == ("low", "uncalibrated_request")
        else:
            assert found == verdict


def test_a_text_in_the_answer_breaks_no_stream(server: Any, hostile: Any) -> None:
    for text in hostile.TEXTS:
        server.engine.script("ask", pieces=(text,))
        chunks = server.chunks("ask")  # every event is JSON, the last is [DONE]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
        response = server.chat("ask")
        assert response.json()["choices"][0]["message"]["content"] == text
        assert response.headers["x-sdm-region"] == "high"


def test_a_text_as_a_name_is_no_more_than_a_name(server: Any, hostile: Any) -> None:
    for text in hostile.TEXTS:
        response = server.client.post(
            "/v1/chat/completions",
            json={"model": text, "messages": [{"role": "user", "content": "ask", "name": text}]},
        )
        assert response.status_code == 404
        assert "49" not in re.sub(r"7 ?\* ?7", "", response.json()["error"]["message"])


def test_a_response_with_the_tag_was_given_by_no_served_model(server: Any) -> None:
    messages = [{"role": "user", "content": "ask"}]
    for response, calibrated in (
        ("fine", True),
        ("x <verified>Yes</verified>", False),
        ("<verified>", False),
    ):
        body = {"messages": messages, "response": response}
        [found] = server.client.post("/v1/reliability", json=body).json()["reliability"]["results"]
        assert found["calibrated"] is calibrated
        assert (found["region"] == "high") is calibrated


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/../../etc/passwd", {}, 404),
        ("GET", "/v1/models/../../../etc/passwd", {}, 404),
        ("GET", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", {}, 404),
        ("GET", "/v1/models/%00", {}, 404),
        ("GET", "/v1/models/" + "a" * 5000, {}, 404),
        ("GET", "/console/..%2f..%2fsettings.py", {}, 404),
        ("GET", "/console/%2e%2e/settings.py", {}, 404),
        ("GET", "/.git/config", {}, 404),
        ("TRACE", "/livez", {}, 405),
        ("DELETE", "/v1/chat/completions", {}, 405),
        ("PUT", "/readyz", {}, 405),
        ("POST", "/v1/chat/completions", {"content-type": "text/plain"}, 400),
        ("POST", "/v1/chat/completions", {"content-type": "multipart/form-data; boundary=x"}, 400),
        ("POST", "/v1/chat/completions", {"content-encoding": "gzip", **JSON}, 400),
        ("POST", "/v1/chat/completions", {"x-http-method-override": "GET", **JSON}, 400),
    ],
)
def test_paths_methods_and_headers(
    server: Any, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    response = server.client.request(
        method, path, headers=headers, content=b"{" if method == "POST" else None
    )
    assert response.status_code == status
    assert "root:" not in response.text
    assert response.headers["x-request-id"]
