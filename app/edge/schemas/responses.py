"""Responses of OpenAI's chat completions and completions, and of the list of models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from candor.app.edge.schemas.reliability import ReliabilityObject
from candor.policy.certificate import RuleKind


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
    token_ids: None = None


class CompletionChoice(BaseModel):
    """refusal is not OpenAI's; a withheld answer has an empty text and says so there."""

    index: int
    text: str
    refusal: str | None = None
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: None = None
    prompt_token_ids: None = None
    token_ids: None = None


class ChatCompletion(BaseModel):
    """Without `reliability` where its mode is off. What vLLM's clients read without asking for it is null here."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    prompt_logprobs: None = None
    prompt_token_ids: None = None
    usage: Usage
    system_fingerprint: str
    reliability: ReliabilityObject | None = None


class Completion(BaseModel):
    """Without `reliability` where its mode is off."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str
    reliability: ReliabilityObject | None = None


class ServedBundle(BaseModel):
    """What an answer's reliability rests on."""

    bundle: str
    alphas: list[float]
    default_alpha: float
    rule: RuleKind
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
