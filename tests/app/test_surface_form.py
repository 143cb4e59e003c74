"""What vLLM's handlers are asked for where a request leaves the form of its answer open."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from candor.app.edge.routes.surface import Surface, _fill_in_form
from candor.engine.base import EngineError, RequestRefused
from candor.policy.conversation import Conversations

HELD = {"regex": "yes|no"}


@pytest.mark.parametrize("kind", ["chat", "batch", "responses"])
def test_the_calibrated_form_is_filled_in(kind: Any) -> None:
    body: dict[str, Any] = {}
    _fill_in_form(
        kind, body, Conversations(template_arguments={"structured_outputs": HELD, "thinking": True})
    )
    assert body == {"structured_outputs": HELD, "chat_template_kwargs": {"thinking": True}}


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "text"}},
        {"structured_outputs": {"regex": "a"}},
        {"tools": [{}]},
        {"text": {"format": {"type": "json_object"}}},
    ],
)
def test_what_a_request_says_of_it_stays(body: dict[str, Any]) -> None:
    asked = dict(body) | {"chat_template_kwargs": {}}
    _fill_in_form(
        "chat", asked, Conversations(template_arguments={"structured_outputs": HELD, "thinking": True})
    )
    assert asked == body | {"chat_template_kwargs": {}}


def test_plain_prompts_and_uncalibrated_forms_are_left_alone() -> None:
    body: dict[str, Any] = {}
    _fill_in_form("completion", body, Conversations(template_arguments={"structured_outputs": HELD}))
    _fill_in_form("chat", body, Conversations())
    assert body == {}


@pytest.mark.parametrize(("finished", "error"), [([], RequestRefused), (["an answer"], EngineError)])
def test_an_answer_that_a_form_cannot_hold_is_no_fault_of_the_request(
    finished: list[str], error: type[Exception]
) -> None:
    """The Messages API takes a tool's arguments as an object, and the model may have written a text."""

    async def call(*_: Any) -> Any:
        raise RequestRefused("1 validation error for AnthropicContentBlock", 400)

    surface: Any = Surface.__new__(Surface)
    surface.handlers, surface._judged_by = SimpleNamespace(call=call), lambda _: nullcontext()
    with pytest.raises(EngineError) as found:
        asyncio.run(surface.call("messages", None, SimpleNamespace(finished=finished)))
    assert type(found.value) is error
