"""vLLM's own request surface: what this server's schemas do not say, vLLM's handlers answer, with the same verdicts.

    POST /v1/chat/completions, /v1/completions   a body that this server's schema takes is answered by
                                                 `routes.answers`; any other (tools, schemas, images, beams ...) here
    POST /v1/chat/completions/batch, /v1/responses, /v1/messages    here
    POST /tokenize, /detokenize, /v1/messages/count_tokens
    GET /v1/responses/{id}, POST /v1/responses/{id}/cancel

Nothing that changes an answer is ignored: a field is applied, or refused by its name.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from candor.app.answering.judging import Judging
from candor.app.answering.request import Bulk
from candor.app.answering.service import Answer
from candor.app.answering.waiting import Deadline, seconds_for, unless_interrupted
from candor.app.edge.limits import Refused, few_logprobs
from candor.app.edge.parsing import BoundedRoute
from candor.app.edge.routes.answers import EventStream, shadowed, verdict_headers
from candor.app.edge.routes.documented import ERRORS, STREAMED
from candor.app.edge.routes.either import json_object, told_where
from candor.app.edge.routes.unattended import Unattended
from candor.app.edge.schemas import grammars, images
from candor.app.edge.schemas.reliability import ReliabilityOptions
from candor.app.edge.schemas.requests import HARMLESS, unknown_field
from candor.app.edge.services import InjectedServices, ServedModel, Services
from candor.app.store.records import Content, GivenVerdict
from candor.app.telemetry.audit import audited
from candor.app.writing.bodies import Envelope, fingerprint
from candor.app.writing.verdicts import FORMS, ChatForm, CompletionForm
from candor.engine.base import EngineError, RequestRefused
from candor.policy.conversation import Conversations

if TYPE_CHECKING:
    from candor.app.process.backend import Backend
    from candor.engine.vllm_handlers import Kind

router = APIRouter(route_class=BoundedRoute)

_STREAM = "text/event-stream"
_MOST_LOGPROBS = 1 << 14
"""Of one request; vLLM's handlers write them in one go, on the event loop."""

_NOT_SERVED: Mapping[str, str] = {
    "kv_transfer_params": "KV blocks are computed here alone",
    "ec_transfer_params": "images are encoded here alone",
    "vllm_xargs": "they are for plug-ins of vLLM, and none is loaded",
    "prompt_embeds": "an embedded prompt has no tokens to judge",
    "mm_payload": "images come as vLLM's documented parts",
    "return_mm_kwargs": "it is for other servers of vLLM",
    "routed_experts_prompt_start": "it is for other servers of vLLM",
}
"""vLLM's fields that this server refuses, and why."""

_ROOM = {
    "chat": "max_completion_tokens",
    "batch": "max_completion_tokens",
    "completion": "max_tokens",
    "responses": "max_output_tokens",
}
"""Where each kind of request says how long an answer may be; the first that is not given is filled in."""


@router.post("/v1/chat/completions/batch", responses=ERRORS, response_model=None)
async def create_chat_completions(request: Request, services: InjectedServices) -> Response:
    """Answers to several conversations, a choice each, with their reliability."""
    return await _surface(services).respond("batch", await json_object(request), request, services)


@router.post("/v1/responses", responses=ERRORS | STREAMED, response_model=None)
async def create_response(request: Request, services: InjectedServices) -> Response:
    """OpenAI's Responses, with their reliability."""
    return await _surface(services).respond("responses", await json_object(request), request, services)


@router.get("/v1/responses/{response_id}", responses=ERRORS, response_model=None)
async def retrieve_response(response_id: str, request: Request, services: InjectedServices) -> Response:
    """A stored response, or how far one in the background has come; responses are stored where
    VLLM_ENABLE_RESPONSES_API_STORE=1."""
    surface = _surface(services)
    if (body := surface.unattended.look(response_id, request.state.caller)) is not None:
        return _json(body)
    judging = surface.recall(response_id, request.state.caller)
    found = await surface.handlers.retrieve(response_id)
    return _json(FORMS["responses"].body(_dumped("responses", found), judging))


