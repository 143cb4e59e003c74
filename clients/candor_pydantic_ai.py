"""pydantic-ai's OpenAIChatModel that keeps the verdict.

    model = CandorModel("word-ordering", provider=OpenAIProvider(base_url="http://127.0.0.1:8000/v1", api_key="none"))
    result = await Agent(model).run("...")
    result.all_messages()[-1].provider_details["reliability"]["results"][0]["region"]

An abstention raises pydantic-ai's own ContentFilterError, with the refusal's text, whole and streamed.
Copy this file; it needs pydantic-ai-slim[openai] alone.
"""

from __future__ import annotations

from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIStreamedResponse


def _with_verdict(
    details: dict[str, Any] | None, body: ChatCompletion | ChatCompletionChunk
) -> dict[str, Any] | None:
    found = (body.model_extra or {}).get("reliability")
    return details if found is None else (details or {}) | {"reliability": found}


class _Streamed(OpenAIStreamedResponse):
    def _map_provider_details(self, chunk: ChatCompletionChunk) -> dict[str, Any] | None:
        return _with_verdict(super()._map_provider_details(chunk), chunk)


class CandorModel(OpenAIChatModel):
    def _process_provider_details(self, response: ChatCompletion) -> dict[str, Any] | None:
        return _with_verdict(super()._process_provider_details(response), response)

    @property
    def _streamed_response_cls(self) -> type[OpenAIStreamedResponse]:
        return _Streamed
