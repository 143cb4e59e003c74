"""An order's answers as an HTTP response: whole, buffered or streamed as they come.

A stream's status and headers are sent with its first token, so that what fails before it is an
ordinary error. What fails later is a last chunk with the error body, and no [DONE].
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from candor.app.answering.interruption import ClientGone, DeadlineExceeded, seconds_for, unless_interrupted
from candor.app.answering.orders import Order
from candor.app.answering.service import Answer, Piece
from candor.app.answering.watch import EngineWatch
from candor.app.edge.errors import describe
from candor.app.edge.services import Served, Services
from candor.app.feedback import GivenVerdict
from candor.app.writing.bodies import Renderer
from candor.engine.base import EngineError

logger = logging.getLogger("candor")

_STREAM = "text/event-stream"
_SET_OFF = "\n\n"
"""Between an answer that was streamed already and the text that takes it back."""


async def respond(
    request: Request,
    order: Order,
    renderer: Renderer,
    model: Served,
    services: Services,
    *,
    stream: bool,
) -> Response:
    """Raises what the service raises, Refused, TooFast, DeadlineExceeded or ClientGone."""
    service, watch, digest = model.service, services.watch, model.bundle.digest
    within_s = seconds_for(request, services.request_timeout_s)
    services.admission.check(len(order.jobs), order.tokens)  # first: who is not served is not charged
    services.token_rate.take(request.state.caller, order.tokens)

    def note(*answers: Answer) -> None:
        if services.feedback is not None:
            services.feedback.note(
                GivenVerdict(renderer.heading.id, answer.index, answer.verdict, digest)
                for answer in answers
                if answer.verdict
            )

    if stream and not order.options.buffered:
        chunks = _as_they_come(service.events(order), renderer, len(order.jobs), note)
        return EventStream(chunks, watch, within_s)
    answers = await unless_interrupted(service.answers(order), request.receive, watch, within_s)
    note(*answers)
    headers = verdict_headers(answers, digest)
    if stream:
        return Response(_buffered(answers, renderer), headers=headers, media_type=_STREAM)
    return Response(renderer.body(answers), headers=headers, media_type="application/json")


def verdict_headers(answers: Sequence[Answer], digest: str) -> Mapping[str, str]:
    """Comma-joined in index order; none in mode off."""
    decisions = [answer.verdict.decision for answer in answers if answer.verdict]
    if not decisions:
        return {}
    return {
        "x-sdm-region": ",".join(decision.region for decision in decisions),
        "x-sdm-abstained": ",".join(str(decision.abstained).lower() for decision in decisions),
        "x-sdm-bundle": digest,
    }


def _buffered(answers: Sequence[Answer], renderer: Renderer) -> bytes:
    """A stream of answers that are decided already."""
    chunks: list[bytes] = []
    for answer in answers:
        generation, instead = answer.generation, answer.replacement
        chunks.append(renderer.opening(answer.index, refused=instead is not None and instead.as_refusal))
        if instead:
            chunks.append(renderer.replacement(answer, separator=""))
        elif generation.text or generation.logprobs:
            chunks.append(renderer.piece(Piece(answer.index, generation.text, generation.logprobs)))
        chunks.append(renderer.finish(answer))
    return b"".join([*chunks, renderer.closing(answers)])


async def _as_they_come(
    events: AsyncGenerator[Piece | Answer, None],
    renderer: Renderer,
    choices: int,
    note: Callable[[Answer], None],
) -> AsyncGenerator[bytes, None]:
    answers: list[Answer] = []
    opening = b"".join(renderer.opening(index) for index in range(choices))
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Piece):
                chunk = renderer.piece(event) if event.text or event.logprobs else b""
            else:
                answers.append(event)
                note(event)
                chunk = renderer.replacement(event, _SET_OFF) + renderer.finish(event)
            yield opening + chunk
            opening = b""
    yield renderer.closing(sorted(answers, key=lambda answer: answer.index))


class EventStream(Response):
    """Server-sent events from an iterator, closed as soon as the client leaves, its time is up or the engine dies."""

    media_type = _STREAM

    def __init__(self, chunks: AsyncGenerator[bytes, None], watch: EngineWatch, within_s: float) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._watch = watch
        self._within_s = within_s
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_interrupted(self._send(send), receive, self._watch, self._within_s)
        except ClientGone:
            return
        except Exception as error:
            if not self._started:
                raise
            foreseen = isinstance(error, EngineError | DeadlineExceeded)
            logger.error("a stream broke off: %r", error, exc_info=None if foreseen else error)
            last = f"data: {describe(error).body.model_dump_json()}\n\n".encode()
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send(self, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                if not self._started:
                    self._started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