@router.post("/v1/responses/{response_id}/cancel", responses=ERRORS, response_model=None)
async def cancel_response(response_id: str, request: Request, services: InjectedServices) -> Response:
    """Cancels a response in the background."""
    surface = _surface(services)
    body = await surface.unattended.cancel(response_id, request.state.caller)
    if body is None:
        surface.recall(response_id, request.state.caller)
        raise RequestRefused("Cannot cancel a synchronous response, or one that is done", 400, "response_id")
    return _json(body)


@router.post("/v1/messages", responses=ERRORS | STREAMED, response_model=None)
async def create_message(request: Request, services: InjectedServices) -> Response:
    """Anthropic's Messages, with their reliability."""
    return await _surface(services).respond("messages", await json_object(request), request, services)


@router.post("/v1/messages/count_tokens", responses=ERRORS, response_model=None)
async def count_tokens(request: Request, services: InjectedServices) -> Response:
    """How many tokens a message's prompt has."""
    return await _plainly("count_tokens", request, services)


@router.post("/tokenize", responses=ERRORS, response_model=None)
async def tokenize(request: Request, services: InjectedServices) -> Response:
    """The tokens of a prompt or a conversation."""
    return await _plainly("tokenize", request, services)


@router.post("/detokenize", responses=ERRORS, response_model=None)
async def detokenize(request: Request, services: InjectedServices) -> Response:
    """The text of tokens."""
    return await _plainly("detokenize", request, services)


class _Read(BaseModel):
    """What is read of a body before vLLM's schema reads it. JSON's own types alone: were "9" taken for 9 later, more
    would be asked for than was counted here."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    background: bool | None = None
    store: bool | None = None
    echo: bool | None = None
    use_beam_search: bool | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class _Parsed:
    """A request in vLLM's terms. tokens: at most, as far as is known before it is rendered."""

    request: Any
    tokens: int
    caller: str = "anyone"


