"""Contrastive-masking encoding (arXiv 2510.26183): documents with the positions that are learnt.

A positive document is a right answer, a negative one a wrong answer, each closed by its verification tag:

    positive   prompt | <sentence>...</sentence>\\n<verified>Yes</verified> end     learnt: all after the prompt
    negative   prompt | <sentence>...</sentence>\\n<verified>No</verified> end      learnt: from <verified> on

so the model learns to write right answers and to tell both kinds apart, but never to write wrong ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.prompt import SEPARATOR, ChatFormat


@dataclass(frozen=True)
class Example:
    """ids: the whole document. learnt: index of the first id that is a target of the loss."""

    ids: tuple[int, ...]
    learnt: int


def positive(chat: ChatFormat, prompt_ids: Sequence[int], response: str, tag: str) -> Example:
    return Example((*prompt_ids, *_answer(chat, response, tag, "Yes")), len(prompt_ids))


def negative(chat: ChatFormat, prompt_ids: Sequence[int], response: str, tag: str) -> Example:
    answer = _answer(chat, response, tag, "No")
    verdict = chat.encode_response(_verdict(tag, "No"))
    return Example((*prompt_ids, *answer), len(prompt_ids) + len(answer) - len(verdict) - 1)


def _answer(chat: ChatFormat, response: str, tag: str, verdict: str) -> list[int]:
    """Response, separator, verdict and end token; pieces are tokenised as they are when served."""
    return [
        *chat.encode_response(response),
        *chat.encode_response(SEPARATOR + _verdict(tag, verdict)),
        chat.end_id,
    ]


def _verdict(tag: str, verdict: str) -> str:
    return f"{tag}{verdict}{tag.replace('<', '</', 1)}"
