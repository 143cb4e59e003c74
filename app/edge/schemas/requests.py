"""Requests of OpenAI's chat completions and completions, as far as this server supports them.

Nothing that could change an answer is ignored: unknown fields, and known ones that this schema cannot honour, are
refused. With vLLM as the engine, its own handlers take such a body (`app.edge.routes.either`).
Types are strict: `"n": "2"` is refused rather than converted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from candor.app.edge.schemas.bounds import few_values
from candor.app.edge.schemas.reliability import ReliabilityOptions

INT64 = 2**63
MOST_MESSAGES = 1024
MOST_PROMPTS = 1024


@dataclass(frozen=True)
class Only:
    """Marks a known but unsupported field: it accepts only values that change nothing."""

    allowed: Sequence[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"enum": list(self.allowed), "description": "Accepted only as a value that changes nothing."}

    def _check(self, value: Any) -> Any:
        if value not in self.allowed:
            raise PydanticCustomError("unsupported", "is not supported by this server; leave it out")
        return value


def unknown_field(name: str, known: Iterable[str]) -> str:
    """Returns the sentence for a field that would be ignored."""
    near = get_close_matches(name[:100], [*known, "reliability"], 1)
    hint = f"did you mean {near[0]}?" if near else "leave it out"
    return f"there is no field {name[:100]!a}; {hint}"


def encodable(value: str) -> str:
    """Returns the value. Raises PydanticCustomError for what is no Unicode text."""
    # JSON can escape half a surrogate pair; that is no character, and neither UTF-8 nor a tokenizer takes it.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "lone_surrogate", "expected Unicode text, got half a surrogate pair at {at}", {"at": error.start}
        ) from None
    return value


Unicode = Annotated[str, AfterValidator(encodable)]
"""A text that can be encoded."""

_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}


def _join_parts(value: Any) -> Any:
    """Joins text parts, `[{"type": "text", "text": ...}, ...]`, into one text, a line each as vLLM does."""
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            shown = kind if isinstance(kind, str) else type(part).__name__
            raise PydanticCustomError(
                "content_part",
                'expected a text or parts {"type": "text", "text": "..."}, got a part of type {shown}',
                {"shown": ascii(shown)},
            )
    return "\n".join(part["text"] for part in value)


Text = Annotated[
    Unicode,
    BeforeValidator(_join_parts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]}),
]
"""A text, or text parts that are joined."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _one_or_many(items: dict[str, Any], limits: dict[str, int]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [items, {"type": "array", "items": items, **limits}]})


Stop = Annotated[
    list[Annotated[Unicode, Field(min_length=1)]],
    Field(max_length=16),
    BeforeValidator(_as_list),
    _one_or_many({"type": "string", "minLength": 1}, {"maxItems": 16}),
]
"""One stop string or up to 16."""

Prompts = Annotated[
    list[Unicode],
    Field(min_length=1, max_length=MOST_PROMPTS),
    BeforeValidator(_as_list),
    _one_or_many({"type": "string"}, {"minItems": 1, "maxItems": MOST_PROMPTS}),
]
"""One plain prompt or several. Token ids are refused, because they could forge control tokens."""


class ChatMessage(BaseModel):
    """One turn. `name` and the like are ignored; an assistant's earlier refusal counts as what it said."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | None = None
    refusal: Unicode | None = None
    tool_calls: Annotated[Any, Only([None, []])] = None
    function_call: Annotated[Any, Only([None])] = None
    audio: Annotated[Any, Only([None])] = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content_missing", "expected content, a text")
        return self

    def to_template(self) -> dict[str, str]:
        """Returns the message in the form that chat templates take."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content if self.content is not None else self.refusal or ""}


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="Ignored: it changes no answer.")
    continuous_usage_stats: Annotated[Any, Only([None, False])] = None


HARMLESS = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "verbosity",
        "parallel_tool_calls",
    ]
)
"""Fields of clients that change no answer here, and so may be ignored."""


class GenerationRequest(BaseModel):
    """What chat and plain completions have in common."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _are_known(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name in value:
                if name not in cls.model_fields and name not in HARMLESS:
                    raise PydanticCustomError(
                        "unknown_field",
                        "{what}",
                        {"what": unknown_field(str(name), cls.model_fields), "name": str(name)[:100]},
                    )
        return value

    model: str
    n: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(
        default=None, ge=-1, lt=INT64, description="Not OpenAI's, but vLLM's; 0 or -1: all."
    )
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    reliability: ReliabilityOptions | None = None

    logit_bias: Annotated[Any, Only([None, {}])] = None
    min_p: Annotated[Any, Only([None, 0])] = None
    min_tokens: Annotated[Any, Only([None, 0])] = None
    repetition_penalty: Annotated[Any, Only([None, 1])] = None
    ignore_eos: Annotated[Any, Only([None, False])] = None
    stop_token_ids: Annotated[Any, Only([None, []])] = None
    response_format: Annotated[Any, Only([None, {"type": "text"}])] = None
    structured_outputs: Annotated[Any, Only([None])] = None
    guided_json: Annotated[Any, Only([None])] = None
    guided_regex: Annotated[Any, Only([None])] = None
    guided_choice: Annotated[Any, Only([None])] = None
    guided_grammar: Annotated[Any, Only([None])] = None

    @model_validator(mode="after")
    def _streams_where_it_says_how(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream: true")
        return self

    @property
    def wants_stream(self) -> bool:
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatCompletionRequest(GenerationRequest):
    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1, description="Goes before `max_tokens`.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    tools: Annotated[Any, Only([None, []])] = None
    tool_choice: Annotated[Any, Only([None, "none", "auto"])] = None
    functions: Annotated[Any, Only([None, []])] = None
    function_call: Annotated[Any, Only([None, "none", "auto"])] = None
    modalities: Annotated[Any, Only([None, ["text"]])] = None
    audio: Annotated[Any, Only([None])] = None
    prediction: Annotated[Any, Only([None])] = None
    web_search_options: Annotated[Any, Only([None])] = None
    chat_template: Annotated[Any, Only([None])] = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(few_values)] | None = Field(
        default=None,
        description="Arguments of the chat template; others than the calibrated are not calibrated.",
    )
    add_generation_prompt: Annotated[Any, Only([None, True])] = None
    continue_final_message: Annotated[Any, Only([None, False])] = None

    @model_validator(mode="after")
    def _logprobs_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("logprobs", "top_logprobs needs logprobs: true")
        return self


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    logprobs: int | None = Field(default=None, ge=0, le=20)

    echo: Annotated[Any, Only([None, False])] = None
    suffix: Annotated[Any, Only([None, ""])] = None
    best_of: Annotated[Any, Only([None, 1])] = None
    prompt_logprobs: Annotated[Any, Only([None])] = None