async def _respond(kind: Kind, body: dict[str, Any], request: Request, services: Services) -> Response:
    surface = _surface(services)
    form = FORMS[kind]
    body = {name: value for name, value in body.items() if value is not None}  # null: as if it were not said
    with told_where():
        read = _Read.model_validate(body)
    if read.previous_response_id is not None:
        surface.recall(read.previous_response_id, request.state.caller)
    if read.background:
        _require_kept(read, surface)
    if kind == "responses":
        body.pop("background", None)  # vLLM's own has no place among those in flight, and no time limit
    options = body.pop("reliability", None)
    with told_where("reliability"):
        asked = ReliabilityOptions.model_validate({} if options is None else options)
    model = services.model(read.model, asked.bundle)
    streamed = read.stream is True
    reliability = model.resolver.resolve_reliability(asked, streamed=streamed)
    if reliability.escalates:
        raise Refused(
            "the other model is asked plain conversations and prompts alone; leave out what is more, or use "
            '"refusal"',
            "reliability.on_abstain",
        )
    record = audited(request, model.name, model.bundle.digest)
    deadline = Deadline(seconds_for(request, services.request_timeout_s))
    choices, most = _fill_in(kind, body, read, model)
    if read.echo and read.max_tokens == 0:  # nothing is written, so there is nothing to judge
        reliability = model.resolver.unjudged(reliability)
    pictures = images.lengths(body.get(_where(kind)))
    characters = len(await request.body()) - sum(pictures)
    bulk = model.resolver.within(Bulk(choices, characters), choices)

    def parse() -> _Parsed:
        _check_fields(kind, body, surface)
        tokens = characters // 4 + len(pictures) * images.TOKENS + choices * most
        return _Parsed(_parsed(kind, body, surface), tokens)

    parsed = await unless_interrupted(
        services.prepare(request, bulk, parse), request.receive, services.watch, deadline.left_s
    )

    digest = model.bundle.digest
    answer_id: str | None = None
    unnamed: list[Answer] = []  # judged before vLLM's handler said the response's id

    def note(*answers: Answer) -> None:
        for answer in answers:
            if answer.judged is not None:
                record.verdicts.append((answer.index, answer.judged.verdict))
        unnamed.extend(answers)
        if answer_id is not None:
            keep(answer_id)

    def keep(name: str) -> None:
        nonlocal answer_id
        if answer_id is None:
            answer_id = name
            surface.remember(name, parsed.caller, judging)
        given = [
            GivenVerdict(
                name,
                one.index,
                one.judged.verdict,
                digest,
                model.name,
                model.rule,
                request.state.caller,
                content=_content(kind, body, one, model),
            )
            for one in unnamed
            if one.judged
        ]
        services.note(model, given, usual=all(one.verdict.calibrated for one in given))
        shadowed(model, name, unnamed, reliability)
        unnamed.clear()

    async def encode(
        turns: Sequence[dict[str, str]], arguments: Mapping[str, Any] | None
    ) -> tuple[list[int], bool]:
        length = sum(len(turn["content"]) for turn in turns)
        return await services.preparing.run(
            request.state.caller, length, lambda: model.resolver.encode(turns, arguments)
        )

    judging = Judging(model.service, reliability, model.resolver.limits.prompt_tokens, encode, note)
    if isinstance(form, ChatForm):
        form = replace(form, counted=surface.handlers.counts(parsed.request))
    if isinstance(form, CompletionForm):
        made = Envelope.new("cmpl", model.name, digest)
        head = {"id": made.id, "object": "text_completion", "created": made.created, "model": made.model}
        form = replace(form, head=head)

    admitted = services.admission.admit(parsed.caller, choices, parsed.tokens)

    async def call() -> BaseModel | AsyncGenerator[str, None]:
        written = await surface.call(kind, parsed.request, judging)
        if isinstance(written, BaseModel):
            return written
        return _named(form.stream(written, judging), judging, keep)

    async def whole() -> tuple[bytes, str]:
        written = await call()
        if isinstance(written, BaseModel):
            body = form.body(_dumped(kind, written), judging)
            body |= {"system_fingerprint": fingerprint(digest)} if "choices" in body else {}
            keep(body["id"])
            return await asyncio.to_thread(_bytes, body), "application/json"
        async with aclosing(written) as events:
            return "".join([event async for event in events]).encode(), _STREAM

    if read.background:
        queued = _dumped(kind, surface.handlers.queued(parsed.request))
        places = ExitStack()
        places.enter_context(admitted)  # so that what has no place is refused now
        work = unless_interrupted(whole(), _nobody, services.watch, deadline.left_s)
        return _json(surface.unattended.begin(queued["id"], parsed.caller, queued, work, places.close))

    if streamed and not reliability.buffered:
        events = await unless_interrupted(call(), request.receive, services.watch, deadline.left_s)
        assert not isinstance(events, BaseModel)
        return EventStream(_admitted(events, admitted), services.watch, deadline.left_s)

    async def attended() -> tuple[bytes, str]:
        with admitted:
            return await whole()

    content, kind_of = await unless_interrupted(attended(), request.receive, services.watch, deadline.left_s)
    headers = verdict_headers(judging.finished, digest)
    return Response(content, headers=dict(headers), media_type=kind_of)


@dataclass(frozen=True)
class _Kept:
    """What was judged of a stored response: as `Judging` has it, without the request."""

    caller: str
    answers: Mapping[int, Answer]
    buffered: bool

    @property
    def finished(self) -> list[Answer]:
        return [answer for _, answer in sorted(self.answers.items())]


class Surface:
    """vLLM's handlers with what was judged of the responses that they store."""

    _REMEMBERED = 10_000

    def __init__(self, handlers: Any) -> None:
        """handlers: `engine.vllm_handlers.Handlers`."""
        from candor.engine.vllm_client import judged_by, read_within
        from candor.engine.vllm_handlers import schema

        self.handlers = handlers
        self.schema: Callable[[Kind, Mapping[str, Any]], type[BaseModel]] = schema
        self._judged_by, self._read_within = judged_by, read_within
        self.unattended = Unattended()
        self._kept: dict[str, _Kept] = {}

    async def respond(
        self, kind: Kind, body: dict[str, Any], request: Request, services: Services
    ) -> Response:
        """Answers a body by vLLM's handler. Raises as `routes.answers` does, and RequestRefused."""
        return await _respond(kind, body, request, services)

    async def call(self, kind: Kind, request: Any, judging: Judging | None) -> Any:
        judge = cast(Any, judging)
        with self._judged_by(judge):
            try:
                written = await self.handlers.call(kind, request)
            except RequestRefused as error:
                if judging is not None and judging.finished:  # so it was not the request
                    raise EngineError(f"the answer does not fit the form of this route: {error}") from error
                raise
        return written if isinstance(written, BaseModel) else self._read_within(judge, written)

    def remember(self, response_id: str, caller: str, judging: Judging) -> None:
        if self.handlers.stores and response_id.startswith("resp_"):
            self._kept[response_id] = _Kept(caller, judging.answers, judging.buffered)
            if len(self._kept) > self._REMEMBERED:
                del self._kept[next(iter(self._kept))]

    def recall(self, response_id: str, caller: str) -> _Kept:
        """Returns what was judged of a response. Raises RequestRefused if the caller has none of this id."""
        kept = self._kept.get(response_id)
        if kept is None or kept.caller != caller:
            raise RequestRefused(f"Response with id {response_id[:100]!r} not found here", 404, "response_id")
        return kept


