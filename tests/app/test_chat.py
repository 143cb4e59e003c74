"""`POST /v1/chat/completions` over HTTP: shapes, modes, headers, defaults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from candor.policy.certificate import Certificate
from candor.policy.conversation import Conversations
from candor.policy.policy import Policy

CERTIFICATE = Certificate(0.9, "lower", 0.95, 0.95, 80.0, 400, 120, 119, 0.961)
DIGEST = "0123456789abcdef" * 4


def result(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    [one] = response.json()["reliability"]["results"]
    return one  # type: ignore[no-any-return]


def test_an_answer_with_its_reliability(server: Any) -> None:
    response = server.chat("hello")
    assert response.status_code == 200
    body = response.json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["system_fingerprint"] == "sdm-0123456789ab"
    [choice] = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "The answer.", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
        "token_ids": None,
    }
    assert body["prompt_logprobs"] is body["prompt_token_ids"] is None
    prompt = len("|system:Be brief.||user:hello||")
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": 3, "total_tokens": prompt + 3}
    assert body["reliability"]["schema_version"] == 1
    [one] = body["reliability"]["results"]
    assert list(one) == [
        "index",
        "region",
        "abstained",
        "reason",
        "explanation",
        "prediction",
        "alpha",
        "probability",
        "activation",
        "probability_lower",
        "probability_upper",
        "similarity",
        "rescaled_similarity",
        "distance_quantile",
        "magnitude",
        "effective_sample_size",
        "rule",
        "calibrated",
        "certificate",
        "attempts",
        "escalated",
        "exemplars",
    ]
    assert (one["region"], one["abstained"], one["reason"], one["calibrated"]) == ("high", False, None, True)
    assert (one["index"], one["prediction"], one["alpha"], one["exemplars"]) == (0, 1, 0.9, [])
    assert one["probability_lower"] <= one["probability"] <= one["probability_upper"]
    assert one["similarity"] == 400
    assert response.headers["x-sdm-region"] == "high"
    assert response.headers["x-sdm-abstained"] == "false"
    assert response.headers["x-sdm-bundle"] == DIGEST


@pytest.mark.parametrize(
    ("state", "region", "reason"),
    [
        ("not_following", "high", "predicted_not_following"),
        ("thin", "low", "below_class_threshold"),
        ("edge", "low", "below_similarity_threshold"),
        ("far", "ood", "out_of_distribution"),
        ("nan", "unavailable", "scoring_unavailable"),
        ("huge", "unavailable", "scoring_unavailable"),
        ("missing", "unavailable", "scoring_unavailable"),
        ("incomplete", "unavailable", "scoring_unavailable"),
        ("wrong_size", "unavailable", "scoring_unavailable"),
    ],
)
@pytest.mark.parametrize("mode", ["annotate", "abstain"])
def test_what_is_not_reliable_is_never_answered(
    server: Any, state: str, region: str, reason: str, mode: str
) -> None:
    server.engine.script("ask", state=state)
    response = server.chat("ask", reliability={"mode": mode}, logprobs=True)
    one = result(response)
    assert (one["region"], one["abstained"], one["reason"]) == (region, True, reason)
    if region == "unavailable":
        assert one["prediction"] is one["probability"] is one["similarity"] is one["magnitude"] is None
        assert one["effective_sample_size"] is None
    assert response.headers["x-sdm-region"] == region
    assert response.headers["x-sdm-abstained"] == "true"
    [choice] = response.json()["choices"]
    if mode == "annotate":
        assert choice["message"] == {"role": "assistant", "content": "The answer.", "refusal": None}
        assert len(choice["logprobs"]["content"]) == 3
    else:
        refusal = "I do not know this reliably enough to answer."
        assert choice["message"] == {"role": "assistant", "content": None, "refusal": refusal}
        assert choice["logprobs"] is None  # they would spell the answer out
        assert "answer." not in response.text.replace(refusal, "")
    assert choice["finish_reason"] == "stop"


def test_abstain_leaves_a_reliable_answer(server: Any) -> None:
    response = server.chat("hello", reliability={"mode": "abstain"})
    assert response.json()["choices"][0]["message"]["content"] == "The answer."
    assert result(response)["abstained"] is False


def test_a_withheld_truncated_answer_finishes_with_stop(server: Any) -> None:
    server.engine.script("long", finish="length")
    kept = server.chat("long").json()
    assert kept["choices"][0]["finish_reason"] == "length"
    withheld = server.chat("long", reliability={"mode": "abstain"})
    assert withheld.json()["choices"][0]["finish_reason"] == "stop"
    assert result(withheld)["reason"] == "uncalibrated_request"


def test_replacement_as_content_and_as_fallback(serve: Any, engine: Any) -> None:
    engine.script("ask", state="far")
    with serve(refusal_text="No.", fallback_text="Ask Ada.") as server:
        answers = {
            kind: server.chat("ask", reliability={"mode": "abstain", "on_abstain": kind}).json()
            for kind in ("refusal", "content", "fallback")
        }
    messages = {kind: body["choices"][0]["message"] for kind, body in answers.items()}
    assert (messages["refusal"]["content"], messages["refusal"]["refusal"]) == (None, "No.")
    assert (messages["content"]["content"], messages["content"]["refusal"]) == ("No.", None)
    assert (messages["fallback"]["content"], messages["fallback"]["refusal"]) == ("Ask Ada.", None)


def test_where_the_operator_puts_the_replacement(serve: Any, engine: Any) -> None:
    engine.script("ask", state="far")
    with serve(refusal_text="No.", on_abstain="content") as server:
        asked = [{"mode": "abstain"}, {"mode": "abstain", "on_abstain": "refusal"}]
        [content, refusal] = [
            server.chat("ask", reliability=one).json()["choices"][0]["message"] for one in asked
        ]
    assert (content["content"], content["refusal"]) == ("No.", None)
    assert (refusal["content"], refusal["refusal"]) == (None, "No.")


def test_fallback_needs_to_be_configured_only_where_it_could_be_used(server: Any) -> None:
    refused = server.chat("ask", reliability={"mode": "abstain", "on_abstain": "fallback"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "reliability.on_abstain"
    assert "CANDOR_FALLBACK_TEXT" in refused.json()["error"]["message"]
    assert server.chat("ask", reliability={"on_abstain": "fallback"}).status_code == 200


def test_mode_off_checks_nothing(server: Any) -> None:
    response = server.chat("ask", reliability={"mode": "off"})
    assert response.json()["choices"][0]["message"]["content"] == "The answer."
    assert "reliability" not in response.json()
    assert not [name for name in response.headers if name.startswith("x-sdm")]
    assert [capture for _, _, capture in server.engine.asked] == [False]
    server.chat("ask")
    assert server.engine.asked[-1][2] is True


def test_alpha_is_chosen_per_request(server: Any) -> None:
    assert result(server.chat("ask", reliability={"alpha": 0.95}))["alpha"] == 0.95
    refused = server.chat("ask", reliability={"alpha": 0.97})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "reliability.alpha"
    assert "0.9, 0.95" in refused.json()["error"]["message"]


def test_alpha_and_estimator_are_settings(serve: Any, engine: Any) -> None:
    engine.script("thin", state="thin")
    with serve(estimator="plain") as server:
        assert result(server.chat("thin"))["region"] == "high"
        assert result(server.chat("thin", reliability={"alpha": 0.95}))["region"] == "low"
    with serve(estimator="plain", alpha=0.95) as server:
        assert result(server.chat("thin"))["region"] == "low"


def test_exemplars_are_the_nearest_with_their_texts(server: Any, bundle: Any) -> None:
    one = result(server.chat("ask", reliability={"exemplars": 4}))
    distances = (bundle.estimator.support.h_prime - 2.0).norm(dim=1)  # h' = h = 2 in every number
    nearest = distances.sort()
    assert [shown["id"] for shown in one["exemplars"]] == [f"e{row}" for row in nearest.indices[:4].tolist()]
    assert [shown["distance"] for shown in one["exemplars"]] == pytest.approx(nearest.values[:4].tolist())
    first = nearest.indices[0].item()
    assert one["exemplars"][0] == {
        "id": f"e{first}",
        "label": 1,
        "prediction": 1,
        "distance": pytest.approx(nearest.values[0].item()),
        "prompt": f"prompt {first}",
        "response": f"response {first}",
    }
    assert server.chat("ask", reliability={"exemplars": 11}).status_code == 400


def test_several_choices_are_several_requests_and_several_verdicts(server: Any) -> None:
    response = server.chat("ask", n=3, temperature=0.5, seed=9)
    body = response.json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [one["index"] for one in body["reliability"]["results"]] == [0, 1, 2]
    assert response.headers["x-sdm-region"] == "low,low,low"
    assert response.headers["x-sdm-abstained"] == "true,true,true"
    assert [sampling.seed for sampling in server.engine.samplings("ask")] == [9, 10, 11]
    prompt = len("|system:Be brief.||user:ask||")
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": 9, "total_tokens": prompt + 9}


def test_logprobs(server: Any) -> None:
    server.engine.script("ask", pieces=("né", "!"))
    [choice] = server.chat("ask", logprobs=True, top_logprobs=2).json()["choices"]
    first, second = choice["logprobs"]["content"]
    assert first["token"] == "né"
    assert first["bytes"] == [110, 195, 169]
    assert first["logprob"] == -0.5
    assert first["top_logprobs"] == [
        {"token": "né", "logprob": -0.5, "bytes": [110, 195, 169]},
        {"token": "other", "logprob": -9999.0, "bytes": list(b"other")},
    ]
    assert second["token"] == "!"
    assert server.engine.samplings("ask")[-1].logprobs == 2
    [choice] = server.chat("ask", logprobs=True).json()["choices"]
    assert [token["top_logprobs"] for token in choice["logprobs"]["content"]] == [[], []]
    assert server.chat("ask", top_logprobs=2).status_code == 400


class TestPolicy:
    """What a request leaves open is the bundle's policy; what leaves the policy is not calibrated."""

    def test_a_stock_client_is_calibrated(self, serve: Any, engine: Any, bundle: Any) -> None:
        policy = Policy(0.7, 0.9, 40, 12)
        with serve(policy=policy) as server:
            assert result(server.chat("ask"))["calibrated"] is True
            [sampling] = engine.samplings("ask")
            drawn = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens)
            assert drawn == (0.7, 0.9, 40, 12)
            assert result(server.chat("ask", temperature=0))["calibrated"] is False
            assert result(server.chat("ask", top_k=-1))["calibrated"] is False
            assert result(server.chat("ask", top_p=1))["calibrated"] is False
            assert result(server.chat("ask", temperature=0.7, top_p=0.9, top_k=40))["calibrated"] is True

    @pytest.mark.parametrize(
        ("more", "calibrated"),
        [
            ({}, True),
            ({"temperature": 0, "seed": 3, "top_p": 0.5, "stop": ["x"], "user": "u"}, True),
            ({"max_tokens": 3}, True),
            ({"temperature": 1.0}, False),
            ({"frequency_penalty": 0.5}, False),
            ({"presence_penalty": 0.5}, False),
        ],
    )
    def test_sampling(self, server: Any, more: dict[str, Any], calibrated: bool) -> None:
        one = result(server.chat("ask", **more))
        assert one["calibrated"] is calibrated
        expected = ("high", None) if calibrated else ("low", "uncalibrated_request")
        assert (one["region"], one["reason"]) == expected

    def test_an_answer_longer_than_calibration_allowed(self, server: Any) -> None:
        server.engine.script("ask", completion_tokens=17)  # the policy's max_tokens are 16
        assert result(server.chat("ask", max_tokens=100))["reason"] == "uncalibrated_request"

    def test_leaving_the_policy_does_not_hide_what_is_strange(self, server: Any) -> None:
        server.engine.script("ask", state="far")
        assert result(server.chat("ask", temperature=1))["region"] == "ood"

    @pytest.mark.parametrize(
        ("messages", "calibrated", "prompt"),
        [
            ([("user", "hi")], True, "|system:Be brief.||user:hi||"),
            ([("system", "Be brief."), ("user", "hi")], True, "|system:Be brief.||user:hi||"),
            ([("developer", "Be brief."), ("user", "hi")], True, "|system:Be brief.||user:hi||"),
            ([("system", "Be long."), ("user", "hi")], False, "|system:Be long.||user:hi||"),
            ([("user", "hi"), ("system", "Be brief.")], False, "|user:hi||system:Be brief.||"),
            (
                [("user", "hi"), ("assistant", "ho"), ("user", "he")],
                False,  # calibration had single turns
                "|system:Be brief.||user:hi||assistant:ho||user:he||",
            ),
        ],
    )
    def test_conversation(
        self, server: Any, messages: list[tuple[str, str]], calibrated: bool, prompt: str
    ) -> None:
        body = {
            "model": "tiny",
            "messages": [{"role": role, "content": content} for role, content in messages],
        }
        assert result(server.client.post("/v1/chat/completions", json=body))["calibrated"] is calibrated
        assert server.engine.asked[-1][0] == prompt

    @pytest.mark.parametrize(
        ("records", "calibrated"),
        [
            ([None], [True, False, False]),
            (["Own."], [False, True, False]),
            ([None, "Own."], [True, True, False]),
        ],
    )
    def test_system_prompts_that_no_record_had(
        self, serve: Any, records: list[str | None], calibrated: list[bool]
    ) -> None:
        """Asked without one, with "Own." and with another: the prompt reaches the engine as it was asked."""

        def asked(system: str | None) -> list[dict[str, str]]:
            lead = [] if system is None else [{"role": "system", "content": system}]
            return [*lead, {"role": "user", "content": "hi"}]

        policy = Policy(max_tokens=16, conversations=Conversations.of_records(list(map(asked, records))))
        with serve(policy=policy) as server:
            for system, expected in zip((None, "Own.", "Answer wrongly."), calibrated, strict=True):
                body = {"model": "tiny", "messages": asked(system)}
                one = result(server.client.post("/v1/chat/completions", json=body))
                assert one["calibrated"] is expected
                assert one["reason"] == (None if expected else "uncalibrated_request")
                lead = "" if system is None else f"|system:{system}|"
                assert server.engine.asked[-1][0] == f"{lead}|user:hi||"

    def test_template_arguments(self, server: Any) -> None:
        assert result(server.chat("ask", chat_template_kwargs={}))["calibrated"] is True
        assert (
            result(server.chat("ask", chat_template_kwargs={"enable_thinking": True}))["calibrated"] is False
        )


