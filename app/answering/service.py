"""The path of one answer: generate, judge, decide.

    AnswerRequest -> for each choice: Engine.generate -> prompt states -> Scorer.judge_prompt   once prefill ends
                                                         Piece ...                              while it is written
                                                         hidden state -> Scorer.judge -> Answer once, at its end

In mode abstain, a prompt that no answer can be let through for ends at prefill: nothing of it is written.
Closing the iterator of `events` cancels the work that the engine still does for it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing, closing, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter

from opentelemetry.trace import Tracer

from candor.app.answering.escalation import Escalated, Escalation, UpstreamQuestion
from candor.app.answering.request import AnswerRequest, Choice, PairRequest, Reliability, Replacement
from candor.app.answering.scoring import Judged, JudgedPrompt, Scorer, ScoringFailed, ScoringRequest
from candor.app.answering.waiting import EngineWatch
from candor.app.edge.limits import Admission
from candor.app.telemetry.metrics import Metrics
from candor.app.telemetry.tracing import AnswerTrace
from candor.engine.base import (
    Delta,
    Engine,
    EngineDead,
    EngineError,
    Generation,
    HiddenSummary,
    PromptStates,
    PromptTooLong,
    TokenLogprob,
)
from candor.engine.merging import merged
from candor.policy.decision import unavailable
from candor.policy.policy import Policy

logger = logging.getLogger("candor")

SET_OFF = "\n\n"
"""Separates an answer that was streamed already from the text that retracts it."""


@dataclass(frozen=True)
class Piece:
    """A part of the text of the choice `index`, sent as soon as the engine gives it."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Answer:
    """A finished choice. judged: None in mode off. replacement: shown to the client if the answer is withheld.

    attempts: number of answers written; this is the last. discarded_tokens: completion tokens of the earlier ones.
    unwritten: its prompt was refused when prefill ended. escalated: what the client gets in place of it; then
    replacement is None.
    """

    index: int
    generation: Generation
    judged: Judged | None
    replacement: Replacement | None
    attempts: int = 1
    discarded_tokens: int = 0
    unwritten: bool = False
    escalated: Escalated | None = None

    @property
    def completion_tokens(self) -> int:
        """Completion tokens of all attempts."""
        return self.generation.completion_tokens + self.discarded_tokens


