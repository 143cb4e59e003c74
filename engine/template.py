"""Renders a conversation with the model's chat template and separates the users' text from the template's own.

Without it, a user who types a control token could speak in another role. Three renderings tell the two apart:

    real     the texts as they are: what the model is to read
    marked   each text replaced by a placeholder: shows where the texts are, if the template only copies them
    hidden   only the markers (control tokens) within the texts replaced, each by as many blanks that no text contains

If marked, with the texts put back, equals real, the template copied them, and the pieces are exact. A template that
looks into the texts (trims them, drops earlier thinking, slices) gives something else. Then hidden is compared with
real, character by character: what it hides is the users' text. A marker that the template itself looks for must stay
visible to it and may not remain in the result. If none of this fits, the conversation is refused.
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
"""Maximum markers within the texts of one conversation that are tried one by one; each costs a rendering."""


@dataclass(frozen=True)
class Rendered:
    """pieces: in order, each with a flag: True for a user's text, which contains no control token.
    own: the template's own pieces, without texts; the whole may have only their control tokens.
    """

    pieces: tuple[tuple[str, bool], ...]
    own: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(piece for piece, _ in self.pieces)


def render(template: Callable[[Messages], str], messages: Messages, markers: Iterable[str]) -> Rendered:
    """template: renders messages ({"role", "content"} each). markers: strings that would be control tokens in a text.

    Raises ValueError if the users' part of the rendering cannot be determined; errors of the template pass through.
    """
    real = template(messages)
    texts = [message["content"] for message in messages]
    # A blank text is kept as it is: templates leave out empty texts.
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
    """Whether the two are equal except for characters hidden in either."""
    return len(one) == len(other) and all(
        a in (b, _BLANK) or b == _BLANK for a, b in zip(one, other, strict=True)
    )


def _laid_over(real: str, hidden: str) -> list[tuple[str, bool]]:
    pieces, at = [], 0
    for number, piece in enumerate(_BLANKS.split(hidden)):
        pieces.append((real[at : at + len(piece)], bool(number % 2)))
        at += len(piece)
    return pieces
