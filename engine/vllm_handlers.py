"""vLLM's own request handlers, over an engine client that captures (`engine.vllm_client`).

The only file that knows vLLM's serving layer, which is private to vLLM and changes with its versions.

    a body -> `parse`, vLLM's schema -> `call`, vLLM's handler -> its response, or its events as they come

A conversation of plain texts is rendered as calibration rendered it (`Renders`), so that a user's text never becomes
a control token; what that cannot say (tool messages, images, template switches) vLLM renders.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from copy import copy
from dataclasses import asdict, is_dataclass
from functools import partial
from typing import Any, Literal, Protocol, cast

from pydantic import BaseModel, ValidationError
from starlette.datastructures import State
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from vllm.entrypoints.serve.utils.api_utils import should_include_usage
from vllm.lora.request import LoRARequest
from vllm.renderers.online_renderer import OnlineRenderer

from candor.engine.base import EngineError, RequestRefused
from candor.engine.vllm_client import CapturingClient, current_judge, judged_beams
from candor.engine.vllm_engine import VLLMEngine
from candor.engine.vllm_options import images

Kind = Literal[
    "chat", "batch", "completion", "responses", "messages", "count_tokens", "tokenize", "detokenize"
]

SCHEMAS: Mapping[Kind, type[BaseModel]] = {
    "chat": ChatCompletionRequest,
    "batch": BatchChatCompletionRequest,
    "completion": CompletionRequest,
    "responses": ResponsesRequest,
    "messages": AnthropicMessagesRequest,
    "count_tokens": AnthropicCountTokensRequest,
    "tokenize": TokenizeCompletionRequest,
    "detokenize": DetokenizeRequest,
}


def schema(kind: Kind, body: Mapping[str, Any]) -> type[BaseModel]:
    """Returns vLLM's schema of the body."""
    return TokenizeChatRequest if kind == "tokenize" and "messages" in body else SCHEMAS[kind]


class Renders(Protocol):
    """A judge that also renders conversations."""

    async def encode(
        self, turns: Sequence[dict[str, str]], template_arguments: Mapping[str, Any] | None
    ) -> list[int]:
        """Returns the token ids of a conversation. template_arguments: None takes the calibrated ones."""
        ...


_IN_BODIES = "enable_force_include_usage", "return_tokens_as_token_ids", "enable_prompt_tokens_details"
"""Options that change what stands in the bodies of every route; this server's own bodies do not know them."""


