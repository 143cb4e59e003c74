"""Messages to token ids, and back: the chat template and the verification tag, the same for every engine.

A chat template marks who speaks with control tokens (`<|im_start|>`, ...). Were a user's text rendered into
the template and the whole tokenised, a user who types a marker would speak as somebody else. So the
template is rendered with placeholders, cut at them, and each text is tokenised by itself with
control tokens switched off: what a user writes is only ever text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SEPARATOR = "\n"
"""Stands between an answer and its tag."""

# Private-use characters: no chat template contains them, and texts are not rendered, so none can clash.
_PLACEHOLDER = "\ue000{}\ue001"
_PLACEHOLDERS = re.compile("\ue000([0-9]+)\ue001")


class ChatFormat:
    """One model's tokenizer and chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_directory(cls, path: Path) -> ChatFormat:
        """Reads tokenizer and template of the model at `path`; asks no hub and runs no remote code."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        return cls(tokenizer)

    @property
    def template(self) -> str:
        """The chat template's source, empty where the model has none."""
        return self._tokenizer.chat_template or ""

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        end: int = self._tokenizer.eos_token_id
        return end

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], template_arguments: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Ids of a conversation ({"role", "content"} each) up to where the assistant's answer begins.

        template_arguments: what the template is given besides, such as {"enable_thinking": false}.

        Raises ValueError where the model has no template or the template refuses the conversation.
        """
        if not self.template:
            raise ValueError("this model has no chat template; use plain completions instead")
        marked = [{"role": m["role"], "content": _PLACEHOLDER.format(i)} for i, m in enumerate(messages)]
        try:
            rendered = self._tokenizer.apply_chat_template(
                marked, tokenize=False, add_generation_prompt=True, **(template_arguments or {})
            )
        except Exception as error:  # jinja2's own errors and those a template raises have no common base
            raise ValueError(f"the model's chat template refused these messages: {error}") from error
        ids: list[int] = []
        for position, piece in enumerate(_PLACEHOLDERS.split(rendered)):
            if position % 2:  # odd pieces are the placeholders' numbers
                ids += self.encode_response(messages[int(piece)]["content"])
            elif piece:
                ids += self._tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of a plain prompt, with the start token where the tokenizer sets one."""
        ids: list[int] = self._tokenizer(text, split_special_tokens=True)["input_ids"]
        return ids

    def encode_response(self, text: str) -> list[int]:
        """Ids of a text within a conversation; control tokens are never made from it."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def is_blank(self, token_id: int) -> bool:
        """Whether a token shows nothing: white space or a control token."""
        return not self.decode([token_id]).strip()
