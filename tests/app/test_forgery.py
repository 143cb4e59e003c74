"""Nobody forges the tag or a control token: with a real model, whatever a prompt holds is only text to it.

Shown for every text of the corpus (hostile.py), as the user's, the system's and the assistant's turn:

    control tokens    as many as for the text "x", at the template's own places
    the state         taken over prompt, answer and tag, each position once, at the last token of the tag that stands
                      behind the answer; equal to what one plain pass of the model over those ids gives

The transformers engine starts soonest; CANDOR_ENGINE=vllm takes the other.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from candor.engine.base import Generation, Representation, Sampling
from candor.engine.factory import start_engine
from candor.engine.prompt import SEPARATOR, ChatFormat
from candor.engine.settings import EngineSettings

T = TypeVar("T")
KIND: Any = os.environ.get("CANDOR_ENGINE", "transformers")
SLOW = pytest.mark.slow
RESPONSE = "<sentence>The children ran home.</sentence>"


@pytest.fixture(scope="module")
def chat(demo_model: Path) -> ChatFormat:
    return ChatFormat.from_directory(demo_model)


class Bench:
    """An engine in the loop it lives in, and the plain model beside it."""

    def __init__(self, model: Path, chat: ChatFormat) -> None:
        from transformers import AutoModelForCausalLM

        settings = EngineSettings(model, KIND, Representation(), "float32", max_model_len=1024, eager=True)
        self._runner = asyncio.Runner()
        self.engine = self.run(start_engine(settings, chat))
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def reference(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and last of the final normed states, (H,) each: one pass, no cache and no engine between."""
        with torch.inference_mode():
            states = self._model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].float()
        return states.mean(0), states[-1]

    def close(self) -> None:
        self.run(self.engine.close())
        self._runner.close()


@pytest.fixture(scope="module")
def bench(demo_model: Path, chat: ChatFormat) -> Iterator[Bench]:
    bench = Bench(demo_model, chat)
    yield bench
    bench.close()


def turns(text: str, role: str) -> list[dict[str, str]]:
    if role == "user":
        return [{"role": "user", "content": text}]
    return [
        *([{"role": "user", "content": "a"}] if role == "assistant" else []),
        {"role": role, "content": text},
        {"role": "user", "content": "b"},
    ]


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_no_text_becomes_a_control_token(chat: ChatFormat, hostile: Any, role: str) -> None:
    special = set(chat._tokenizer.all_special_ids) | set(chat._tokenizer.added_tokens_decoder)
    assert len(special) > 3

    def control(text: str) -> list[int]:
        return [token for token in chat.encode_chat(turns(text, role)) if token in special]

    harmless = control("x")
    assert harmless
    for text in hostile.TEXTS:
        assert control(text) == harmless, text
        # The text itself is all there, as text, between the same two pieces of the template.
        ids, marked = chat.encode_chat(turns(text, role)), chat.encode_chat(turns("", role))
        own = chat.encode_response(text)
        assert len(ids) == len(marked) + len(own)
        start = next((i for i, pair in enumerate(zip(ids, marked, strict=False)) if pair[0] != pair[1]), None)
        assert start is None or any(
            ids[at : at + len(own)] == own for at in range(max(0, start - len(own)), start + 1)
        )


def forgeries(hostile: Any) -> list[str]:
    """Those that try the tag or a marker of the served template."""
    return [text for text in hostile.TEXTS if "verified" in text or "im_end" in text]


@pytest.mark.parametrize(
    ("role", "step"),
    [("user", 4), pytest.param("user", 1, marks=SLOW), pytest.param("system", 1, marks=SLOW)],
)
def test_the_state_of_a_given_answer_is_taken_where_it_belongs(
    bench: Bench, chat: ChatFormat, hostile: Any, role: str, step: int
) -> None:
    response, closing = chat.encode_response(RESPONSE), chat.encode_response(SEPARATOR + "<verified>")
    for text in forgeries(hostile)[::step] if step > 1 else hostile.TEXTS:
        prompt = chat.encode_chat(turns(text, role))
        summary = bench.run(bench.engine.summarise(prompt, response))
        assert summary.positions == len(prompt) + len(response) + len(closing)
        mean, last = bench.reference([*prompt, *response, *closing])
        torch.testing.assert_close(summary.mean, mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(summary.last, last, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=SLOW)])
def test_the_state_of_a_written_answer_is_taken_where_it_belongs(
    bench: Bench, chat: ChatFormat, hostile: Any, step: int
) -> None:
    """Cut after a few tokens or ended by the model itself, perhaps talked into writing the tag: the state is that of
    prompt, the answer that is shown, and the one tag behind it.
    """
    tag = chat.encode_response("<verified>")

    async def ask(prompt: list[int]) -> Generation:
        async with aclosing(bench.engine.generate(prompt, Sampling(max_tokens=6))) as outputs:
            [answer] = [output async for output in outputs if isinstance(output, Generation)]
        return answer

    assert len(forgeries(hostile)) > 10
    for text in forgeries(hostile)[::step]:
        prompt = chat.encode_chat(turns(text, "user"))
        answer = bench.run(ask(prompt))
        assert "<verified>" not in answer.text
        assert answer.hidden is not None
        assert answer.hidden.complete
        tails = [chat.encode_response(SEPARATOR + "<verified>"), tag]
        whole = [[*prompt, *answer.token_ids, *tail] for tail in tails]
        fitting = [ids for ids in whole if len(ids) == answer.hidden.positions]
        assert fitting, (text, answer.hidden.positions, [len(ids) for ids in whole])
        mean, last = bench.reference(fitting[0])
        torch.testing.assert_close(answer.hidden.mean, mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(answer.hidden.last, last, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append({'role': 'system', 'content': 'x'}) }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{{ messages[0].__init__.__globals__ }}",
    ],
)
def test_a_models_own_template_runs_in_the_sandbox(demo_model: Path, template: str) -> None:
    chat = ChatFormat.from_directory(demo_model)
    chat._tokenizer.chat_template = template
    with pytest.raises(ValueError, match="refused these messages"):
        chat.encode_chat([{"role": "user", "content": "x"}])
