"""`POST /v1/decisions`: OpenAI's requests and responses, and our `reliability` beside the answers.

A field that is not known is refused by its name. What only concerns OpenAI's own cache or accounts is taken and has
no effect. An input of several messages or calls is put to the model as one text, a line for each with its role.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from candor.app.edge.schemas.bounds import FewFields
from candor.app.edge.schemas.reliability import ReliabilityObject
from candor.app.edge.schemas.requests import MOST_MESSAGES, Unicode, encodable, unknown_field
from candor.policy.conversation import shown
from candor.policy.decisions import YES_NO, Option, Question

MOST_QUESTIONS = 400
MOST_OPTIONS = 255
_MOST_LEVELS, _MOST_VALUES, _MOST_JSON = 32, 10_000, 1 << 18

_TEXT_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}


class KnownFields(FewFields):
    """Refuses an unknown field with an error of its own, for which the response is a 400 that names it."""

    @model_validator(mode="before")
    @classmethod
    def _are_known(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name in value:
                if name not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_field",
                        "{what}",
                        {"what": unknown_field(str(name), cls.model_fields), "name": str(name)[:100]},
                    )
        return value


def _join_parts(value: Any) -> Any:
    """Joins parts, `[{"type": "input_text", "text": ...}, ...]`, into one text, a line for each."""
    return "\n".join(map(_part, value)) if isinstance(value, list) else value


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "input_json" and isinstance(part.get("data"), dict | list):
        return _as_text(part["data"])
    text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        got = kind if isinstance(kind, str) else type(part).__name__
        raise PydanticCustomError(
            "content_part",
            "expected a text or parts of type input_text or input_json, got one of type {got}",
            {"got": ascii(got[:100])},
        )
    return text


def _as_text(data: Any) -> str:
    level, count = [data], 0
    for _ in range(_MOST_LEVELS):
        level = [one for some in level for one in (some.values() if isinstance(some, dict) else some)]
        count += len(level)
        if count > _MOST_VALUES:
            break
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
            if len(text) <= _MOST_JSON:
                return text
            break
    raise PydanticCustomError(
        "input_json",
        "expected JSON of at most {values} values, {levels} levels and {size} characters",
        {"values": _MOST_VALUES, "levels": _MOST_LEVELS, "size": _MOST_JSON},
    )


_PARTS = {"type": "array", "items": {"type": "object", "required": ["type"]}}
Content = Annotated[
    Unicode,
    BeforeValidator(_join_parts),
    WithJsonSchema({"anyOf": [{"type": "string"}, _PARTS]}),
]
"""A text, or parts that are joined, a line for each."""


class InputItem(KnownFields):
    """A message, a call, or its output. Fields of the other kinds are null."""

    type: Literal[
        "message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"
    ] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    phase: Literal["commentary", "final_answer"] | None = None
    id: Unicode | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    namespace: Unicode | None = None
    call_id: Unicode | None = None
    name: Unicode | None = None
    arguments: Unicode | None = None
    input: Unicode | None = None
    output: Content | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "custom_tool_call": ("call_id", "name", "input"),
        }.get(self.type, ("call_id", "output"))
        for name in needed:
            if getattr(self, name) is None:
                raise PydanticCustomError(
                    "item", "expected {name} in a {type}", {"name": name, "type": self.type}
                )
        return self

    def to_turn(self) -> dict[str, str]:
        if self.type == "message":
            return {"role": str(self.role), "content": str(self.content)}
        if self.output is not None:
            return {"role": "tool", "content": self.output}
        return {"role": "call", "content": f"{self.name}({self.arguments or self.input or ''})"}


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Input = Annotated[
    list[InputItem],
    Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True),
    BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem]),
]
"""A text, which is what a user said, or messages and calls in order."""


def _typed(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or not value:
        raise PydanticCustomError("choice_value", "expected a text, true or false")
    return encodable(value)


ChoiceValue = Annotated[
    Any,
    AfterValidator(_typed),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, {"type": "boolean"}]}),
]
"""A text or a boolean; true and "true" are two."""


class Choice(KnownFields):
    value: ChoiceValue
    description: Unicode | None = None


class Level(KnownFields):
    label: Annotated[Unicode, Field(min_length=1)]
    description: Unicode | None = None


class AskedQuestion(KnownFields):
    """choices: of a choice alone; levels: of a score alone, in order. name: comes back with the answer."""

    type: Literal["predicate", "choice", "score"]
    instructions: Annotated[Content, Field(min_length=1)]
    name: Annotated[Unicode, Field(max_length=1000)] | None = None
    choices: Annotated[list[Choice], Field(min_length=2, max_length=MOST_OPTIONS, fail_fast=True)] | None = (
        None
    )
    levels: Annotated[list[Level], Field(min_length=2, max_length=MOST_OPTIONS, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _has_its_options(self) -> Self:
        for name, of, given in (("choices", "choice", self.choices), ("levels", "score", self.levels)):
            if (given is not None) != (self.type == of):
                raise PydanticCustomError(
                    "options",
                    "expected {name} in a question of type {of}, and in no other",
                    {"name": name, "of": of},
                )
        values = [(type(option.value), option.value) for option in self.options]
        if len(set(values)) < len(values):
            raise PydanticCustomError("options", "expected different options, got one twice")
        return self

    @property
    def options(self) -> tuple[Option, ...]:
        if self.choices is not None:
            return tuple(Option(one.value, one.description) for one in self.choices)
        if self.levels is not None:
            return tuple(Option(one.label, one.description) for one in self.levels)
        return YES_NO

    @property
    def length(self) -> int:
        """Characters of all its texts."""
        options = sum(len(option.text) + len(option.description or "") for option in self.options)
        return len(self.instructions) + options

    def to_question(self) -> Question:
        return Question(self.type, self.instructions, self.options, self.name)


class DecisionReliability(KnownFields):
    """As for answers (`ReliabilityOptions`); in mode `abstain` a question whose answer is not let through gets a
    refusal."""

    mode: Literal["annotate", "abstain", "off"] = "annotate"
    alpha: float | None = Field(default=None, allow_inf_nan=False)
    certified: bool | None = None


class DecisionRequest(KnownFields):
    """Up to 400 questions about one input."""

    model: str
    input: Input
    questions: Annotated[list[AskedQuestion], Field(min_length=1, max_length=MOST_QUESTIONS, fail_fast=True)]
    reliability: DecisionReliability | None = None
    prompt_cache_key: Annotated[str | None, Field(description="Taken, without effect.")] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, Field(description="Taken, without effect.")] = None
    safety_identifier: Annotated[str | None, Field(description="Taken, without effect.")] = None

    @model_validator(mode="after")
    def _outputs_have_calls(self) -> Self:
        called: set[str | None] = set()
        for item in self.input:
            if item.type.endswith("_call"):
                called.add(item.call_id)
            elif item.type.endswith("_output") and item.call_id not in called:
                raise PydanticCustomError(
                    "call_id",
                    "expected a call with this call_id before its output, got {call_id}",
                    {"call_id": ascii(str(item.call_id)[:100])},
                )
        return self

    @property
    def text(self) -> str:
        """The input as the model gets it."""
        return shown([item.to_turn() for item in self.input])


class PredicateAnswer(BaseModel):
    type: Literal["predicate"] = "predicate"
    name: str | None
    probability: float


class ChoiceProbability(BaseModel):
    value: str | bool
    probability: float


class ChoiceAnswer(BaseModel):
    """choice: the option that was judged; confidence: its probability."""

    type: Literal["choice"] = "choice"
    name: str | None
    choice: str | bool
    confidence: float
    probabilities: list[ChoiceProbability]


class LevelProbability(BaseModel):
    """value: of the level, from 0."""

    label: str
    value: int
    probability: float


class ScoreAnswer(BaseModel):
    """score: expected value of the level. confidence: probability of the level that was judged."""

    type: Literal["score"] = "score"
    name: str | None
    score: float
    confidence: float
    probabilities: list[LevelProbability]


class RefusalAnswer(BaseModel):
    """Not reliable enough: withheld."""

    type: Literal["refusal"] = "refusal"
    name: str | None


class InputTokensDetails(BaseModel):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int = 0


class DecisionUsage(BaseModel):
    """input_tokens: what the questions' prompts have in common counts once. Nothing is written."""

    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int = 0
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class DecisionResponse(BaseModel):
    """answers, and the results of `reliability`: in the questions' order. Without `reliability` in mode off."""

    id: str
    object: Literal["decision"] = "decision"
    created: int
    model: str
    answers: list[PredicateAnswer | ChoiceAnswer | ScoreAnswer | RefusalAnswer]
    usage: DecisionUsage
    system_fingerprint: str
    reliability: ReliabilityObject | None = None
