"""`POST /v1/chat/completions` and `/v1/completions`: answers as one body, a buffered stream or a live stream.

A stream sends its status and headers with its first token, so a failure before that is an ordinary error response.
A later failure sends a last chunk with the error body, and no [DONE].
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from fastapi import APIRouter, Request, Response
from starlette.background import BackgroundTask
from starlette.types import Receive, Scope, Send

from candor.app.answering.request import Reliability
from candor.app.answering.scoring import ScoringRequest
from candor.app.answering.service import SET_OFF, Answer, Piece
from candor.app.answering.shadow import Sent
from candor.app.answering.waiting import (
    ClientGone,
    Deadline,
    EngineWatch,
    seconds_for,
    unless_interrupted,
)
from candor.app.edge.errors import broke_off, describe
from candor.app.edge.parsing import BoundedRoute
from candor.app.edge.routes.documented import ERRORS, STREAMED
from candor.app.edge.routes.either import answered, either, json_object
from candor.app.edge.schemas.requests import ChatCompletionRequest, CompletionRequest
from candor.app.edge.schemas.responses import ChatCompletion, Completion
from candor.app.edge.services import PIN, InjectedServices, ServedModel, Services
from candor.app.store.records import Content, GivenVerdict
from candor.app.telemetry.audit import audited
from candor.app.writing.bodies import ChatRenderer, CompletionRenderer, Envelope, Renderer
from candor.engine.base import Representation

router = APIRouter(route_class=BoundedRoute)
_chat = APIRouter(route_class=either("chat", ChatCompletionRequest))
_plain = APIRouter(route_class=either("completion", CompletionRequest))

_STREAM = "text/event-stream"


@_chat.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS | STREAMED)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, services: InjectedServices
) -> Response:
    """An answer to a conversation, with its reliability."""
    return await _respond(request, body, services, ChatRenderer)


@_plain.post("/v1/completions", response_model=Completion, responses=ERRORS | STREAMED)
async def create_completion(
    body: CompletionRequest, request: Request, services: InjectedServices
) -> Response:
    """A plain prompt, continued. It leaves the chat format, so its reliability is never calibrated."""
    return await _respond(request, body, services, CompletionRenderer)


@router.post("/invocations", response_model=None, responses=ERRORS | STREAMED)
async def invoke(request: Request, services: InjectedServices) -> Response:
    """SageMaker's one route: a conversation or a plain prompt, as the body has `messages` or not."""
    body = await json_object(request)
    body.setdefault("model", services.model().name)
    if "messages" in body:
        return await answered("chat", ChatCompletionRequest, create_chat_completion, body, request, services)
    return await answered("completion", CompletionRequest, create_completion, body, request, services)


router.include_router(_chat)
router.include_router(_plain)


async def _respond(
    request: Request,
    body: ChatCompletionRequest | CompletionRequest,
    services: Services,
    renders: type[ChatRenderer] | type[CompletionRenderer],
) -> Response:
    """Raises Refused, Overloaded, TooFast, DeadlineExceeded, ClientGone, or an error of the service."""
    model = services.model(body.model, body.reliability.bundle if body.reliability else None)
    service, resolver, watch, digest = model.service, model.resolver, services.watch, model.bundle.digest
    record = audited(request, model.name, digest)
    bulk = resolver.measure(body)
    deadline = Deadline(seconds_for(request, services.request_timeout_s))
    chat = isinstance(body, ChatCompletionRequest)
    wanted = await unless_interrupted(
        services.prepare(
            request,
            bulk,
            lambda: resolver.chat(body) if chat else resolver.completion(body),  # type: ignore[arg-type]
        ),
        request.receive,
        watch,
        deadline.left_s,
    )
    envelope = Envelope.new("chatcmpl" if chat else "cmpl", model.name, digest)
    renderer = renders(envelope, wanted, include_usage=body.wants_usage)

    def note(*answers: Answer) -> None:
        given = [
            GivenVerdict(
                renderer.envelope.id,
                answer.index,
                answer.judged.verdict,
                digest,
                model.name,
                model.rule,
                wanted.caller,
                "escalated" if answer.escalated else "answer",
                content=_content(body, answer, len(wanted.choices), model.bundle.manifest.representation),
            )
            for answer in answers
            if answer.judged
        ]
        record.verdicts += [(one.index, one.verdict) for one in given]
        record.escalated += [answer.index for answer in answers if answer.escalated]
        services.note(model, given, usual=wanted.calibrated)

    def sent(answers: Sequence[Answer]) -> None:
        shadowed(model, envelope.id, answers, wanted.reliability)

    wanted = replace(wanted, deadline=deadline)
    if body.wants_stream and (wanted.reliability.escalates or not wanted.reliability.buffered):
        chunks = _as_they_come(service.events(wanted), renderer, len(wanted.choices), note, sent)
        return EventStream(chunks, watch, deadline.left_s)
    answers = await unless_interrupted(service.answers(wanted), request.receive, watch, deadline.left_s)
    note(*answers)
    headers = verdict_headers(answers, digest)
    after = BackgroundTask(_call, sent, answers)
    if body.wants_stream:
        content = await asyncio.to_thread(_buffered, answers, renderer)
        return Response(content, headers=headers, media_type=_STREAM, background=after)
    content = await asyncio.to_thread(renderer.body, answers)
    return Response(content, headers=headers, media_type="application/json", background=after)


