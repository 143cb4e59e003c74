"""An engine client for vLLM's own request handlers that takes the hidden states of whatever they have written.

vLLM's handlers render a request, call `generate` of their engine client, and write the response from its outputs.
Here `generate` gives them what the client of the server may see:

    vLLM's outputs -> without the tag, its tokens and their log-probabilities -> judged at the end -> the handler

So tools, structured outputs, reasoning and every form of response work as in vLLM, and none of their parsers sees a
tag. Who judges (`Judge`) is set for the handler's call by `judged_by`. Where answers are buffered, the handler gets
nothing until all choices are decided; a withheld one is empty.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import fields, replace
from typing import Any, Protocol, TypeVar

from vllm.inputs import EngineInput
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from candor.engine.base import Delta, EngineError, Generation, PromptStates, Sampling
from candor.engine.merging import merged
from candor.engine.vllm_engine import VLLMEngine

T = TypeVar("T")

_REPORTED = frozenset(
    [
        "n",
        "seed",
        "logprobs",
        "prompt_logprobs",
        "prompt_logprob_token_ids",
        "prompt_logprob_start",
        "logprob_token_ids",
        "flat_logprobs",
        "output_kind",
        "stream_interval",
        "skip_clone",
        "skip_reading_prefix_cache",
        "output_text_buffer_length",
        "extra_args",
        "max_tokens",
        "stop",
        "structured_outputs",  # told by `_as_grammar`
        "skip_special_tokens",
        "spaces_between_special_tokens",
    ]
)
"""Fields of SamplingParams that do not change the distribution of an answer's tokens, and those whose effect shows in
the answer: `Policy.completed` looks at where it ends."""


class Judge(Protocol):
    """Judges the answers of one request.

    capture: whether answers are judged at all. prompt_states: whether the prompt is judged too, before its answer.
    buffered: whether nothing is shown before it is decided. failure: what went wrong here, for whoever reads only
    what vLLM's handler makes of it.
    """

    engine: VLLMEngine
    capture: bool
    prompt_states: bool
    buffered: bool
    failure: Exception | None

    def begin(self, choices: int, prompt_tokens: int) -> int:
        """Returns the index of the first of so many further choices. Raises RequestRefused for a prompt too long."""
        ...

    def choice(self, index: int) -> AbstractContextManager[None]:
        """Returns a context around the writing of an answer."""
        ...

    async def refuses(self, index: int, prompt: PromptStates, asked: Asked) -> bool:
        """Returns whether nothing is to be written for this prompt."""
        ...

    async def withholds(self, index: int, generation: Generation, asked: Asked) -> bool:
        """Judges a finished answer; returns whether it is withheld."""
        ...


class Asked:
    """What vLLM is asked for one choice. sampling: the same in this house's terms, or None if that cannot say it."""

    def __init__(self, engine: VLLMEngine, prompt_ids: Sequence[int], params: SamplingParams | None) -> None:
        """params: None for what SamplingParams cannot say."""
        self.prompt_ids = tuple(prompt_ids)
        self.sampling = None if params is None else _as_sampling(engine, params)


_judge: ContextVar[Judge | None] = ContextVar("judge")


@contextmanager
def judged_by(judge: Judge | None) -> Iterator[None]:
    """What handlers ask for meanwhile is judged by it; None: by nobody, as vLLM answers."""
    token = _judge.set(judge)
    try:
        yield
    finally:
        _judge.reset(token)


def current_judge() -> Judge | None:
    """Returns who judges what is asked for now. Raises EngineError where that was not said: nothing leaves unjudged
    because a handler of vLLM's asks at another time than expected."""
    try:
        return _judge.get()
    except LookupError:
        raise EngineError("a handler asks for an answer, and it is not said who judges it") from None


