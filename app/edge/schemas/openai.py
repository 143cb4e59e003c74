"""OpenAI's chat completions and completions, as far as this server speaks them.

Fields it does not know are ignored, since clients send many; fields it knows and cannot honour are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from candor.app.edge.schemas.fields import Only, Prompts, Stop, Text, Unicode
from candor.app.edge.schemas.reliability import Reliability, ReliabilityOptions

INT64 = 2**63


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
        """The form chat templates know."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content if self.content is not None else self.refusal or ""}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What chat and plain completions have in common."""

    model_config = ConfigDict(strict=True)

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

    @property
    def wants_stream(self) -> bool:
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatCompletionRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)
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
    chat_template_kwargs: Annotated[Any, Only([None, {}])] = None
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


class Usage(BaseModel):
    """prompt_tokens counts a prompt once, however many answers it got."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """text_offset: where each token starts in the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AssistantMessage(BaseModel):
    """A withheld answer has content null and a refusal."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class CompletionChoice(BaseModel):
    """refusal is not OpenAI's; a withheld answer has an empty text and says so there."""

    index: int
    text: str
    refusal: str | None = None
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """Without `reliability` where its mode is off."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    reliability: Reliability | None = None


class Completion(BaseModel):
    """Without `reliability` where its mode is off."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str
    reliability: Reliability | None = None


class ServedBundle(BaseModel):
    """What an answer's reliability rests on."""

    bundle: str
    alphas: list[float]
    default_alpha: float
    estimator: Literal["lower", "plain"]
    class_names: list[str]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["candor"] = "candor"
    max_model_len: int
    reliability: ServedBundle


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