async def start(backend: Backend, name: str) -> Surface | None:
    """Returns vLLM's handlers over the backend's engine; None if that is another. name: of the first model."""
    if not hasattr(backend.engine, "llm"):
        return None
    from candor.engine.vllm_handlers import Handlers

    adapters: Any = {one.bundle.manifest.name: one.engine for one in backend.adapted}
    engine: Any = backend.engine
    return Surface(await Handlers.start(engine, adapters, name))


def _require_kept(read: _Read, surface: Surface) -> None:
    """Raises RequestRefused for a response in the background that could not be asked for."""
    if read.stream:
        raise RequestRefused("background: expected no stream; ask for the response by its id", 400, "stream")
    if read.store is False or not surface.handlers.stores:
        why = "got false" if read.store is False else "this server stores none"
        raise RequestRefused(f"background can only be used when `store` is true: {why}", 400, "background")


async def _nobody() -> Any:
    """In place of the channel of a client that waits: it never leaves."""
    await asyncio.get_running_loop().create_future()


def _surface(services: Services) -> Surface:
    if services.surface is None:
        raise Refused("this server's engine has no such route; serve with vLLM", None, "not_served")
    return services.surface


async def _plainly(kind: Kind, request: Request, services: Services) -> Response:
    """Answers what has no verdict, since nothing is written."""
    surface = _surface(services)
    body = await json_object(request)
    with told_where():
        model = services.model(_Read.model_validate(body).model)
    body["model"] = model.name
    characters = len(await request.body()) - sum(images.lengths(body.get(_where(kind))))

    def parse() -> _Parsed:
        _check_fields(kind, body, surface)
        return _Parsed(_parsed(kind, body, surface), characters // 4)

    bulk = model.resolver.within(Bulk(1, characters), 1)
    parsed = await services.prepare(request, bulk, parse)
    result = await surface.call(kind, parsed.request, None)
    return _json(_dumped(kind, result))


def _fill_in(kind: Kind, body: dict[str, Any], read: _Read, model: ServedModel) -> tuple[int, int]:
    """Fills in what the policy says and the request does not. Returns the number of choices and their most tokens."""
    policy, limits = model.service.policy, model.resolver.limits
    body["model"] = model.name
    if not read.use_beam_search:
        for name in ("temperature", "top_p", "top_k"):
            if body.get(name) is None:
                body[name] = getattr(policy, name)
    _fill_in_form(kind, body, policy.conversations)
    lengths = (read.max_completion_tokens, read.max_output_tokens, read.max_tokens)
    most = next((given for given in lengths if given is not None), None)
    if most is None:
        most = min(policy.max_tokens, limits.output_tokens)
        if kind in _ROOM:
            body[_ROOM[kind]] = most
    prompts = body.get("messages" if kind == "batch" else "prompt")
    several = isinstance(prompts, list) and not all(isinstance(token, int) for token in prompts)
    choices = max(read.n or 1, 1) * (len(prompts or ()) if several else 1)
    model.resolver.check_sizes(most, choices)
    asked = (read.logprobs, read.top_logprobs, read.prompt_logprobs)
    if given := [one for one in asked if one is not None and one is not False]:
        few_logprobs(_MOST_LOGPROBS, 1 + max(given), choices * most)
    return max(choices, 1), max(most, 0)


def _fill_in_form(kind: Kind, body: dict[str, Any], calibrated: Conversations) -> None:
    """Fills in what answers are held to and the template's arguments, where a conversation says nothing of them."""
    if kind not in ("chat", "batch", "responses"):
        return
    held = (body.get(name) for name in ("structured_outputs", "response_format", "text", "tools"))
    if calibrated.grammar is not None and not any(held):
        body["structured_outputs"] = json.loads(calibrated.grammar)
    arguments = calibrated.for_template
    if arguments and "tools" not in arguments and body.get("chat_template_kwargs") is None:
        body["chat_template_kwargs"] = arguments  # parsers of reasoning look at them too


def _check_fields(kind: Kind, body: Mapping[str, Any], surface: Surface) -> None:
    """Raises RequestRefused for a field that would be ignored, and for texts that are none."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestRefused("expected Unicode text, got half a surrogate pair", 400) from None
    for name, why in _NOT_SERVED.items():
        if body.get(name):
            raise RequestRefused(f"{name} is not served: {why}; leave it out", 400, name)
    conversation = body.get(_where(kind))
    images.check(conversation, _where(kind), surface.handlers)
    if body.get("use_beam_search") and images.lengths(conversation):
        why = "a beam is judged anew over its tokens, and its images are not there then"
        raise RequestRefused(f"use_beam_search is not served with images: {why}", 400, "use_beam_search")
    grammars.check(body)
    schema = surface.schema(kind, body)
    known = {field.alias or name for name, field in schema.model_fields.items()} | set(schema.model_fields)
    for name in body:
        if name not in known and name not in HARMLESS:
            raise RequestRefused(unknown_field(name, known), 400, name[:100], "unknown_parameter")


def _where(kind: Kind) -> str:
    """Returns the name of the conversation."""
    return "input" if kind == "responses" else "messages"


def _parsed(kind: Kind, body: dict[str, Any], surface: Surface) -> Any:
    body = {name: value for name, value in body.items() if name not in ("request_id", "session_id")}
    with told_where():
        return surface.handlers.parse(kind, body)


def _content(kind: Kind, body: Mapping[str, Any], answer: Answer, model: ServedModel) -> Content:
    """Returns what the store may keep of an answer: the conversation as the client sent it."""
    asked = body.get({"completion": "prompt", "responses": "input"}.get(kind, "messages"))
    if kind == "batch":
        asked = cast(Sequence[Any], asked)[answer.index]
    made = answer.generation
    return Content(asked, made.text, made.hidden, made.prompt, model.bundle.manifest.representation)


async def _named(
    events: AsyncGenerator[str, None], judging: Judging, keep: Callable[[str], None]
) -> AsyncGenerator[str, None]:
    """Passes the events on, and says the response's id as soon as one has it."""
    name: str | None = None
    async with aclosing(events):
        async for event in events:
            if name is None and (name := _id_in(event, judging)) is not None:
                keep(name)
            yield event


def _id_in(event: str, judging: Judging) -> str | None:
    """Returns the response's id. Raises what a first event that is an error says."""
    data = event.partition("data: ")[2]
    if not data.startswith("{"):
        return None
    said = json.loads(data)
    if error := said.get("error"):
        if judging.failure is not None:
            raise judging.failure
        code = error.get("code")
        if isinstance(code, int) and code < 500:
            raise RequestRefused(str(error.get("message")), code, error.get("param"))
        raise EngineError(f"vLLM's handler failed: {error.get('message')}")
    found = said.get("id") or said.get("response", {}).get("id") or said.get("message", {}).get("id")
    return found if isinstance(found, str) else None


async def _admitted(
    events: AsyncGenerator[str, None], admitted: AbstractContextManager[None]
) -> AsyncGenerator[bytes, None]:
    """Passes the events on while the request holds its places."""
    with admitted:
        async with aclosing(events):
            async for event in events:
                yield event.encode()


def _dumped(kind: Kind, response: BaseModel) -> dict[str, Any]:
    """Returns it as vLLM's routes write it."""
    return response.model_dump(mode="json", by_alias=True, exclude_none=kind in ("messages", "count_tokens"))


def _bytes(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _json(body: Mapping[str, Any]) -> Response:
    return Response(_bytes(body), media_type="application/json")