async def read_within(judge: Judge | None, events: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Yields the events of a handler that may ask while they are read."""
    async with aclosing(events):
        while True:
            with judged_by(judge):
                try:
                    event = await anext(events)
                except StopAsyncIteration:
                    return
            yield event


class CapturingClient:
    """vLLM's `EngineClient` over an engine; all but `generate` is vLLM's own."""

    def __init__(self, engine: VLLMEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine.llm, name)

    def generate(
        self, prompt: EngineInput, sampling_params: SamplingParams, request_id: str, **how: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `EngineClient.generate`. The judge is that of the call, wherever the outputs are read."""
        judge = current_judge()
        if judge is None:
            generated: AsyncGenerator[RequestOutput, None] = self._engine.llm.generate(
                prompt, sampling_params, request_id, **how
            )
            return generated
        return _judged(judge, prompt, sampling_params, request_id, how)


async def _judged(
    judge: Judge, prompt: EngineInput, params: SamplingParams, request_id: str, how: Mapping[str, Any]
) -> AsyncGenerator[RequestOutput, None]:
    try:
        first = judge.begin(params.n, len(prompt["prompt_token_ids"]))
    except EngineError as error:
        judge.failure = error
        raise
    choices = [
        _choice(judge, first + number, number, prompt, _alone(params, number), request_id, dict(how))
        for number in range(params.n)
    ]
    whole = params.output_kind is RequestOutputKind.FINAL_ONLY
    if whole or judge.buffered:
        pieces = await asyncio.gather(*map(_listed, choices))
        if whole:
            yield _joined(request_id, [_whole(outputs) for outputs in pieces])
            return
        for outputs in pieces:
            for output in outputs:
                yield output
        return
    async with aclosing(merged(choices)) as outputs_as_they_come:
        async for output in outputs_as_they_come:
            yield output


async def _choice(
    judge: Judge,
    index: int,
    number: int,
    prompt: EngineInput,
    params: SamplingParams,
    request_id: str,
    how: dict[str, Any],
) -> AsyncGenerator[RequestOutput, None]:
    """Yields what may be shown of one choice. index: within the request; number: within this call of `generate`."""
    asked = Asked(judge.engine, prompt["prompt_token_ids"], params)
    shown = _Shown(number)
    how.pop("lora_request", None)  # the engine has it
    generation: Generation | None = None
    written = judge.engine.write(
        prompt,
        params,
        capture=judge.capture,
        prompt_states=judge.prompt_states,
        tagged=params.structured_outputs is None,
        seen=shown.see,
        **how,
    )
    held: list[RequestOutput] = []
    with judge.choice(index):
        try:
            async with aclosing(written) as pieces:
                async for piece in pieces:
                    if isinstance(piece, PromptStates):
                        if await judge.refuses(index, piece, asked):
                            yield shown.nothing()
                            return
                    elif isinstance(piece, Delta):
                        output = shown.piece(piece.text)
                        if judge.buffered:
                            held.append(output)
                        else:
                            yield output
                    else:
                        generation = piece
        except EngineError as error:
            if isinstance(error.__cause__, ValueError):  # vLLM says what is wrong with the request
                raise error.__cause__ from error
            judge.failure = error
            raise
        if generation is None:
            raise EngineError("the engine ended without an answer")
        if await judge.withholds(index, generation, asked) and judge.buffered:
            yield shown.nothing()
            return
        for output in held:
            yield output
        yield shown.last(generation)


class _Shown:
    """Gives vLLM's outputs, with their tokens and log-probabilities, as far as their text is shown."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._waiting: deque[CompletionOutput] = deque()
        self._lead = 0  # characters shown beyond those of the outputs given
        self._tokens = 0  # tokens given
        self._latest: RequestOutput | None = None
        self._prompt_logprobs: Any = None

    def see(self, output: RequestOutput) -> None:
        self._latest = output
        self._prompt_logprobs = self._prompt_logprobs or output.prompt_logprobs
        self._waiting.append(output.outputs[0])

    def piece(self, text: str) -> RequestOutput:
        return self._output(text, self._due(len(text)))

    def _due(self, characters: int) -> list[CompletionOutput]:
        """Returns the outputs all of whose text is shown with so many characters more."""
        self._lead += characters
        due = []
        while self._waiting and len(self._waiting[0].text) <= self._lead:
            due.append(self._waiting.popleft())
            self._lead -= len(due[-1].text)
        return due

    def last(self, generation: Generation) -> RequestOutput:
        """Returns the output that ends the choice: with the tokens still due, and none of the tag's."""
        assert self._latest is not None
        completion = self._latest.outputs[0]
        if generation.tagged:
            left = max(0, len(generation.token_ids) - self._tokens)
            return self._output("", list(self._waiting), "stop", most=left)
        return self._output("", self._due(0), completion.finish_reason, completion.stop_reason)

    def nothing(self) -> RequestOutput:
        """Returns the end of a choice of which nothing is shown."""
        if self._prompt_logprobs is not None:  # vLLM's handler puts them before an echoed prompt's answer
            self._prompt_logprobs = [None] * len(self._prompt_logprobs)
        return self._output("", [], "stop")

    def _output(
        self,
        text: str,
        parts: Sequence[CompletionOutput],
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
        most: int | None = None,
    ) -> RequestOutput:
        latest = self._latest
        assert latest is not None
        token_ids = [token for part in parts for token in part.token_ids][:most]
        logprobs = None
        if latest.outputs[0].logprobs is not None:
            logprobs = [entry for part in parts for entry in part.logprobs or ()][:most]
        self._tokens += len(token_ids)
        output = copy(latest)
        output.outputs = [
            replace(
                latest.outputs[0],
                index=self._index,
                text=text,
                token_ids=token_ids,
                logprobs=logprobs,
                finish_reason=finish_reason,
                stop_reason=stop_reason,
            )
        ]
        output.prompt_logprobs = self._prompt_logprobs
        output.finished = finish_reason is not None
        output.kv_transfer_params = None  # the states
        return output


def _alone(params: SamplingParams, number: int) -> SamplingParams:
    """Returns the parameters of one of `n` choices, whose seeds differ as vLLM's do."""
    params = params.clone()
    params.n = 1
    params.output_kind = RequestOutputKind.DELTA
    if params.seed is not None:
        params.seed += number
    return params


def _whole(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Returns one output with the text, tokens and log-probabilities of all."""
    last = outputs[-1]
    parts = [output.outputs[0] for output in outputs]
    joined = copy(last)
    joined.outputs = [
        replace(
            parts[-1],
            text="".join(part.text for part in parts),
            token_ids=[token for part in parts for token in part.token_ids],
            logprobs=None
            if parts[-1].logprobs is None
            else [entry for part in parts for entry in part.logprobs or ()],
        )
    ]
    return joined


def _joined(request_id: str, choices: Sequence[RequestOutput]) -> RequestOutput:
    whole = copy(choices[0])
    whole.request_id = request_id
    whole.outputs = [choice.outputs[0] for choice in choices]
    return whole


async def _listed(outputs: AsyncGenerator[RequestOutput, None]) -> list[RequestOutput]:
    async with aclosing(outputs):
        return [output async for output in outputs]


def _as_sampling(engine: VLLMEngine, params: SamplingParams) -> Sampling | None:
    """Returns the sampling that asks vLLM for the same distribution; None if another field departs from its default.

    So a field that vLLM adds later departs without a change here.
    """
    sampling = Sampling(
        max_tokens=params.max_tokens or engine.max_model_len,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        stop=tuple(params.stop or ()),
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        grammar=None if params.structured_outputs is None else _as_grammar(params.structured_outputs),
    )
    same = engine.params(sampling)
    compared = set(SamplingParams.__struct_fields__) - _REPORTED
    departs = any(getattr(same, name) != getattr(params, name) for name in compared)
    return None if departs else sampling


def _as_grammar(asked: StructuredOutputsParams) -> str:
    """Returns it as `Sampling.grammar`: what was asked for, and no default."""
    said = {one.name: getattr(asked, one.name) for one in fields(asked) if not one.name.startswith("_")}
    if isinstance(said["json"], str):
        said["json"] = json.loads(said["json"])
    return json.dumps(
        {name: value for name, value in said.items() if value not in (None, False)}, sort_keys=True
    )


async def judged_beams(
    search: Callable[..., AsyncGenerator[RequestOutput, None]], **how: Any
) -> AsyncGenerator[RequestOutput, None]:
    """Judges what vLLM's beam search (`search`) comes to; its steps are no answers."""
    judge = current_judge()
    with judged_by(None):
        found = [output async for output in search(**how)][-1]
    if judge is not None:
        prompt_ids = found.prompt_token_ids
        first = judge.begin(len(found.outputs), len(prompt_ids))
        states = await judge.engine.prompt_states(prompt_ids) if judge.prompt_states else None
        beams = [_judged_beam(judge, first + beam.index, prompt_ids, states, beam) for beam in found.outputs]
        found.outputs = await asyncio.gather(*beams)
    yield found


async def _judged_beam(
    judge: Judge, index: int, prompt_ids: list[int], states: PromptStates | None, beam: CompletionOutput
) -> CompletionOutput:
    with judge.choice(index):
        generation = await judge.engine.given(prompt_ids, beam, capture=judge.capture, states=states)
        withheld = await judge.withholds(index, generation, Asked(judge.engine, prompt_ids, None))
    beam = replace(beam, text=generation.text)
    if generation.tagged:
        kept = len(generation.token_ids)
        beam = replace(
            beam,
            token_ids=list(generation.token_ids),
            logprobs=(beam.logprobs or [])[:kept],
            finish_reason="stop",
        )
    if withheld:
        return replace(beam, text="", token_ids=[], logprobs=[], finish_reason="stop", stop_reason=None)
    return beam
