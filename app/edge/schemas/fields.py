"""Field types that OpenAI's requests need and pydantic does not have.

Types are strict: `"n": "2"` is refused rather than guessed at. What this server cannot do is refused where
it would change the answer, and ignored where it would not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclass(frozen=True)
class Only:
    """Marks a field that is known, but may only have values that change nothing."""

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


def _encodable(value: str) -> str:
    # JSON can escape half a surrogate pair, which is no character: no tokenizer and no UTF-8 takes it.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "lone_surrogate", "expected Unicode text, got half a surrogate pair at {at}", {"at": error.start}
        ) from None
    return value


Unicode = Annotated[str, AfterValidator(_encodable)]
"""A text that can be encoded."""

_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}


def _join_parts(value: Any) -> Any:
    """Text given in parts, `[{"type": "text", "text": ...}, ...]`, as one text."""
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
    return "".join(part["text"] for part in value)


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
    Field(min_length=1),
    BeforeValidator(_as_list),
    _one_or_many({"type": "string"}, {"minItems": 1}),
]
"""One plain prompt or several. Token ids are refused: with them, control tokens could be forged."""
