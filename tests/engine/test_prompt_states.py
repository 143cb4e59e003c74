"""A prompt's states where the first report of them does not hold, on a stand-in for vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.inputs.engine import tokens_input

from candor.engine.base import EngineError, PromptStates, Representation
from candor.engine.vllm_engine import VLLMEngine
from candor.engine.vllm_scheduler import KEY, PROMPT_KEY

PROMPT = [3, 1, 4]


class Reporting(VLLMEngine):
    """Each request's record of the prompt counts all positions or not, in this order; None: there is no record."""

    def __init__(self, *complete: bool | None) -> None:
        self.representation, self.max_model_len, self._tag_ids = Representation(), 64, [1]
        self.complete = list(complete)
        self.asked: list[tuple[bool, bool | None]] = []

    def output(self) -> Any:
        number, complete = len(self.complete), self.complete.pop(0)
        half = torch.full((2,), float(number)).numpy().tobytes()
        record = None if complete is None else {PROMPT_KEY: [3, complete, half, half, b""]}
        return SimpleNamespace(kv_transfer_params=record)

    async def _submit(self, prompt: Any, params: Any) -> AsyncGenerator[Any, None]:
        assert (prompt["prompt_token_ids"], params.max_tokens) == (PROMPT, 1)
        self.asked.append((params.extra_args[KEY]["prompt"], params.skip_reading_prefix_cache))
        if not self.complete:
            raise EngineError("vLLM could not answer")
        yield self.output()


def first(engine: Reporting) -> PromptStates | None:
    return asyncio.run(engine._prompt(tokens_input(PROMPT), engine.output()))


def test_what_was_counted_whole_costs_nothing_more() -> None:
    engine = Reporting(True, True)
    states = first(engine)
    assert states is not None
    assert states.vector().tolist() == [2.0] * 4
    assert engine.asked == []


@pytest.mark.parametrize("reported", [False, None])
def test_what_was_not_is_asked_for_again_and_at_last_past_the_cache(reported: bool | None) -> None:
    engine = Reporting(reported, False, True)
    states = first(engine)
    assert states is not None
    assert (states.complete, states.mean.tolist()) == (True, [1.0, 1.0])
    assert engine.asked == [(True, False), (True, True)]


def test_what_never_is_says_so() -> None:
    states = first(Reporting(False, False, False))
    assert states is not None
    assert not states.complete


def test_an_answer_is_given_though_they_could_not_be_taken(caplog: pytest.LogCaptureFixture) -> None:
    assert first(Reporting(False)) is None
    assert "no hidden state for a prompt" in caplog.text
    with pytest.raises(EngineError, match="returned no hidden state"):
        asyncio.run(Reporting(None, None).prompt_states(PROMPT))
