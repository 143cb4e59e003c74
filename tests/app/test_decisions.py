"""`POST /v1/decisions`: shapes, verdicts, refusals, bounds, and what it shares with the other routes."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from candor.app.edge.keys import make_key
from candor.engine.base import EngineDead
from candor.model_store.bundle import Bundle
from candor.model_store.store import publish
from candor.policy.conversation import Conversations
from candor.policy.judging import TwoGates
from candor.policy.policy import Policy
from candor.sdm.gate import PromptGate

POLICY = Policy(
    max_tokens=1, conversations=Conversations(turns=("user choice", "user predicate", "user score"))
)
PREDICATE = {"type": "predicate", "instructions": "It is good.", "name": "good"}
CHOICE = {
    "type": "choice",
    "instructions": "Which?",
    "choices": [{"value": "left", "description": "the left one"}, {"value": "right"}, {"value": True}],
}
SCORE = {
    "type": "score",
    "instructions": "How much?",
    "levels": [{"label": one} for one in ("low", "some", "high")],
}


@pytest.fixture(scope="module")
def wide(gates: TwoGates) -> TwoGates:
    """As `gates`, but prompts with the states of answers ("follows", "thin") are known; "far" is not."""
    draw = torch.Generator().manual_seed(0)
    states = [3 * torch.randn(n, 8, generator=draw) for n in (40, 60)]
    return replace(gates, rule=replace(gates.rule, gate=PromptGate.fit(states[0], states[1], (4, 4), 2, 1)))


@pytest.fixture(scope="module")
def questions(bundle: Bundle) -> tuple[Any, ...]:
    """The exemplars as a decisions bundle has them."""
    return tuple(
        replace(
            one,
            messages=(one.messages[0], {"role": "predicate", "content": "Is it?"}),
            response='{"Yes": 0.75, "No": 0.25}',
        )
        for one in bundle.exemplars
    )


@pytest.fixture
def server(serve: Any, wide: TwoGates, questions: tuple[Any, ...]) -> Iterator[Any]:
    with serve(policy=POLICY, gates=wide, exemplars=questions) as running:
        yield running


def decide(server: Any, *questions: Any, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "input": "the text", "questions": list(questions), **more}
    response: httpx.Response = server.client.post("/v1/decisions", json=body)
    return response


def decided(server: Any, *questions: Any, **more: Any) -> Any:
    response = decide(server, *questions, **more)
    assert response.status_code == 200, response.text
    return response.json()


def refused(response: httpx.Response, status: int) -> Any:
    assert response.status_code == status, response.text
    return response.json()["error"]


OWN = sum(exp(-0.5 * at) for at in range(3))
"""1 / OWN is what the model itself gives the first of three options."""

ABSTAIN = {"reliability": {"mode": "abstain"}}


class TestShapes:
    def test_one_of_each(self, server: Any) -> None:
        body = decided(server, PREDICATE, CHOICE, SCORE)
        good, which, much = body["answers"]
        right = body["reliability"]["results"][0]["probability"]
        assert 0.5 < right < 1
        assert good == {"type": "predicate", "name": "good", "probability": right}
        assert (which["type"], which["name"], which["choice"]) == ("choice", None, "left")
        assert which["confidence"] == body["reliability"]["results"][1]["probability"]
        assert [one["value"] for one in which["probabilities"]] == ["left", "right", True]
        shares = [one["probability"] for one in which["probabilities"]]
        assert shares[0] == which["confidence"]
        assert sum(shares) == pytest.approx(1)
        assert shares[1] / shares[2] == pytest.approx(exp(0.5))  # as the model has them
        assert [(one["label"], one["value"]) for one in much["probabilities"]] == [
            ("low", 0),
            ("some", 1),
            ("high", 2),
        ]
        levels = [one["probability"] for one in much["probabilities"]]
        assert much["score"] == pytest.approx(levels[1] + 2 * levels[2])
        assert (body["object"], body["model"]) == ("decision", "tiny")
        assert body["usage"]["input_tokens"] == body["usage"]["total_tokens"] > 0
        assert (body["usage"]["output_tokens"], body["usage"]["input_tokens_details"]["cached_tokens"]) == (
            0,
            0,
        )
        results = body["reliability"]["results"]
        assert [(one["index"], one["region"], one["calibrated"]) for one in results] == [
            (index, "high", True) for index in range(3)
        ]

    def test_the_input_comes_first_and_counts_once(self, server: Any) -> None:
        one = decided(server, PREDICATE, input="long " * 20)["usage"]["input_tokens"]
        two = decided(server, PREDICATE, {**PREDICATE, "instructions": "It is bad."}, input="long " * 20)
        assert one < two["usage"]["input_tokens"] < one + 80
        prompts = [text for text, _ in server.engine.read]
        assert all(text.startswith("|user:long long") for text in prompts)
        assert prompts[0].endswith("\n\nIt is good.\nAnswer Yes if this is true, otherwise No.||")

    def test_what_the_options_are_answered_by(self, server: Any) -> None:
        decided(server, PREDICATE)
        decided(server, CHOICE)
        alike = [{"value": "true"}, {"value": True}, {"value": "truly"}]
        body = decided(server, {**CHOICE, "choices": alike})
        assert [labels for _, labels in server.engine.read] == ["YN", "lrt", "ABC"]
        assert body["answers"][0]["choice"] == "true"
        text = server.engine.read[2][0]
        assert "\nA. true\nB. true\nC. truly\nAnswer with its letter only." in text
        assert "\n- left: the left one\n- right\n- true|" in server.engine.read[1][0]

    def test_options_that_begin_alike_and_part_later_are_answered_by_themselves(self, server: Any) -> None:
        pair = [{"value": "it is so"}, {"value": "it is not"}]
        decided(server, {**CHOICE, "choices": pair})
        [(text, labels)] = server.engine.read
        assert (text[-6:], labels) == ("it is ", "sn")

    def test_inputs_of_messages_calls_and_json(self, server: Any) -> None:
        items = [
            {"role": "developer", "content": "Be fair."},
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "a"}, {"type": "input_json", "data": {"b": [1]}}],
            },
            {"role": "assistant", "content": [{"type": "output_text", "text": "c"}], "phase": "final_answer"},
            {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "seen"},
        ]
        assert decided(server, PREDICATE, input=items)["answers"][0]["type"] == "predicate"
        expected = (
            'developer: Be fair.\nuser: a\n{"b":[1]}\nassistant: c\ncall: look({})\ntool: seen\n\nIt is good.'
        )
        assert expected in server.engine.read[0][0]
        plain = decided(server, PREDICATE, input=[{"role": "user", "content": "a"}])
        assert server.engine.read[1][0].startswith("|user:a\n\n")
        assert plain["answers"][0]["type"] == "predicate"

    def test_mode_off_has_no_verdicts(self, server: Any) -> None:
        body = decided(server, PREDICATE, reliability={"mode": "off"})
        assert "reliability" not in body
        assert body["answers"][0]["probability"] == pytest.approx(1 / (1 + exp(-0.5)))

    def test_what_concerns_openai_alone_is_taken(self, server: Any) -> None:
        taken = {"prompt_cache_key": "k", "prompt_cache_options": {"ttl": "30m"}, "safety_identifier": "s"}
        assert decided(server, PREDICATE, **taken)["answers"]


class TestRefusals:
    def test_each_question_by_itself_and_nothing_of_it_leaves(self, server: Any) -> None:
        server.engine.script("sure", state="follows")
        server.engine.script("vague", state="thin")
        server.engine.script("odd", state="far")
        asked = [{**CHOICE, "instructions": text, "name": text} for text in ("sure", "vague", "odd")]
        shown = decided(server, *asked)
        body = decided(server, *asked, **ABSTAIN)
        kept, vague, odd = body["answers"]
        assert shown["answers"][2]["confidence"] == pytest.approx(1 / OWN)  # nothing is known of it
        assert kept == shown["answers"][0]
        assert (vague, odd) == ({"type": "refusal", "name": "vague"}, {"type": "refusal", "name": "odd"})
        results = body["reliability"]["results"]
        assert [one["reason"] for one in results] == [None, "below_score_threshold", "out_of_distribution"]
        for number in (1, 2):
            text = json.dumps([body["answers"][number], results[number]])
            for share in shown["answers"][number]["probabilities"]:
                assert str(share["probability"])[:8] not in text
            assert (results[number]["probability"], results[number]["rule"]["probability"]) == (None, None)
            assert results[number]["prediction"] is None

    @pytest.mark.parametrize(
        "asked", [{}, {"reliability": {"mode": "off"}}, {"reliability": {"mode": "annotate"}}]
    )
    def test_the_operators_mode_goes_first(self, serve: Any, wide: Any, questions: Any, asked: Any) -> None:
        with serve(policy=POLICY, gates=wide, exemplars=questions, least_mode="abstain") as server:
            server.engine.script("the text", state="thin")
            body = decided(server, PREDICATE, SCORE, **asked)
        assert [one["type"] for one in body["answers"]] == ["refusal", "refusal"]
        assert all(one["abstained"] and one["probability"] is None for one in body["reliability"]["results"])

    def test_a_question_of_a_kind_that_was_not_calibrated(
        self, serve: Any, wide: Any, questions: Any
    ) -> None:
        policy = replace(POLICY, conversations=Conversations(turns=("user predicate",)))
        with serve(policy=policy, gates=wide, exemplars=questions) as server:
            body = decided(server, PREDICATE, CHOICE)
            assert [one["calibrated"] for one in body["reliability"]["results"]] == [True, False]
            assert body["answers"][1]["confidence"] == pytest.approx(1 / OWN)
            assert [one["type"] for one in decided(server, PREDICATE, CHOICE, **ABSTAIN)["answers"]] == [
                "predicate",
                "refusal",
            ]

    def test_a_bundle_of_answers_covers_no_decision(self, serve: Any, wide: Any) -> None:
        with serve(gates=wide) as server:
            [result] = decided(server, PREDICATE)["reliability"]["results"]
            assert (result["calibrated"], result["reason"]) == (False, "uncalibrated_request")
            assert decided(server, PREDICATE, **ABSTAIN)["answers"] == [{"type": "refusal", "name": "good"}]

    def test_a_bundle_of_decisions_covers_no_answer(self, server: Any) -> None:
        [result] = server.chat("ask").json()["reliability"]["results"]
        assert (result["calibrated"], result["region"] == "high") == (False, False)

    def test_states_that_were_not_counted_whole(self, server: Any) -> None:
        server.engine.script("the text", state="incomplete")
        body = decided(server, PREDICATE, **ABSTAIN)
        assert body["answers"][0]["type"] == "refusal"
        assert body["reliability"]["results"][0]["region"] == "unavailable"

    def test_by_a_region_the_prediction_says_which_way(self, serve: Any, questions: Any) -> None:
        with serve(policy=POLICY, exemplars=questions) as server:
            server.engine.script("wrong", state="not_following")
            right, wrong = decided(server, PREDICATE, {**PREDICATE, "instructions": "wrong"})["answers"]
            assert right["probability"] > 0.9
            assert wrong["probability"] < 0.1
            answers = decided(server, PREDICATE, {**PREDICATE, "instructions": "wrong"}, **ABSTAIN)["answers"]
            assert [one["type"] for one in answers] == ["predicate", "refusal"]


class TestBounds:
    def test_none_one_four_hundred_and_more(self, server: Any) -> None:
        assert refused(decide(server), 400)["param"] == "questions"
        assert len(decided(server, PREDICATE)["answers"]) == 1
        many = [{**PREDICATE, "name": str(at), "instructions": f"It is {at}."} for at in range(400)]
        body = decided(server, *many)
        assert [one["name"] for one in body["answers"]] == [str(at) for at in range(400)]
        assert [one["index"] for one in body["reliability"]["results"]] == list(range(400))
        assert server.engine.most_running == 16  # CANDOR_MAX_CHOICES
        assert refused(decide(server, *many, PREDICATE), 400)["param"] == "questions"

    @pytest.mark.parametrize(
        ("question", "more", "param"),
        [
            ({**PREDICATE, "instruction": "x"}, {}, "questions[0].instruction"),
            ({**CHOICE, "choices": [{"valu": "a"}, {"value": "b"}]}, {}, "questions[0].choices[0].valu"),
            (PREDICATE, {"reliabilty": {}}, "reliabilty"),
            (PREDICATE, {"reliability": {"mdoe": "abstain"}}, "reliability.mdoe"),
            (PREDICATE, {"reliability": {"on_abstain": "content"}}, "reliability.on_abstain"),
            (PREDICATE, {"input": [{"role": "user", "contents": "x"}]}, "input[0].contents"),
            (PREDICATE, {"temperature": 0}, "temperature"),
        ],
    )
    def test_an_unknown_field_is_named(self, server: Any, question: Any, more: Any, param: str) -> None:
        error = refused(decide(server, question, **more), 400)
        assert (error["param"], error["code"]) == (param, "unknown_parameter")
        assert server.engine.read == []

    @pytest.mark.parametrize(
        ("question", "more", "param"),
        [
            ({**PREDICATE, "instructions": ""}, {}, "questions[0].instructions"),
            ({**PREDICATE, "type": "yesno"}, {}, "questions[0].type"),
            ({**PREDICATE, "choices": CHOICE["choices"]}, {}, "questions[0]"),
            ({**CHOICE, "choices": [{"value": "a"}]}, {}, "questions[0].choices"),
            ({**CHOICE, "choices": [{"value": "a"}, {"value": "a"}]}, {}, "questions[0]"),
            ({**CHOICE, "choices": [{"value": 1}, {"value": "a"}]}, {}, "questions[0].choices[0].value"),
            ({**CHOICE, "choices": [{"value": str(at)} for at in range(256)]}, {}, "questions[0].choices"),
            ({**CHOICE, "choices": [1] * 255}, {}, "questions[0].choices[0]"),
            ({**SCORE, "levels": [{"label": "a"}, {"label": "a"}]}, {}, "questions[0]"),
            (PREDICATE, {"input": []}, "input"),
            (PREDICATE, {"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, None),
            (
                PREDICATE,
                {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
                "input[0].content",
            ),
            (PREDICATE, {"input": [{"role": "user", "content": "\ud800"}]}, "input[0].content"),
            (PREDICATE, {"reliability": {"alpha": 0.5}}, "reliability.alpha"),
        ],
    )
    def test_a_wrong_field_is_named(self, server: Any, question: Any, more: Any, param: str | None) -> None:
        body = {"model": "tiny", "input": "x", "questions": [question], **more}
        headers = {"content-type": "application/json"}
        response = server.client.post("/v1/decisions", content=json.dumps(body), headers=headers)
        assert refused(response, 400)["param"] == param
        assert server.engine.read == []

    def test_typed_values_with_the_same_text_are_two(self, server: Any) -> None:
        pair = [{"value": "true"}, {"value": True}]
        [answer] = decided(server, {**CHOICE, "choices": pair})["answers"]
        assert [one["value"] for one in answer["probabilities"]] == ["true", True]

    def test_long_texts(self, server: Any) -> None:
        for length in (600, 3000):  # beyond the context; beyond what its tokens could be
            assert (
                refused(decide(server, PREDICATE, input="x" * length), 400)["code"]
                == "context_length_exceeded"
            )
            long = {**CHOICE, "choices": [{"value": "a" * length}, {"value": "b"}]}
            assert refused(decide(server, PREDICATE, long), 400)["code"] == "context_length_exceeded"
        deep: Any = {"a": 1}
        for _ in range(40):
            deep = {"a": deep}
        item = {"role": "user", "content": [{"type": "input_json", "data": deep}]}
        assert refused(decide(server, PREDICATE, input=[item]), 400)["param"] == "input[0].content"

    def test_another_model_is_not_served(self, server: Any) -> None:
        assert refused(decide(server, PREDICATE, model="other"), 404)["code"] == "model_not_found"


class TestAsTheOtherRoutes:
    def test_keys_charges_and_the_audit_log(
        self, serve: Any, wide: Any, questions: Any, tmp_path: Path
    ) -> None:
        secret, key = make_key("alice", ["answer"])
        operator, watched = make_key("bob", ["operate"])
        (tmp_path / "keys").write_text(key.line() + watched.line())
        audit = tmp_path / "audit.jsonl"
        with serve(
            policy=POLICY,
            gates=wide,
            exemplars=questions,
            keys=tmp_path / "keys",
            audit_log=audit,
            tokens_per_minute=200,
        ) as server:
            body = {"model": "tiny", "input": "x" * 150, "questions": [PREDICATE, SCORE]}

            def ask(token: str) -> httpx.Response:
                headers = {"authorization": f"Bearer {token}"}
                response: httpx.Response = server.client.post("/v1/decisions", json=body, headers=headers)
                return response

            assert ask("nonsense").status_code == 401
            assert ask(operator).status_code == 403
            first = ask(secret)
            assert first.json()["usage"]["input_tokens"] > 200  # more than the minute's: paid off afterwards
            assert refused(ask(secret), 429)["code"] == "rate_limit_exceeded"
        lines = [json.loads(line) for line in audit.read_text().splitlines()]
        [line] = [one for one in lines if one["status"] == 200]
        assert (line["route"], line["caller"], line["model"]) == ("/v1/decisions", "alice", "tiny")
        assert [one["index"] for one in line["verdicts"]] == [0, 1]

    def test_metrics_and_feedback(self, serve: Any, wide: Any, questions: Any, tmp_path: Path) -> None:
        with serve(
            policy=POLICY, gates=wide, exemplars=questions, store=str(tmp_path / "feedback")
        ) as server:
            server.engine.script("vague", state="thin")
            body = decided(server, PREDICATE, {**PREDICATE, "instructions": "vague"}, **ABSTAIN)
            page = server.client.get("/metrics").text
            counts = [
                line
                for line in page.splitlines()
                if line.startswith("sdm_answers_total") and line.endswith(" 1.0")
            ]
            assert len(counts) == 2
            assert any('decision="abstained"' in line and "below_score_threshold" in line for line in counts)
            said = {"id": body["id"], "index": 1, "correct": False}
            assert server.client.post("/v1/reliability/feedback", json=said).json()["outcome"] == "recorded"

    def test_no_place_is_left(self, serve: Any, wide: Any, questions: Any) -> None:
        with serve(
            policy=POLICY,
            gates=wide,
            exemplars=questions,
            max_in_flight_tokens=100,
            max_in_flight=1,
            max_choices=1,
        ) as server:
            assert refused(decide(server, PREDICATE, input="x" * 100), 400)["code"] == "too_large"
            assert len(decided(server, PREDICATE, input="x")["answers"]) == 1

    def test_whoever_leaves_takes_the_engines_work_along(self, server: Any, wait_until: Any) -> None:
        server.engine.script("the text", hangs=True)
        response = server.client.post(
            "/v1/decisions",
            json={"model": "tiny", "input": "the text", "questions": [PREDICATE, SCORE]},
            headers={"x-request-timeout": "0.2"},
        )
        assert refused(response, 503)["code"] == "deadline_exceeded"
        wait_until(lambda: len(server.engine.cancelled) == 2)

    def test_an_engine_that_died(self, server: Any) -> None:
        server.engine.script("the text", fails=EngineDead("gone"))
        assert refused(decide(server, PREDICATE), 503)["code"] == "engine_dead"

    def test_the_golden_prompts_are_decisions(self, server: Any) -> None:
        assert server.client.get("/readyz?deep=true").status_code == 200
        assert [labels for _, labels in server.engine.read] == ["YN", "YN"]
        server.engine.known.clear()
        server.engine.script("prompt", state="far")
        assert server.client.get("/readyz?deep=true").status_code == 503


def test_the_real_client(server: Any) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        server.engine.script("vague", state="thin")
        made = client.decisions.create(
            model="tiny",
            input="the text",
            questions=[PREDICATE, CHOICE, SCORE, {**PREDICATE, "instructions": "vague"}],
            extra_body=ABSTAIN,
        )
    assert [type(one).__name__.removeprefix("AnswerAnswerResource") for one in made.answers] == [
        "Predicate",
        "Choice",
        "Score",
        "Refusal",
    ]
    assert made.answers[1].choice == "left"
    assert made.answers[1].probabilities[2].value is True
    assert made.answers[3].name == "good"
    assert made.usage.output_tokens_details.reasoning_tokens == 0
    assert made.reliability["results"][3]["reason"] == "below_score_threshold"


def test_a_shadow_scores_decisions_too(
    serve_from: Any,
    bundle: Bundle,
    wide: TwoGates,
    questions: tuple[Any, ...],
    tmp_path: Path,
    wait_until: Any,
) -> None:
    for name, score_min in (("old", 1.5), ("new", 1e6)):  # the new one refuses whatever the old one decides
        certificate = replace(wide.terms.certificates[0], score_min=score_min)
        terms = replace(wide.terms, certificates=(certificate,))
        manifest = replace(bundle.manifest, rule=terms, policy=POLICY)
        publish(tmp_path / name, manifest, bundle.estimator, questions, bundle.report, wide.rule)
    store = str(tmp_path / "store.db")
    with serve_from(tmp_path / "old", shadow=tmp_path / "new", store=store) as server:
        decided(server, PREDICATE, CHOICE, SCORE)
        decided(server, PREDICATE, reliability={"mode": "off"})  # judged by nobody

        def seen() -> Any:
            return server.client.get("/bundles").json()["data"][0]["shadow"]["decisions"]

        wait_until(lambda: sum(sum(row.values()) for row in seen().values()) == 3)
        assert seen()["answered"] == {"answered": 0, "abstained": 3, "unknown": 0}
        wait_until(lambda: disputed(store) == [0, 1, 2])


def disputed(store: str) -> list[int]:
    with closing(sqlite3.connect(store)) as file:
        asked = "SELECT choice FROM verdicts WHERE disputed_by IS NOT NULL ORDER BY choice"
        return [choice for (choice,) in file.execute(asked)]
