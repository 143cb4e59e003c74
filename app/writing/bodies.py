"""Rendering of answers as OpenAI's JSON: one body, or the chunks of a stream.

Only the text differs between the chunks of a stream, so the rest is rendered once.

    data: {id ... "choices":[{... text ...}]}                         as it comes
    data: {id ... "choices":[{... finish_reason}], "reliability": }   once per choice, at its end
    data: {id ... "choices":[], "usage": , "reliability": }           if asked for
    data: [DONE]
"""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from candor.app.answering.escalation import Escalated
from candor.app.answering.request import AnswerRequest
from candor.app.answering.scoring import Judged
from candor.app.answering.service import Answer, Piece
from candor.app.edge.schemas.bundle import ShownCertificate
from candor.app.edge.schemas.reliability import (
    ReliabilityObject,
    ReliabilityResult,
    ShownEscalation,
    ShownExemplar,
)
from candor.app.edge.schemas.responses import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
    Usage,
)
from candor.app.writing.logprobs import chat_logprobs, completion_logprobs
from candor.policy.decision import Figures
from candor.policy.words import explanation

# The output is ASCII: some clients split lines at U+2028 and the like, which would cut an event in two.
_dumps = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True)
class Envelope:
    """The fields that all chunks of one response share."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, prefix: Literal["chatcmpl", "cmpl"], model: str, digest: str) -> Envelope:
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, fingerprint(digest))


def fingerprint(digest: str) -> str:
    """Returns the `system_fingerprint` of the bundle with this digest."""
    return f"sdm-{digest[:12]}"


def usage(prompt_tokens: int, answers: Sequence[Answer]) -> Usage:
    written = sum(answer.completion_tokens for answer in answers)
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=written, total_tokens=prompt_tokens + written)


class Renderer(ABC):
    """Renders one response. Chat and plain completions differ in the form of a choice."""

    kind: str

    def __init__(self, envelope: Envelope, request: AnswerRequest, *, include_usage: bool = False) -> None:
        self.envelope = envelope
        self._request = request
        self._include_usage = include_usage
        self._alternatives = request.choices[0].sampling.logprobs or 0
        fields = {
            "id": envelope.id,
            "object": self.kind,
            "created": envelope.created,
            "model": envelope.model,
        }
        common = _dumps(fields | {"system_fingerprint": envelope.system_fingerprint})
        self._head = f'data: {common[:-1]},"choices":['
        self._tail = '],"usage":null' if include_usage else "]"

    def opening(self, index: int, *, refused: bool = False) -> bytes:
        """Returns the chunk before a choice's first text. refused: a refusal follows instead of text."""
        return b""

    @abstractmethod
    def piece(self, piece: Piece) -> bytes:
        """Returns the chunk of one piece of text."""

    @abstractmethod
    def replacement(self, answer: Answer, separator: str) -> bytes:
        """Returns the chunk that replaces a withheld answer. separator: stands before it, after text sent already."""

    @abstractmethod
    def _last_choice(self, answer: Answer) -> dict[str, Any]:
        """Returns the choice of the chunk that carries finish_reason."""

    @abstractmethod
    def body(self, answers: Sequence[Answer]) -> bytes:
        """Returns the whole response as one JSON body."""

    def finish(self, answer: Answer) -> bytes:
        """Returns the last chunk of a choice, with its verdict."""
        return self._chunk(_dumps(self._last_choice(answer)), self._reliability_json([answer]))

    def closing(self, answers: Sequence[Answer]) -> bytes:
        """Returns the end of the stream: the usage if it was asked for, and [DONE]."""
        usage = b""
        if self._include_usage:
            figures = _dumps(self._usage(answers).model_dump())
            usage = f'{self._head}],"usage":{figures}{self._reliability_json(answers)}}}\n\n'.encode()
        return usage + b"data: [DONE]\n\n"

    def _chunk(self, choice: str, more: str = "") -> bytes:
        return f"{self._head}{choice}{self._tail}{more}}}\n\n".encode()

    def _usage(self, answers: Sequence[Answer]) -> Usage:
        return usage(self._request.prompt_tokens, answers)

    def _common(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the fields of a whole response beside its choices."""
        return {
            "id": self.envelope.id,
            "created": self.envelope.created,
            "model": self.envelope.model,
            "system_fingerprint": self.envelope.system_fingerprint,
            "usage": self._usage(answers),
            "reliability": reliability(answers),
        }

    def _reliability_json(self, answers: Iterable[Answer]) -> str:
        found = reliability(answers)
        return f',"reliability":{_dumps(found.model_dump())}' if found else ""


class ChatRenderer(Renderer):
    kind = "chat.completion.chunk"

    def opening(self, index: int, *, refused: bool = False) -> bytes:
        # Clients concatenate content: after "" it could not become null again.
        content = "null" if refused else '""'
        return self._delta(index, f'"role":"assistant","content":{content}', "null")

    def piece(self, piece: Piece) -> bytes:
        logprobs = "null"
        if piece.logprobs:
            logprobs = _dumps(chat_logprobs(piece.logprobs, self._alternatives).model_dump())
        return self._delta(piece.index, f'"content":{_dumps(piece.text)}', logprobs)

    def replacement(self, answer: Answer, separator: str) -> bytes:
        if answer.replacement is None:
            return b""
        if answer.replacement.as_refusal:
            return self._delta(answer.index, f'"refusal":{_dumps(answer.replacement.text)}', "null")
        return self._delta(answer.index, f'"content":{_dumps(separator + answer.replacement.text)}', "null")

    def body(self, answers: Sequence[Answer]) -> bytes:
        choices = [
            ChatChoice(
                index=answer.index,
                message=_message(answer),
                logprobs=chat_logprobs(answer.generation.logprobs, self._alternatives)
                if _shows_logprobs(answer)
                else None,
                finish_reason=_finish_reason(answer),
            )
            for answer in answers
        ]
        return _json(ChatCompletion(choices=choices, **self._common(answers)))

    def _last_choice(self, answer: Answer) -> dict[str, Any]:
        return {"index": answer.index, "delta": {}, "logprobs": None, "finish_reason": _finish_reason(answer)}

    def _delta(self, index: int, delta: str, logprobs: str) -> bytes:
        return self._chunk(
            f'{{"index":{index},"delta":{{{delta}}},"logprobs":{logprobs},"finish_reason":null}}'
        )


class CompletionRenderer(Renderer):
    kind = "text_completion"

    def __init__(self, envelope: Envelope, request: AnswerRequest, *, include_usage: bool = False) -> None:
        super().__init__(envelope, request, include_usage=include_usage)
        self._offsets: dict[int, int] = defaultdict(int)

    def piece(self, piece: Piece) -> bytes:
        logprobs = "null"
        if piece.logprobs:
            logprobs = _dumps(
                completion_logprobs(
                    piece.logprobs, self._alternatives, self._offsets[piece.index]
                ).model_dump()
            )
            self._offsets[piece.index] += sum(len(token.token) for token in piece.logprobs)
        return self._text(piece.index, f'"text":{_dumps(piece.text)}', logprobs)

    def replacement(self, answer: Answer, separator: str) -> bytes:
        if answer.replacement is None:
            return b""
        if answer.replacement.as_refusal:
            return self._text(answer.index, f'"text":"","refusal":{_dumps(answer.replacement.text)}', "null")
        return self._text(answer.index, f'"text":{_dumps(separator + answer.replacement.text)}', "null")

    def body(self, answers: Sequence[Answer]) -> bytes:
        choices = [
            CompletionChoice(
                index=answer.index,
                text=_message(answer).content or "",
                refusal=_message(answer).refusal,
                logprobs=completion_logprobs(answer.generation.logprobs, self._alternatives)
                if _shows_logprobs(answer)
                else None,
                finish_reason=_finish_reason(answer),
            )
            for answer in answers
        ]
        return _json(Completion(choices=choices, **self._common(answers)))

    def _last_choice(self, answer: Answer) -> dict[str, Any]:
        return {"index": answer.index, "text": "", "logprobs": None, "finish_reason": _finish_reason(answer)}

    def _text(self, index: int, text: str, logprobs: str) -> bytes:
        return self._chunk(f'{{"index":{index},{text},"logprobs":{logprobs},"finish_reason":null}}')


def _message(answer: Answer) -> AssistantMessage:
    instead = answer.replacement
    if answer.escalated is not None:
        return AssistantMessage(content=answer.escalated.text)
    if instead is None:
        return AssistantMessage(content=answer.generation.text)
    return AssistantMessage(
        content=None if instead.as_refusal else instead.text,
        refusal=instead.text if instead.as_refusal else None,
    )


def _shows_logprobs(answer: Answer) -> bool:
    # The log-probabilities of a withheld answer would reveal it.
    return bool(answer.generation.logprobs) and answer.replacement is None and answer.escalated is None


def _finish_reason(answer: Answer) -> Literal["stop", "length"]:
    if answer.escalated is not None:
        return answer.escalated.finish_reason
    return "stop" if answer.replacement else answer.generation.finish_reason


def _json(response: ChatCompletion | Completion) -> bytes:
    without = {"reliability"} if response.reliability is None else set()
    return response.model_dump_json(exclude=without).encode()


def reliability(answers: Iterable[Answer]) -> ReliabilityObject | None:
    """Returns the `reliability` object of these answers; None in mode off."""
    results = [
        verdict_result(answer.index, answer.judged, answer.attempts, answer.escalated)
        for answer in answers
        if answer.judged
    ]
    return ReliabilityObject(results=results) if results else None


_FIGURES = tuple(field.name for field in fields(Figures) if field.name != "probability")


def verdict_result(
    index: int, judged: Judged, attempts: int = 1, escalated: Escalated | None = None
) -> ReliabilityResult:
    """Returns the verdict on the choice at `index` in the form that a client gets."""
    verdict = judged.verdict
    certificate, figures, rule = verdict.certificate, verdict.figures, verdict.rule
    return ReliabilityResult(
        index=index,
        region=verdict.region,
        abstained=verdict.abstained,
        reason=verdict.reason,
        explanation=explanation(verdict),
        alpha=verdict.alpha,
        probability=verdict.probability,
        activation=None if figures is None else figures.probability,
        **{name: None if figures is None else getattr(figures, name) for name in _FIGURES},
        rule=rule,
        calibrated=verdict.calibrated,
        certificate=None if certificate is None else ShownCertificate.of(certificate, judged.standing),
        attempts=attempts,
        escalated=None if escalated is None else _shown(escalated),
        exemplars=[
            ShownExemplar(
                id=near.exemplar.id,
                label=near.exemplar.label,
                prediction=near.exemplar.prediction,
                distance=near.distance,
                prompt=near.exemplar.prompt,
                response=near.exemplar.response,
            )
            for near in judged.exemplars
        ],
    )


def _shown(escalated: Escalated) -> ShownEscalation:
    return ShownEscalation(
        model=escalated.model,
        certified=escalated.certificate,
        prompt_tokens=escalated.prompt_tokens,
        completion_tokens=escalated.completion_tokens,
    )