class AnswerService:
    """Answers requests. Raises Overloaded, PromptTooLong, EngineDead or EngineError from its iterators.

    tracer: None if tracing is off. escalation: None if there is no other model to ask.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        scorer: Scorer,
        admission: Admission,
        metrics: Metrics,
        watch: EngineWatch,
        tracer: Tracer | None = None,
        escalation: Escalation | None = None,
    ) -> None:
        self._escalation = escalation
        self.engine = engine
        self.policy = policy
        self._scorer = scorer
        self._admission = admission
        self._metrics = metrics
        self._watch = watch
        self._tracer = tracer

    @property
    def judges_prompts(self) -> bool:
        """Whether verdicts need the prompt's states."""
        return self._scorer.gates is not None

    async def events(self, request: AnswerRequest) -> AsyncGenerator[Piece | Answer, None]:
        """Yields the pieces of all choices as they arrive, and each choice's Answer when it is finished."""
        with self._admission.admit(request.caller, len(request.choices), request.tokens):
            choices = [self._choice(index, choice, request) for index, choice in enumerate(request.choices)]
            async with aclosing(merged(choices)) as events:
                async for event in events:
                    yield event

    async def answers(self, request: AnswerRequest) -> list[Answer]:
        """Returns all finished choices in index order."""
        async with aclosing(self.events(request)) as events:
            found = [event async for event in events if isinstance(event, Answer)]
        return sorted(found, key=lambda answer: answer.index)

    async def judge_pair(self, request: PairRequest) -> Judged:
        """Returns the verdict on a given response."""
        with self._admission.admit(request.caller, 1, request.tokens):
            hidden: HiddenSummary | None = None
            prompt: PromptStates | None = None
            try:
                with self._watch.waiting():
                    hidden = await self.engine.summarise(request.prompt_ids, request.response_ids)
                    if self.judges_prompts:
                        prompt = await self.engine.prompt_states(request.prompt_ids)
            except (EngineDead, PromptTooLong):
                raise
            except EngineError as error:
                logger.warning("no hidden state for a given pair: %s", error)
            return await self._judge(hidden, prompt, request, calibrated=request.calibrated)

    def traced(self, index: int) -> AbstractContextManager[AnswerTrace | None]:
        """Returns the span of an attempt at a choice, as a context; of None if tracing is off."""
        return closing(AnswerTrace(self._tracer, index)) if self._tracer else nullcontext()

    async def _choice(
        self, index: int, choice: Choice, request: AnswerRequest
    ) -> AsyncGenerator[Piece | Answer, None]:
        """Writes attempts as the policy says. With several, it yields only the first reliable one, or the last."""
        answer: Answer | None = None
        discarded = 0
        held = request.attempts > 1 or (request.reliability.buffered and request.reliability.escalates)
        for number in range(request.attempts):
            discarded += answer.generation.completion_tokens if answer else 0
            async with aclosing(self._attempt(index, choice.attempt(number), request)) as events:
                async for event in events:
                    if isinstance(event, Answer):
                        answer = replace(event, attempts=number + 1, discarded_tokens=discarded)
                    elif not held:
                        yield event
            if answer and answer.judged and (answer.judged.verdict.settles or answer.judged.verdict.final):
                break
        assert answer is not None  # every attempt yields an answer or raises
        self.count(answer)
        if held and answer.replacement is None:
            yield Piece(index, answer.generation.text, answer.generation.logprobs)
        if answer.replacement is not None and request.reliability.escalates:
            sent = bool(answer.generation.text) and not held
            async with aclosing(self._escalated(answer, choice, request, SET_OFF if sent else "")) as events:
                async for event in events:
                    yield event
            return
        yield answer

    async def _escalated(
        self, answer: Answer, choice: Choice, request: AnswerRequest, before: str
    ) -> AsyncGenerator[Piece | Answer, None]:
        """Yields the other model's answer in pieces, then the answer as the client gets it. before: its first one."""
        assert self._escalation is not None  # the resolver refuses such a request without
        question = UpstreamQuestion(
            choice.asked,
            len(choice.prompt_ids),
            choice.sampling.max_tokens,
            request.reliability.alpha,
            request.calibrated,
            request.reliability.certified_only,
            request.streamed,
            request.caller,
            request.deadline,
        )
        async with aclosing(self._escalation.pieces(question)) as pieces:
            async for piece in pieces:
                if isinstance(piece, str):
                    yield Piece(answer.index, before + piece, ())
                    before = ""
                else:
                    answer = replace(answer, replacement=None, escalated=piece)
        yield answer

    async def _attempt(
        self, index: int, choice: Choice, request: AnswerRequest
    ) -> AsyncGenerator[Piece | Answer, None]:
        reliability = request.reliability
        judges = reliability.mode != "off"
        with self.traced(index) as trace:
            outputs = self._watch.watched(
                self.engine.generate(
                    choice.prompt_ids,
                    choice.sampling,
                    capture=judges,
                    prompt_states=judges and self.judges_prompts,
                )
            )
            generation: Generation | None = None
            read: JudgedPrompt | None = None
            async with aclosing(outputs):
                async for output in outputs:
                    if isinstance(output, Generation):
                        generation = output
                    elif isinstance(output, PromptStates):
                        read = await self.read(output, request.reliability, calibrated=request.calibrated)
                        if read is not None and read.refusal is not None:
                            generation = unwritten(len(choice.prompt_ids), output)
                            break
                    elif isinstance(output, Delta):
                        yield Piece(index, output.text, output.logprobs)
            if generation is None:
                raise EngineError("the engine ended without an answer")
            if trace:
                trace.generated(generation)
            if read is not None and read.refusal is not None:
                if trace:
                    trace.judged(read.refusal)
                yield Answer(index, generation, Judged(read.refusal), reliability.replacement, unwritten=True)
                return
            if not judges:
                yield Answer(index, generation, None, None)
                return
            judged = await self.judged(generation, reliability, calibrated=request.calibrated, read=read)
            if trace:
                trace.judged(judged.verdict)
            yield Answer(
                index, generation, judged, reliability.replacement if judged.verdict.abstained else None
            )

    async def read(
        self, prompt: PromptStates, reliability: Reliability, *, calibrated: bool
    ) -> JudgedPrompt | None:
        """Judges a prompt whose answer may have to be withheld; None where it isn't, or cannot be judged now."""
        if reliability.mode != "abstain":
            return None
        return await self._scorer.judge_prompt(prompt, reliability.alpha, calibrated=calibrated)

    async def judged(
        self,
        generation: Generation,
        reliability: Reliability,
        *,
        calibrated: bool,
        read: JudgedPrompt | None = None,
    ) -> Judged:
        """Returns the verdict on a finished answer. calibrated: whether its request kept to the policy. read: what
        `read` found of its prompt."""
        complete = self.policy.completed(generation.completion_tokens, ended=not generation.truncated)
        return await self._judge(
            generation.hidden, generation.prompt, reliability, calibrated=calibrated and complete, read=read
        )

    def count(self, answer: Answer) -> None:
        """Counts the verdict on an answer, and what was saved where it was not written."""
        if answer.judged is not None:
            self._metrics.count(answer.judged.verdict)
        if answer.unwritten:
            self._metrics.saved()

    async def _judge(
        self,
        hidden: HiddenSummary | None,
        prompt: PromptStates | None,
        asked: Reliability | PairRequest,
        *,
        calibrated: bool,
        read: JudgedPrompt | None = None,
    ) -> Judged:
        started = perf_counter()
        wanted = ScoringRequest(
            hidden,
            asked.alpha,
            calibrated,
            asked.certified_only,
            asked.exemplars,
            prompt,
            read.seen if read else None,
        )
        try:
            judged = await self._scorer.judge(wanted)
        except ScoringFailed as error:
            logger.warning("an answer could not be scored: %s", error)
            self._metrics.scoring_failed(error.cause)
            return Judged(unavailable(asked.alpha, calibrated=calibrated))
        self._metrics.scored(perf_counter() - started)
        return judged


def unwritten(prompt_tokens: int, prompt: PromptStates) -> Generation:
    """Returns the empty answer to a prompt that was refused when prefill ended."""
    return Generation(
        text="",
        token_ids=(),
        finish_reason="stop",
        tagged=False,
        truncated=False,
        hidden=None,
        prompt_tokens=prompt_tokens,
        completion_tokens=0,
        prompt=prompt,
    )
