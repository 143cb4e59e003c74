"""Checks what fits a model's context, by the same rule in every engine.

An answer can be scored only if its tag can still be fed, and one token is sampled after it. Both are reserved.
"""

from __future__ import annotations

from candor.engine.base import PromptTooLong


def room_for_answer(prompt: int, closing: int, max_model_len: int) -> int:
    """Maximum answer tokens after `prompt` tokens, with `closing` tokens for separator and tag.

    Raises PromptTooLong if none is left.
    """
    room = max_model_len - prompt - closing - 1
    if room < 1:
        raise PromptTooLong(
            f"the prompt takes {prompt} tokens; at most {prompt + room - 1} fit beside an "
            f"answer in this model's {max_model_len}"
        )
    return room


def require_fit(total: int, max_model_len: int) -> None:
    """Raises PromptTooLong if `total` tokens of prompt, response and tag leave none to sample."""
    if total >= max_model_len:
        raise PromptTooLong(
            f"prompt and response take {total} tokens with the tag; at most {max_model_len - 1} fit"
        )