class TestLeastMode:
    """What the operator enforces, no request undoes: not by its mode, nor as a stream, nor as a plain completion."""

    FORMS = (
        {},
        {"reliability": {"mode": "off"}},
        {"reliability": {"mode": "annotate"}},
        {"stream": True},
        {"stream": True, "reliability": {"mode": "off"}},
        {"stream": True, "reliability": {"mode": "abstain", "stream": "optimistic"}},
        {"n": 2},
        {"logprobs": True, "top_logprobs": 1},
        {"reliability": {"certified": False, "exemplars": 1}},
    )

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        "enforced", [{"least_mode": "abstain"}, {"certified_only": True, "certificates": (CERTIFICATE,)}]
    )
    def test_nothing_else_leaves(self, serve: Any, engine: Any, enforced: Any, form: dict[str, Any]) -> None:
        engine.script("ask", state="edge", pieces=("SEC", "RET"))
        with serve(**enforced) as server:
            assert "SEC" not in server.chat("ask", **form).text
            plain = {key: value for key, value in form.items() if "logprobs" not in key}
            body = {"model": "tiny", "prompt": "ask", **plain}
            completion = server.client.post("/v1/completions", json=body)
            assert completion.status_code == 200
            assert "SEC" not in completion.text

    def test_what_is_reliable_is_answered(self, serve: Any) -> None:
        with serve(least_mode="abstain") as server:
            assert server.chat("ask").json()["choices"][0]["message"]["content"] == "The answer."
            off = server.chat("ask", reliability={"mode": "off"})
            assert off.headers["x-sdm-abstained"] == "false"

    def test_reliable_answers_without_a_certificate(self, serve: Any, engine: Any) -> None:
        beyond = replace(CERTIFICATE, rescaled_similarity_min=10_000.0)
        with serve(certified_only=True, certificates=(beyond,)) as server:
            message = server.chat("ask", reliability={"mode": "off"}).json()["choices"][0]["message"]
            assert (message["content"], bool(message["refusal"])) == (None, True)

    def test_annotate_checks_what_asks_for_no_check(self, serve: Any) -> None:
        with serve(least_mode="annotate") as server:
            assert result(server.chat("ask", reliability={"mode": "off"}))["region"] == "high"


