"""LangChain's ChatOpenAI that keeps what it otherwise drops: the verdict, and a refusal's text.

    model = ChatCandor(base_url="http://127.0.0.1:8000/v1", api_key="none", model="word-ordering",
                       extra_body={"reliability": {"mode": "abstain"}})
    message = model.invoke("...")
    message.content, message.response_metadata["reliability"]["results"][0]["region"]

A withheld answer's `content` is the refusal, whole and streamed, and `additional_kwargs["refusal"]` is the same text.
Copy this file; it needs langchain-openai alone.
"""

from __future__ import annotations

from typing import Any

from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI


class ChatCandor(ChatOpenAI):
    """Of Chat Completions. With `use_responses_api=True` LangChain shows refusals itself."""

    def _create_chat_result(self, response: Any, generation_info: dict[str, Any] | None = None) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        body = response if isinstance(response, dict) else response.model_extra or {}
        for generation in result.generations:
            message = generation.message
            message.content = message.content or message.additional_kwargs.get("refusal") or ""
            message.response_metadata["reliability"] = body.get("reliability")
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        choices = chunk.get("choices") or []
        for choice in choices:
            if refusal := (choice.get("delta") or {}).get("refusal"):
                choice["delta"]["content"] = refusal
        piece = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        if piece is not None and choices:
            if refusal := (choices[0].get("delta") or {}).get("refusal"):
                piece.message.additional_kwargs["refusal"] = refusal
            # The usage chunk has the verdict again; LangChain would join both into one text.
            if reliability := chunk.get("reliability"):
                piece.message.response_metadata["reliability"] = reliability
        return piece
