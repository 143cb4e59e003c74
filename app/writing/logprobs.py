"""Log-probabilities of an answer's tokens in OpenAI's two formats: chat and the older completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from candor.app.edge.schemas.responses import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from candor.engine.base import TokenLogprob

_LEAST = -9999.0
"""It replaces -inf and nan, which JSON lacks."""


def chat_logprobs(tokens: Sequence[TokenLogprob], alternatives: int) -> ChatLogprobs:
    """alternatives: maximum per token; an engine may return more than the request asked for."""
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                **_logprob(token.token, token.logprob),
                top_logprobs=[
                    TopLogprob(**_logprob(text, value)) for _, text, value in token.top[:alternatives]
                ],
            )
            for token in tokens
        ]
    )


def completion_logprobs(
    tokens: Sequence[TokenLogprob], alternatives: int, offset: int = 0
) -> CompletionLogprobs:
    """offset: where the first token starts in the text, in characters. alternatives: maximum per token."""
    offsets = [offset]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token.token))
    return CompletionLogprobs(
        tokens=[token.token for token in tokens],
        token_logprobs=[_finite(token.logprob) for token in tokens],
        top_logprobs=[
            {text: _finite(value) for _, text, value in token.top[:alternatives]} for token in tokens
        ],
        text_offset=offsets[: len(tokens)],
    )


def _logprob(text: str, value: float) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(value), "bytes": list(text.encode("utf-8", "replace"))}


def _finite(logprob: float) -> float:
    return _LEAST if math.isnan(logprob) else max(logprob, _LEAST)