class Handlers:
    """vLLM's handlers for one engine and its adapters.

    stores: whether responses can be asked for again. images: whether the model looks at them. fetches: whether vLLM
    may fetch them, from the domains or the folder that the operator named.
    """

    def __init__(self, state: State, *, alone: Collection[Kind], images: bool, fetches: bool) -> None:
        """alone: kinds that only vLLM's handlers write as the options given say."""
        self._state = state
        self.alone = alone
        self.stores: bool = state.openai_serving_responses.enable_store
        self.images, self.fetches = images, fetches

    @classmethod
    async def start(cls, engine: VLLMEngine, adapters: Mapping[str, VLLMEngine], name: str) -> Handlers:
        """name: of the base model. adapters: by the name that requests give."""
        client: Any = CapturingClient(engine)
        args = vars(FrontendArgs()) | vars(engine.args) | engine.frontend | {"served_model_name": [name]}
        state = State()
        await init_app_state(client, state, Namespace(**args), await engine.llm.get_supported_tasks())
        state.openai_serving_models.lora_requests = {
            given: LoRARequest(given, adapter.lora.lora_int_id, adapter.lora.lora_path)
            for given, adapter in adapters.items()
            if adapter.lora is not None
        }
        renderer = copy(state.online_renderer)
        renderer.__class__ = _Renderer
        for handler in (
            state.openai_serving_chat,
            state.openai_serving_chat_batch,
            state.openai_serving_completion,
            state.openai_serving_responses,
            state.anthropic_serving_messages,
            state.serving_tokenization,
        ):
            handler.online_renderer = renderer
            handler.default_sampling_params = {}  # the policy's are filled in before
            if hasattr(handler, "beam_search"):
                handler.beam_search = partial(judged_beams, handler.beam_search)
        alone: set[Kind] = {"chat"} if engine.args.reasoning_parser else set()  # thoughts are set apart
        if any(engine.frontend.get(option) for option in _IN_BODIES):
            alone |= {"chat", "completion"}
        fetches = bool(engine.args.allowed_media_domains or engine.args.allowed_local_media_path)
        return cls(state, alone=alone, images=bool(images(vars(engine.args))), fetches=fetches)

    def parse(self, kind: Kind, body: dict[str, Any]) -> Any:
        """Returns vLLM's request. Raises pydantic.ValidationError, or RequestRefused for what vLLM says itself."""
        try:
            return schema(kind, body).model_validate(body)
        except ValidationError:
            raise
        except RecursionError:
            raise RequestRefused("the body is nested too deeply", 400) from None
        except Exception as error:  # vLLM's own checks fail in many ways at a value of another type
            found = create_error_response(error).error
            code = found.code if found.code < 500 else 400
            raise RequestRefused(f"vLLM cannot read the body: {found.message}", code, found.param) from error

    def counts(self, request: Any) -> bool:
        """Whether every chunk of this request's stream says how many tokens there are so far."""
        forced = self._state.openai_serving_chat.enable_force_include_usage
        _, every = should_include_usage(getattr(request, "stream_options", None), forced)
        return bool(every)

    async def call(self, kind: Kind, request: Any) -> BaseModel | AsyncGenerator[str, None]:
        """Returns vLLM's response, or its stream of server-sent events. Raises RequestRefused or EngineError."""
        state = self._state
        handle = {
            "chat": state.openai_serving_chat.create_chat_completion,
            "batch": state.openai_serving_chat_batch.create_batch_chat_completion,
            "completion": state.openai_serving_completion.create_completion,
            "responses": state.openai_serving_responses.create_responses,
            "messages": state.anthropic_serving_messages.create_messages,
            "count_tokens": state.anthropic_serving_messages.count_tokens,
            "tokenize": partial(state.serving_tokenization.create_tokenize, raw_request=_NO_HEADERS),
            "detokenize": partial(state.serving_tokenization.create_detokenize, raw_request=_NO_HEADERS),
        }[kind]
        result = await _refused_clearly(handle(request))
        if isinstance(result, BaseModel):
            return result
        return _lines(result) if kind == "responses" else cast(AsyncGenerator[str, None], result)

    def queued(self, request: Any) -> BaseModel:
        """Returns the response to a request of `/v1/responses` before anything is written. Raises RequestRefused."""
        try:
            made = ResponsesResponse.from_request(
                request,
                request.to_sampling_params(request.max_output_tokens, {}),
                model_name=request.model,
                created_time=int(time.time()),
                output=[],
                status="queued",
                usage=None,
            )
        except Exception as error:
            raise _clear(create_error_response(error)) from error
        return cast(BaseModel, made)

    async def retrieve(self, response_id: str) -> BaseModel:
        """Returns a stored response of `/v1/responses`. Raises RequestRefused if there is none."""
        found = self._state.openai_serving_responses.retrieve_responses(
            response_id, starting_after=None, stream=False
        )
        return cast(BaseModel, await _refused_clearly(found))


class _NoHeaders:
    """In place of the HTTP request: what its headers may say (ids, ranks, priorities) is this server's to decide."""

    headers: Mapping[str, str] = {}


_NO_HEADERS: Any = _NoHeaders()


