"""What vLLM's handlers are given of an answer, and which conversations are rendered as calibration rendered them."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams

from candor.engine.base import EngineError, Generation, Sampling
from candor.engine.vllm_client import CapturingClient, _as_sampling, _Shown, judged_by
from candor.engine.vllm_engine import VLLMEngine
from candor.engine.vllm_handlers import _plain
from candor.policy.conversation import Conversations
from candor.policy.policy import Policy

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def output(text: str, *tokens: int, end: str | None = None) -> RequestOutput:
    completion = CompletionOutput(
        0, text, list(tokens), None, [{t: object()} for t in tokens], finish_reason=end
    )  # type: ignore[misc]
    return RequestOutput("r", None, [1], None, [completion], end is not None, kv_transfer_params={"h": b""})


def generation(text: str, *tokens: int, tagged: bool = True) -> Generation:
    return Generation(text, tokens, "stop", tagged, False, None, 1, len(tokens))


def test_an_output_is_given_once_all_of_its_text_is_shown() -> None:
    shown = _Shown(2)
    given = []
    for text, token, visible in (("a", 1, "a"), (" <ver", 2, ""), ("ified>", 3, ""), ("Yes", 4, "")):
        shown.see(output(text, token, end="stop" if token == 4 else None))
        if visible:
            given.append(shown.piece(visible))
    given.append(shown.last(generation("a", 1)))
    assert [(one.outputs[0].text, list(one.outputs[0].token_ids)) for one in given] == [("a", [1]), ("", [])]
    assert [len(one.outputs[0].logprobs or ()) for one in given] == [1, 0]
    assert [one.outputs[0].index for one in given] == [2, 2]
    assert [one.finished for one in given] == [False, True]
    assert all(one.kv_transfer_params is None for one in given)  # the states stay here


def test_an_answer_without_a_tag_ends_with_its_end_token() -> None:
    shown = _Shown(0)
    shown.see(output("a", 1))
    first = shown.piece("a")
    shown.see(output("", 2, end="stop"))
    last = shown.last(generation("a", 1, tagged=False))
    assert [list(one.outputs[0].token_ids) for one in (first, last)] == [[1], [2]]


def test_of_what_is_withheld_nothing_is_given() -> None:
    shown = _Shown(0)
    shown.see(output("secret", 1, 2, end="stop"))
    nothing = shown.nothing().outputs[0]
    assert (nothing.text, nothing.token_ids, nothing.logprobs) == ("", [], [])
    assert nothing.finish_reason == "stop"


class Engine:
    max_model_len = 64

    @staticmethod
    def params(sampling: Sampling) -> SamplingParams:
        return SamplingParams(
            max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p
        )


@pytest.mark.parametrize(
    ("more", "same"),
    [
        ({}, True),
        ({"seed": 1, "logprobs": 3, "prompt_logprobs": 1, "skip_special_tokens": False, "stop": ["x"]}, True),
        ({"min_p": 0.1}, False),
        ({"logit_bias": {1: 2.0}}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"ignore_eos": True}, False),
        ({"min_tokens": 2}, False),
        ({"allowed_token_ids": [1]}, False),
        ({"bad_words": ["a"]}, False),
    ],
)
def test_another_field_is_another_policy(more: dict[str, Any], same: bool) -> None:
    engine: Any = Engine()
    found = _as_sampling(engine, SamplingParams(max_tokens=8, temperature=0.7, top_p=0.9, **more))
    assert (found is not None) is same
    if found is not None:
        assert (found.temperature, found.top_p, found.max_tokens) == (0.7, 0.9, 8)


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("more", "same"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}, True),
        ({"structured_outputs": {"json": SCHEMA}}, True),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, True),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, False),
        ({"structured_outputs": {"json": SCHEMA | {"required": ["n"]}}}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({}, False),
    ],
)
def test_a_schema_is_calibrated_where_the_policy_names_it(more: dict[str, Any], same: bool) -> None:
    policy = Policy(conversations=Conversations(template_arguments={"structured_outputs": {"json": SCHEMA}}))
    asked = ChatCompletionRequest(
        model="m", messages=[{"role": "user", "content": "a"}], temperature=0, **more
    )
    params = asked.to_sampling_params(policy.max_tokens, {})
    engine: Any = SimpleNamespace(max_model_len=64, params=partial(VLLMEngine.params, None))  # type: ignore[arg-type]
    sampling = _as_sampling(engine, params)
    assert sampling is not None
    assert policy.draws(sampling) is same


def test_nothing_is_asked_for_that_nobody_judges() -> None:
    client = CapturingClient(SimpleNamespace(llm=SimpleNamespace(generate=lambda *_: "asked")))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="not said who judges"):
        client.generate({}, SamplingParams(), "r")  # type: ignore[typeddict-item]
    with judged_by(None):
        assert client.generate({}, SamplingParams(), "r") == "asked"  # type: ignore[typeddict-item, comparison-overlap]


def plain(messages: list[Any], tools: list[Any] | None = None, **more: Any) -> Any:
    request = ChatCompletionRequest(model="m", messages=messages, **more)
    renderer: Any = SimpleNamespace(use_harmony=False)
    return _plain(renderer, request, request.messages, tools)


def test_plain_conversations_are_rendered_here() -> None:
    turns, arguments = plain([{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}])
    assert turns == [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert arguments is None
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain([{"role": "user", "content": parts}])[0] == [{"role": "user", "content": "a\nb"}]


def test_tools_are_an_argument_of_the_template_that_a_policy_may_name() -> None:
    as_vllm_has_them = [TOOL | {"function": TOOL["function"] | {"description": None, "strict": None}}]  # type: ignore[operator]
    turns, arguments = plain([{"role": "user", "content": "b"}], as_vllm_has_them)
    with_tools = Conversations(template_arguments={"tools": [TOOL]})
    assert with_tools.resolve(turns, arguments).departure is None
    assert Conversations().resolve(turns, arguments).departure is not None


@pytest.mark.parametrize(
    ("messages", "more"),
    [
        ([{"role": "tool", "tool_call_id": "c", "content": "x"}], {}),
        ([{"role": "user", "content": "a"}], {"documents": [{"title": "t", "text": "x"}]}),
        ([{"role": "user", "content": "a"}], {"reasoning_effort": "low"}),
        ([{"role": "user", "content": "a"}], {"add_generation_prompt": False}),
        ([{"role": "user", "content": "a"}], {"truncate_prompt_tokens": 3}),
        ([{"role": "user", "content": "a"}], {"echo": True}),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}], {}),
    ],
)
def test_what_a_plain_conversation_cannot_say_is_vllms(messages: list[Any], more: dict[str, Any]) -> None:
    assert plain(messages, **more) is None
