"""One answer's path: generate, score, decide.

    Order -> for each choice: Engine.generate -> Piece ...            while it is written
                              hidden state -> Scorer.score -> Reading
                              policy.decide -> Verdict -> Answer       once, at its end

Closing the iterator of `events` cancels what the engine still does for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TypeVar

from opentelemetry.trace import Tracer

from candor.app.answering.orders import Job, Order, PairOrder, Replacement
from candor.app.answering.scoring import Score, Scorer, ScoringFailed
from candor.app.answering.watch import EngineWatch
from candor.app.edge.limits import Admission
from candor.app.policy import EstimatorKind, decide, ended_as_calibrated
from candor.app.telemetry.metrics import Metrics
from candor.app.telemetry.tracing import NO_TRACER, AnswerTrace
from candor.app.writing.verdict import Verdict
from candor.engine.base import (
    Engine,
    EngineDead,
    EngineError,
    Generation,
    HiddenSummary,
    PromptTooLong,
    TokenLogprob,
)
from candor.model_store.bundle import Bundle

logger = logging.getLogger("candor")
T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Some of the text of the choice `index`, as it comes."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Answer:
    """A finished choice. verdict: None in mode off. replacement: shown instead where it is withheld.

    discarded_tokens: of attempts before this one, where the policy resamples.
    """

    index: int
    generation: Generation
    verdict: Verdict | None
    replacement: Replacement | None
    discarded_tokens: int = 0

    @property
    def completion_tokens(self) -> int:
        """What it cost."""
        return self.generation.completion_tokens + self.discarded_tokens


class AnswerService:
    """Answers orders. Raises Overloaded, PromptTooLong, EngineDead or EngineError from its iterators."""

    def __init__(
        self,
        engine: Engine,
        bundle: Bundle,
        scorer: Scorer,
        admission: Admission,
        metrics: Metrics,
        watch: EngineWatch,
        estimator: EstimatorKind,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._engine = engine
        self._exemplars = bundle.exemplars
        self._policy = bundle.manifest.policy
        self._certificate = bundle.manifest.certificate
        self._scorer = scorer
        self._admission = admission
        self._metrics = metrics
        self._watch = watch
        self._estimator = estimator
        self._tracer = tracer

    async def events(self, order: Order) -> AsyncGenerator[Piece | Answer, None]:
        """Pieces of all choices as they come, and each choice's Answer at its end."""
        with self._admission.admit(len(order.jobs), order.tokens):
            choices = [self._choice(index, job, order) for index, job in enumerate(order.jobs)]
            async with aclosing(merged(choices)) as events:
                async for event in events:
                    yield event

    async def answers(self, order: Order) -> list[Answer]:
        """All choices, finished, in index order."""
        async with aclosing(self.events(order)) as events:
            found = [event async for event in events if isinstance(event, Answer)]
        return sorted(found, key=lambda answer: answer.index)

    async def score_pair(self, order: PairOrder) -> Verdict:
        """The verdict on a given response."""
        with self._admission.admit(1, order.tokens):
            try:
                with self._watch.waiting():
                    hidden = await self._engine.summarise(order.prompt_ids, order.response_ids)
            except (EngineDead, PromptTooLong):
                raise
            except EngineError as error:
                logger.warning("no hidden state for a given pair: %s", error)
                hidden = None
            return await self._judge(
                hidden, order.alpha, order.exemplars, order.certified, calibrated=order.calibrated
            )

    async def _choice(self, index: int, job: Job, order: Order) -> AsyncGenerator[Piece | Answer, None]:
        """By the policy: of several attempts nothing is told until one is reliable, or the last is written."""
        answer: Answer | None = None
        discarded = 0
        for number in range(order.attempts):
            discarded += answer.generation.completion_tokens if answer else 0
            async with aclosing(self._attempt(index, job.attempt(number), order)) as events:
                async for event in events:
                    if isinstance(event, Answer):
                        answer = event
                    elif order.attempts == 1:
                        yield event
            if answer and answer.verdict and answer.verdict.decision.settles:
                break
        assert answer is not None  # an attempt ends with its answer, or raises
        if answer.verdict is not None:
            verdict = replace(answer.verdict, attempts=number + 1)
            self._metrics.count(verdict)
            answer = replace(answer, verdict=verdict)
        if order.attempts > 1:
            yield Piece(index, answer.generation.text, answer.generation.logprobs)
        yield replace(answer, discarded_tokens=discarded)

    async def _attempt(self, index: int, job: Job, order: Order) -> AsyncGenerator[Piece | Answer, None]:
        options = order.options
        with closing(AnswerTrace(self._tracer, index)) as trace:
            outputs = self._watch.heard(
                self._engine.generate(job.prompt_ids, job.sampling, capture=options.mode != "off")
            )
            generation: Generation | None = None
            async with aclosing(outputs):
                async for output in outputs:
                    if isinstance(output, Generation):
                        generation = output
                    else:
                        yield Piece(index, output.text, output.logprobs)
            if generation is None:
                raise EngineError("the engine ended without an answer")
            trace.generated(generation)
            if options.mode == "off":
                yield Answer(index, generation, None, None)
                return
            calibrated = order.calibrated and ended_as_calibrated(self._policy, generation)
            verdict = await self._judge(
                generation.hidden, options.alpha, options.exemplars, options.certified, calibrated=calibrated
            )
            trace.judged(verdict)
            yield Answer(
                index, generation, verdict, options.replacement if verdict.decision.abstained else None
            )

    async def _judge(
        self, hidden: HiddenSummary | None, alpha: float, exemplars: int, certified: bool, *, calibrated: bool
    ) -> Verdict:
        score: Score | None = None
        started = perf_counter()
        try:
            score = await self._scorer.score(hidden, alpha, exemplars)
        except ScoringFailed as error:
            logger.warning("an answer could not be scored: %s", error)
            self._metrics.scoring_failed(error.cause)
        else:
            self._metrics.scored(perf_counter() - started)
        reading = score.reading if score else None
        neighbours = score.neighbours if score else ()
        return Verdict(
            decision=decide(
                reading,
                calibrated=calibrated,
                estimator=self._estimator,
                certificate=self._certificate(alpha, self._estimator),
                certified_only=certified,
            ),
            reading=reading,
            calibrated=calibrated,
            alpha=alpha,
            exemplars=tuple((self._exemplars[neighbour.row], neighbour) for neighbour in neighbours),
        )


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of all sources as they come; the first error of one ends all. Closes what it was given."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for item in source:
                yield item
        return
    queue: asyncio.Queue[tuple[T] | Exception | None] = asyncio.Queue()  # None: a source's end

    async def drain(source: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(source):
                async for item in source:
                    queue.put_nowait((item,))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(drain(source)) for source in sources]
    running = len(tasks)
    try:
        while running:
            match await queue.get():
                case None:
                    running -= 1
                case Exception() as error:
                    raise error
                case (item,):
                    yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