async def _refused_clearly(work: Any) -> Any:
    """Returns what a handler returns; raises RequestRefused for an error of the request's, EngineError for others."""
    try:
        result = await work
    except EngineError:
        raise
    except Exception as error:
        raise _clear(create_error_response(error)) from error
    if isinstance(result, ErrorResponse):
        raise _clear(result)
    return result


def _clear(response: ErrorResponse) -> EngineError:
    """Returns vLLM's error in this house's terms."""
    error = response.error
    if error.code >= 500 and error.code != 501:
        return EngineError(f"vLLM's handler failed: {error.message}")
    return RequestRefused(error.message, error.code, error.param)


async def _lines(events: AsyncGenerator[Any, None]) -> AsyncGenerator[str, None]:
    async for event in events:
        data = event.model_dump_json(by_alias=True)
        yield f"event: {event.type}\ndata: {data}\n\n"


class _Renderer(OnlineRenderer):  # type: ignore[misc]
    """Renders as calibration did whatever that can render."""

    async def preprocess_chat(self, request: Any, messages: list[Any], *rest: Any, **named: Any) -> Any:
        judge = cast(Renders | None, current_judge())
        if judge is not None and (plain := _plain(self, request, messages, named.get("tool_dicts"))):
            ids = await judge.encode(*plain)
            # vLLM's own way to be given a rendered prompt; what else it does with the request stays.
            request.kv_transfer_params = {"prompt_token_ids": ids}
        conversation, inputs = await super().preprocess_chat(request, messages, *rest, **named)
        if getattr(request, "enable_response_messages", False):  # shows the prompt as a text too
            for one in inputs:
                one["prompt"] = one.get("prompt") or self.renderer.tokenizer.decode(one["prompt_token_ids"])
        return conversation, inputs


_DEFAULTS = {
    "add_generation_prompt": True,
    "continue_final_message": False,
    "documents": None,
    "reasoning_effort": None,
}


def _plain(
    renderer: OnlineRenderer, request: Any, messages: Sequence[Any], tools: Sequence[Any] | None
) -> tuple[list[dict[str, str]], dict[str, Any] | None] | None:
    """Returns turns and template arguments of a conversation of plain texts; None for any other."""
    if getattr(request, "echo", False) or getattr(request, "truncate_prompt_tokens", None) is not None:
        return None
    if getattr(request, "truncation", "disabled") not in (None, "disabled"):
        return None
    turns = [_turn(message) for message in messages]
    if None in turns or not turns:
        return None
    asked = request.build_chat_params(None, "auto")
    arguments = dict(asked.chat_template_kwargs)
    for name, usual in _DEFAULTS.items():
        if arguments.pop(name, usual) != usual:
            return None
    if asked.chat_template is not None or renderer.use_harmony:
        return None
    given = arguments if request.chat_template_kwargs is not None else None
    if tools:  # as a bundle's policy may name them: without the fields that vLLM's schema adds
        given = (given or {}) | {"tools": [_without_none(tool) for tool in tools]}
    return cast(list[dict[str, str]], turns), given


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


_TEXTS = ("text", "input_text", "output_text")
"""Types of a text part: of Chat Completions, and of Responses, which most SDKs send even for a single text."""


def _turn(message: Any) -> dict[str, str] | None:
    if is_dataclass(message) and not isinstance(message, type):
        message = asdict(message)
    if not isinstance(message, Mapping):
        return None
    said = {name: value for name, value in message.items() if value not in (None, [], {})}
    role, content = said.pop("role", None), said.pop("content", "")
    said.pop("name", None)
    if said.get("type") == "message":  # as Responses gives its earlier turns
        for name in ("type", "id", "status"):
            said.pop(name, None)
    if isinstance(content, list | tuple) and all(
        isinstance(part, Mapping) and part.get("type") in _TEXTS for part in content
    ):
        content = "\n".join(part["text"] for part in content)
    if said or not isinstance(content, str) or role not in ("system", "developer", "user", "assistant"):
        return None
    return {"role": "system" if role == "developer" else role, "content": content}
