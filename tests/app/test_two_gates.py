"""Two gates over HTTP: what an answer says of them, and prompts that are refused before a word is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from candor.app.edge.limits import Refused
from candor.policy.conversation import Conversations, SystemPrompt
from candor.policy.policy import Policy
from candor.sdm.forecast import ScoreForecast
from candor.sdm.rule import AnswerRule

ABSTAIN = {"mode": "abstain"}


def result(response: Any) -> Any:
    assert response.status_code == 200, response.text
    [one] = response.json()["reliability"]["results"]
    return one


def metric(server: Any, name: str, **labels: str) -> float:
    """The value of a sample of this model's metrics."""
    for line in server.client.get("/metrics").text.splitlines():
        if line.startswith(name + "{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"no {name} with {labels}")


def test_an_answer_says_what_both_gates_measured(serve: Any, gates: Any) -> None:
    with serve(gates=gates) as server:
        one = result(server.chat("ask"))
        assert (one["region"], one["abstained"], one["reason"]) == ("high", False, None)
        rule = one["rule"]
        assert (rule["prompt_known"], rule["score"], rule["score_min"]) == (True, 2.0, 1.5)
        assert one["probability"] == rule["probability"] == pytest.approx(0.9526, abs=1e-4)
        assert 0.5 < one["activation"] <= 1
        assert one["certificate"]["rule"] == "two-gates"
        assert one["certificate"]["score_min"] == 1.5
        assert "reaches 1.50" in one["explanation"]
        server.engine.script("thin", state="thin")
        low = result(server.chat("thin"))
        assert (low["region"], low["reason"], low["certificate"]) == ("low", "below_score_threshold", None)
        assert "score 1.00 is below 1.50" in low["explanation"]


def test_a_stranger_is_answered_and_marked_where_nothing_is_withheld(serve: Any, gates: Any) -> None:
    with serve(gates=gates) as server:
        server.engine.script("strange", kind="stranger")
        response = server.chat("strange")
        assert response.json()["choices"][0]["message"]["content"] == "The answer."
        one = result(response)
        assert (one["region"], one["abstained"], one["reason"]) == ("ood", True, "out_of_distribution")
        assert one["rule"]["prompt_p_value"] == pytest.approx(1 / 61)
        assert one["rule"]["score"] == 2.0
        assert "unlike those calibrated on" in one["explanation"]
        assert metric(server, "sdm_tokens_saved_total") == 0


def test_a_stranger_is_refused_when_its_prefill_ends(serve: Any, gates: Any) -> None:
    """The engine would never end this answer: were it awaited, the request would not return."""
    with serve(gates=gates) as server:
        server.engine.script("strange", kind="stranger", hangs=True)
        response = server.chat("strange", reliability=ABSTAIN)
        body = response.json()
        [choice] = body["choices"]
        assert choice["message"]["content"] is None
        assert choice["message"]["refusal"] == "I do not know this reliably enough to answer."
        assert choice["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] == 0
        assert body["usage"]["prompt_tokens"] > 0
        one = result(response)
        assert (one["region"], one["abstained"], one["reason"]) == ("ood", True, "out_of_distribution")
        assert (one["rule"]["score"], one["probability"], one["similarity"]) == (None, None, None)
        assert response.headers["x-sdm-abstained"] == "true"
        assert metric(server, "sdm_tokens_saved_total") == 12.5
        assert metric(server, "sdm_answers_total", alpha="0.9", reason="out_of_distribution") == 1
        assert [text for text in server.engine.cancelled if "strange" in text]


def test_an_answer_that_promises_too_little_is_not_begun(serve: Any, gates: Any) -> None:
    """F = the mean of the prompt's states. Where nothing is withheld, the answer is written and marked."""
    width = len(gates.rule.gate.mean)
    forecast = ScoreForecast(torch.full((width,), 1 / width), torch.tensor(0.0))
    [made] = gates.terms.certificates
    terms = replace(gates.terms, certificates=(replace(made, forecast_min=-0.1),), may_lose=0.02)
    with serve(gates=replace(gates, rule=replace(gates.rule, forecast=forecast), terms=terms)) as server:
        assert result(server.chat("ask", reliability=ABSTAIN))["reason"] is None
        server.engine.script("dull", kind="unpromising")
        response = server.chat("dull")
        assert response.json()["choices"][0]["message"]["content"] == "The answer."
        one = result(response)
        assert (one["region"], one["reason"]) == ("low", "unpromising_prompt")
        assert one["rule"]["score"] == 2.0
        assert one["rule"]["forecast"] == pytest.approx(-0.3)
        assert one["rule"]["forecast_min"] == -0.1
        assert metric(server, "sdm_tokens_saved_total") == 0
        server.engine.script("dull", kind="unpromising", hangs=True)
        response = server.chat("dull", reliability=ABSTAIN)
        assert response.json()["choices"][0]["message"]["content"] is None
        assert response.json()["usage"]["completion_tokens"] == 0
        one = result(response)
        assert (one["reason"], one["rule"]["score"]) == ("unpromising_prompt", None)
        assert "hardly any answer to it" in one["explanation"]
        assert metric(server, "sdm_tokens_saved_total") == 12.5
        assert metric(server, "sdm_answers_total", alpha="0.9", reason="unpromising_prompt") == 2


@pytest.mark.parametrize("stream", ["buffered", "optimistic"])
def test_nothing_of_it_stands_in_a_stream(serve: Any, gates: Any, stream: str) -> None:
    with serve(gates=gates) as server:
        server.engine.script("strange", kind="stranger", hangs=True)
        chunks = server.chunks("strange", reliability=ABSTAIN | {"stream": stream})
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        assert not any(delta.get("content") for delta in deltas)
        said = "".join(delta.get("refusal") or "" for delta in deltas)
        assert said == "I do not know this reliably enough to answer."
        content = server.chunks("strange", reliability=ABSTAIN | {"stream": stream, "on_abstain": "content"})
        texts = [chunk["choices"][0]["delta"].get("content") for chunk in content if chunk["choices"]]
        assert "".join(text or "" for text in texts) == "I do not know this reliably enough to answer."


def test_every_choice_of_it_is_refused(serve: Any, gates: Any) -> None:
    with serve(gates=gates) as server:
        server.engine.script("strange", kind="stranger", hangs=True)
        body = server.chat("strange", n=3, reliability=ABSTAIN).json()
        assert [choice["message"]["content"] for choice in body["choices"]] == [None] * 3
        assert {one["reason"] for one in body["reliability"]["results"]} == {"out_of_distribution"}
        assert body["usage"]["completion_tokens"] == 0


def test_a_refused_prompt_is_not_tried_again(serve: Any, gates: Any) -> None:
    policy = Policy(
        temperature=0.7,
        max_tokens=16,
        resample=4,
        conversations=Conversations(SystemPrompt.fixed("Be brief.")),
    )
    with serve(gates=gates, policy=policy) as server:
        server.engine.script("strange", kind="stranger", hangs=True)
        one = result(server.chat("strange", reliability=ABSTAIN))
        assert (one["attempts"], one["calibrated"]) == (1, True)
        assert len(server.engine.samplings("strange")) == 1
        server.engine.script("thin", state="thin")
        assert result(server.chat("thin", reliability=ABSTAIN))["attempts"] == 4
        # Nothing of a withheld answer is streamed, though it was known to be the last.
        chunks = server.chunks("thin", reliability=ABSTAIN | {"stream": "optimistic"})
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        assert not any(delta.get("content") for delta in deltas)
        # Nor is a stranger asked again where it is only marked.
        server.engine.script("odd", kind="stranger")
        assert result(server.chat("odd"))["attempts"] == 1


def test_what_can_never_be_let_through_is_not_written(serve: Any, gates: Any) -> None:
    """Also where the request leaves the policy, or nothing is certified at the alpha asked for."""
    with serve(gates=gates) as server:
        server.engine.script("ask", hangs=True)
        warm = result(server.chat("ask", temperature=0.5, reliability=ABSTAIN))
        assert (warm["reason"], warm["calibrated"]) == ("uncalibrated_request", False)
        stricter = result(server.chat("ask", reliability=ABSTAIN | {"alpha": 0.95}))
        assert stricter["reason"] == "no_certificate_at_alpha"
        assert "could not certify 95%" in stricter["explanation"]
        text = {"model": "tiny", "prompt": "ask", "reliability": ABSTAIN}
        plain = server.client.post("/v1/completions", json=text)
        assert result(plain)["reason"] == "uncalibrated_request"
        assert plain.json()["choices"][0]["text"] == ""


@pytest.mark.parametrize("prompt", ["incomplete", "missing"])
@pytest.mark.parametrize("mode", ["annotate", "abstain"])
def test_without_the_prompts_states_an_answer_is_not_known_to_be_right(
    serve: Any, gates: Any, prompt: str, mode: str
) -> None:
    with serve(gates=gates) as server:
        server.engine.script("lost", kind=prompt)
        response = server.chat("lost", reliability={"mode": mode})
        one = result(response)
        assert (one["region"], one["reason"]) == ("unavailable", "scoring_unavailable")
        content = response.json()["choices"][0]["message"]["content"]
        assert content == ("The answer." if mode == "annotate" else None)
        cause = {"missing": "not_captured", "incomplete": "incomplete"}[prompt]
        assert metric(server, "sdm_scoring_failures_total", cause=cause) == 1
        assert metric(server, "sdm_tokens_saved_total") == 0


def test_a_given_pair_is_judged_by_both_gates(serve: Any, gates: Any) -> None:
    with serve(gates=gates) as server:
        server.engine.script("strange", kind="stranger")
        for ask, reason in (("ask", None), ("strange", "out_of_distribution")):
            pair = {"messages": [{"role": "user", "content": ask}], "response": "The answer."}
            one = result(server.client.post("/v1/reliability", json=pair))
            assert (one["reason"], one["rule"]["score"]) == (reason, 2.0)


def test_an_operator_may_serve_the_papers_region_of_the_same_bundle(serve: Any, gates: Any) -> None:
    with serve(gates=gates, rule="sdm") as server:
        server.engine.script("strange", kind="stranger")
        one = result(server.chat("strange", reliability=ABSTAIN))
        assert (one["reason"], one["rule"], one["certificate"]) == (None, None, None)
        assert one["probability"] == one["activation"]
        assert server.client.get("/v1/reliability").json()["rule"] == "sdm"


def test_the_bundle_shows_the_rule_that_judges(serve: Any, gates: Any) -> None:
    with serve(gates=gates) as server:
        shown = server.client.get("/v1/reliability").json()
        assert shown["rule"] == "two-gates"
        [certificate] = shown["certificates"]
        assert (certificate["alpha"], certificate["answered"], certificate["base_right"]) == (0.9, 200, 300)
        [model] = server.client.get("/v1/models").json()["data"]
        assert model["reliability"]["rule"] == "two-gates"


def test_a_bundle_without_two_gates_cannot_serve_by_them(serve: Any) -> None:
    with pytest.raises(Refused, match="this one has the papers' regions only"), serve(rule="two-gates"):
        pass


def test_certified_only_asks_for_the_rules_certificate(serve: Any, gates: Any) -> None:
    with serve(gates=gates, certified_only=True) as server:
        assert result(server.chat("ask"))["certificate"]["rule"] == "two-gates"
        refused = server.chat("ask", reliability={"alpha": 0.95})
        assert refused.status_code == 400
    uncertified = replace(gates, terms=replace(gates.terms, certificates=()))
    with pytest.raises(Refused, match="has a certificate"), serve(gates=uncertified, certified_only=True):
        pass


def test_a_prompt_is_looked_at_once(serve: Any, gates: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the gates found when prefill ended stands in the answer's verdict; in annotate they look at its end."""
    looked = []
    know = AnswerRule.know
    monkeypatch.setattr(
        AnswerRule, "know", lambda rule, states: looked.append(len(states)) or know(rule, states)
    )
    with serve(gates=gates) as server:
        looked.clear()  # of warming up
        found = [
            result(server.chat("ask", reliability={"mode": mode}))["rule"] for mode in ("abstain", "annotate")
        ]
        assert looked == [1, 1]
        assert found[0] == found[1]
        assert found[0]["prompt_known"] is True
