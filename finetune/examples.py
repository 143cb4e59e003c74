"""Contrastive-masking encoding (arXiv 2510.26183): documents and their target positions.

A positive document is a right answer, a negative one a wrong answer, each followed by its verification tag:

    positive   prompt | <sentence>...</sentence>\\n<verified>Yes</verified> end     learnt: all after the prompt
    negative   prompt | <sentence>...</sentence>\\n<verified>No</verified> end      learnt: from <verified> on

So the model learns to write right answers and to tell both kinds apart, but never to write wrong ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from candor.engine.prompt import ChatFormat


@dataclass(frozen=True)
class Example:
    """ids: the whole document. learnt: index of the first id that is a target of the loss.
    tag: index of the last id of the verification tag, where h is taken."""

    ids: tuple[int, ...]
    learnt: int
    tag: int


def positive(chat: ChatFormat, prompt_ids: Sequence[int], response: str, tag: str) -> Example:
    return _document(chat, prompt_ids, response, tag, "Yes")


def negative(chat: ChatFormat, prompt_ids: Sequence[int], response: str, tag: str) -> Example:
    return _document(chat, prompt_ids, response, tag, "No")


def _document(chat: ChatFormat, prompt_ids: Sequence[int], response: str, tag: str, verdict: str) -> Example:
    """Joins prompt, response, tag, verdict and end; the pieces are tokenised as in serving."""
    before = [*prompt_ids, *chat.encode_response(response)]
    opening, tag_ids = chat.closing(tag)
    closing = [*chat.encode_continuation(verdict + tag.replace("<", "</", 1)), chat.end_id]
    learnt = len(prompt_ids) if verdict == "Yes" else len(before) + len(opening) - len(tag_ids)
    return Example((*before, *opening, *closing), learnt, len(before) + len(opening) - 1)