async def _call(sent: Callable[[Sequence[Answer]], None], answers: Sequence[Answer]) -> None:
    sent(answers)  # Starlette would run a plain function in a thread


def shadowed(model: ServedModel, id: str, answers: Iterable[Answer], asked: Reliability) -> None:
    """Has the bundle that shadows score answers too that were sent. Nobody waits for it."""
    for one in answers:
        if model.shadow is not None and one.judged is not None:
            made, verdict = one.generation, one.judged.verdict
            scoring = ScoringRequest(
                made.hidden, asked.alpha, verdict.calibrated, asked.certified_only, 0, made.prompt
            )
            model.shadow.offer(Sent(id, one.index, verdict, scoring))


def _content(
    body: ChatCompletionRequest | CompletionRequest,
    answer: Answer,
    choices: int,
    representation: Representation,
) -> Content:
    """Returns what the store may keep of an answer, as far as its operator wants it kept."""
    if isinstance(body, ChatCompletionRequest):
        conversation: list[dict[str, str]] | str = [message.to_template() for message in body.messages]
    else:
        conversation = body.prompt[answer.index * len(body.prompt) // choices]
    made = answer.generation
    return Content(conversation, made.text, made.hidden, made.prompt, representation)


def verdict_headers(answers: Sequence[Answer], digest: str) -> Mapping[str, str]:
    """Returns the verdicts' headers, comma-joined in index order; it returns none in mode off."""
    verdicts = [answer.judged.verdict for answer in answers if answer.judged]
    if not verdicts:
        return {}
    return {
        "x-sdm-region": ",".join(verdict.region for verdict in verdicts),
        "x-sdm-abstained": ",".join(str(verdict.abstained).lower() for verdict in verdicts),
        PIN: digest,
    }


def _buffered(answers: Sequence[Answer], renderer: Renderer) -> bytes:
    """Returns a whole stream, of answers that are already decided."""
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
    sent: Callable[[Sequence[Answer]], None],
) -> AsyncGenerator[bytes, None]:
    answers: list[Answer] = []
    unopened = set(range(choices))
    async with aclosing(events):
        async for event in events:
            opening = b""
            if event.index in unopened:
                unopened.remove(event.index)
                instead = event.replacement if isinstance(event, Answer) else None
                opening = renderer.opening(event.index, refused=instead is not None and instead.as_refusal)
            if isinstance(event, Piece):
                chunk = renderer.piece(event) if event.text or event.logprobs else b""
            else:
                answers.append(event)
                note(event)
                separator = SET_OFF if event.generation.text else ""
                chunk = renderer.replacement(event, separator) + renderer.finish(event)
            yield opening + chunk
    yield renderer.closing(sorted(answers, key=lambda answer: answer.index))
    sent(answers)


class EventStream(Response):
    """Server-sent events from an iterator. It closes once the client leaves, time is up or the engine dies."""

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
            broke_off("a stream", error)
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
