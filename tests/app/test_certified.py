"""Certificates over HTTP: told with what they cover, asked for by server or request, refused where there is none."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from candor.app.edge.limits import Refused
from candor.policy.certificate import Certificate

# Answers of the state "follows" have q' = 400, above the first threshold and below the second.
BELOW = Certificate(0.9, "lower", 0.95, 0.95, 300.0, 400, 120, 119, 0.961)
ABOVE = Certificate(0.95, "lower", 0.97, 0.95, 500.0, 400, 110, 110, 0.973)


def shown(one: Certificate) -> dict[str, Any]:
    return {
        "rule": "sdm",
        "score_min": None,
        "forecast_min": None,
        "base_right": None,
        "standing": None,
        **asdict(one),
    }


def result(response: Any) -> Any:
    assert response.status_code == 200, response.text
    [one] = response.json()["reliability"]["results"]
    return one


def test_an_answer_says_what_was_certified_of_it(serve: Any) -> None:
    with serve(certificates=[BELOW, ABOVE]) as server:
        assert result(server.chat("ask"))["certificate"] == shown(BELOW)
        uncovered = result(server.chat("ask", reliability={"alpha": 0.95}))
        assert (uncovered["region"], uncovered["abstained"], uncovered["certificate"]) == (
            "high",
            False,
            None,
        )
        pair = {"messages": [{"role": "user", "content": "ask"}], "response": "The answer."}
        assert result(server.client.post("/v1/reliability", json=pair))["certificate"] == shown(BELOW)
        warm = result(server.chat("ask", temperature=0.5))
        assert (warm["calibrated"], warm["certificate"]) == (False, None)
        [last] = [chunk for chunk in server.chunks("ask") if "reliability" in chunk]
        assert last["reliability"]["results"][0]["certificate"] == shown(BELOW)


def test_a_request_may_ask_for_certified_answers_alone(serve: Any) -> None:
    with serve(certificates=[BELOW, ABOVE]) as server:
        asked = {"mode": "abstain", "certified": True}
        response = server.chat("ask", reliability=asked)
        assert response.json()["choices"][0]["message"]["content"] == "The answer."
        assert result(response)["certificate"] == shown(BELOW)
        withheld = server.chat("ask", reliability=asked | {"alpha": 0.95})
        assert withheld.json()["choices"][0]["message"]["content"] is None
        one = result(withheld)
        assert (one["region"], one["abstained"], one["reason"]) == ("high", True, "not_certified")
        assert withheld.headers["x-sdm-abstained"] == "true"
        pair = {"messages": [{"role": "user", "content": "ask"}], "response": "x", "alpha": 0.95}
        assert not result(server.client.post("/v1/reliability", json=pair))["abstained"]
        scored = server.client.post("/v1/reliability", json=pair | {"certified": True})
        assert result(scored)["reason"] == "not_certified"


def test_a_server_may_answer_certified_alone_and_no_request_undoes_that(serve: Any) -> None:
    with serve(certificates=[ABOVE], certified_only=True, alpha=0.95) as server:
        for asked in ({}, {"certified": False}):
            one = result(server.chat("ask", reliability={"mode": "abstain", **asked}))
            assert one["reason"] == "not_certified"
        refused = server.chat("ask", reliability={"alpha": 0.9})
        assert refused.status_code == 400
        assert "has a certificate (0.95), got 0.9" in refused.json()["error"]["message"]


def test_without_a_certificate_asking_for_one_is_refused_with_what_there_is(serve: Any) -> None:
    with serve(estimator="plain", certificates=[BELOW]) as server:  # made for the other estimator
        assert result(server.chat("ask"))["certificate"] is None
        refused = server.chat("ask", reliability={"certified": True})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "reliability.certified"
        assert "(none)" in refused.json()["error"]["message"]


def test_a_server_that_could_never_answer_does_not_start(serve: Any, settings: Any, backend: Any) -> None:
    from candor.app.process.application import create_app

    with pytest.raises(Refused, match="CANDOR_CERTIFIED_ONLY: expected an alpha at which the bundle has a"):
        create_app(settings(certified_only=True), backend)
