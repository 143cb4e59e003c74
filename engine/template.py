"""A conversation rendered by the model's chat template, with what users wrote kept apart from the template's own.

Whoever cannot tell the two apart lets a user who types a control token speak as somebody else. Three renderings tell:

    real     the texts as they are: what the model is to read
    marked   each text replaced by a placeholder: where the texts stand, if the template only copies them
    hidden   only the markers (control tokens) within the texts replaced, each by as many blanks that no text contains

Where marked, with the texts put back, is real, the template copied them, and the pieces are exact. A template that
looks into the texts (trims them, drops earlier thinking, slices) gives something else; then hidden is laid over real,
character by character, and what it hides is the users'. A marker that the template itself looks for must be shown to
it, and may not be left over. Where none of this fits, the conversation is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

Messages = Sequence[Mapping[str, str]]

# Private-use characters: no chat template contains them.
_PLACEHOLDER = "\ue000{}\ue001"
_PLACEHOLDERS = re.compile("\ue000([0-9]+)\ue001")
_BLANK = "\ue002"
_BLANKS = re.compile(f"({_BLANK}+)")

MOST_READ = 32
"""Markers within the texts of one conversation that are tried one by one, each a rendering."""


@dataclass(frozen=True)
class Rendered:
    """pieces: in order, each with whether it is text alone, in which nothing is a control token.
    own: the template's own pieces, without any text: what control tokens the whole may have.
    """

    pieces: tuple[tuple[str, bool], ...]
    own: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(piece for piece, _ in self.pieces)


def render(template: Callable[[Messages], str], messages: Messages, markers: Iterable[str]) -> Rendered:
    """template: renders messages ({"role", "content"} each). markers: what within a text would be a control token.

    Raises ValueError where it cannot be told what of the rendering is the users', and what the template raises.
    """
    real = template(messages)
    texts = [message["content"] for message in messages]
    # A text without a word stays: templates leave out what is empty.
    marked = template(
        _with(messages, (_PLACEHOLDER.format(i) if t.strip() else t for i, t in enumerate(texts)))
    )
    split = _PLACEHOLDERS.split(marked)
    own = tuple(split[::2])
    pieces = [(texts[int(piece)], True) if n % 2 else (piece, False) for n, piece in enumerate(split)]
    if "".join(piece for piece, _ in pieces) != real:
        pieces = _laid_over(real, _hidden(template, messages, markers, real))
    return Rendered(tuple(one for one in pieces if one[0]), own)


def _hidden(
    template: Callable[[Messages], str], messages: Messages, markers: Iterable[str], real: str
) -> str:
    longest_first = sorted(markers, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    found = [(i, marker) for i, m in enumerate(messages) for marker in set(pattern.findall(m["content"]))]

    def hiding(shown: Collection[tuple[int, str]]) -> str:
        def hide(number: int, text: str) -> str:
            return pattern.sub(lambda m: m[0] if (number, m[0]) in shown else _BLANK * len(m[0]), text)

        return template(_with(messages, (hide(i, m["content"]) for i, m in enumerate(messages))))

    hidden = hiding(())
    if not _fit(hidden, real) and len(found) <= MOST_READ:
        hidden = hiding([one for one in found if not _fit(hiding([one]), hidden)])
    if not _fit(hidden, real):
        raise ValueError(
            "the model's chat template changes these messages so that it cannot be told what of them is text; "
            "leave control tokens out of the messages"
        )
    return hidden


def _with(messages: Messages, texts: Iterable[str]) -> list[dict[str, str]]:
    return [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]


def _fit(one: str, other: str) -> bool:
    """The same but for what either hides."""
    return len(one) == len(other) and all(
        a in (b, _BLANK) or b == _BLANK for a, b in zip(one, other, strict=True)
    )


def _laid_over(real: str, hidden: str) -> list[tuple[str, bool]]:
    pieces, at = [], 0
    for number, piece in enumerate(_BLANKS.split(hidden)):
        pieces.append((real[at : at + len(piece)], bool(number % 2)))
        at += len(piece)
    return pieces