def test_sampling_reaches_the_engine(server: Any) -> None:
    server.chat(
        "ask",
        temperature=0.25,
        top_p=0.5,
        top_k=-1,
        seed=-3,
        stop="END",
        frequency_penalty=0.5,
        presence_penalty=-1,
        max_completion_tokens=7,
        max_tokens=9,
    )
    [sampling] = server.engine.samplings("ask")
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.25, 0.5, 0, -3)
    assert (sampling.stop, sampling.max_tokens, sampling.logprobs) == (("END",), 7, None)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -1)


def test_content_in_parts_and_an_earlier_refusal(server: Any) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": "I do not know."},
        {"role": "user", "content": "again", "name": "Ada"},
    ]
    response = server.client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert response.status_code == 200
    expected = "|system:Be brief.||user:a\nb||assistant:I do not know.||user:again||"
    assert server.engine.asked[-1][0] == expected


def test_text_beyond_ascii_comes_back_whole(server: Any) -> None:
    server.engine.script("ask", pieces=("naïve ", "\u2028", "😀"))
    assert server.chat("ask").json()["choices"][0]["message"]["content"] == "naïve \u2028😀"


def test_requests_that_finish_together_get_each_its_own_verdict(server: Any) -> None:
    """60 answers, three kinds of state, all at once: scoring batches must not mix rows."""
    from concurrent.futures import ThreadPoolExecutor

    kinds = {"follows": "high", "far": "ood", "edge": "low"}
    for state in kinds:
        server.engine.script(f"[{state}]", state=state, pause_s=0.01)
    prompts = [f"[{state}]" for state in kinds] * 20
    with ThreadPoolExecutor(20) as pool:
        regions = [result(response)["region"] for response in pool.map(server.chat, prompts)]
    assert regions == [*kinds.values()] * 20
