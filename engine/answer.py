"""Collects a generated answer, text and tokens, and removes the verification tag.

The filter holds back text that may become the tag: any prefix of the tag and the white space before it. So the tag
and the text after it never reach the client, streamed or not.

Log-probabilities follow the text: a token's log-probability is sent once all of its text has been shown. If a stop
string cut the text, tokens beyond or across the cut have none. Otherwise every answer token has one; tokens whose
texts do not add up to the text shown (several may make one character) are sent at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from candor.engine.base import Delta, TokenLogprob


class TagFilter:
    """Takes pieces of text and returns what may be shown.

    alone: whether the tag counts only at the beginning of a line, since elsewhere it may be part of a text in JSON,
    which holds no line break. found: whether the tag has come; the filter drops everything from the tag on.
    """

    def __init__(self, tag: str, *, alone: bool = False) -> None:
        self._tag = tag
        self._alone = alone
        self._held = ""
        self._begun = False  # whether anything was shown
        self.found = False

    @property
    def begins_tag(self) -> bool:
        """Whether more than white space is held back."""
        return bool(self._held.strip())

    def feed(self, piece: str) -> str:
        if self.found:
            return ""
        text = self._held + piece
        start = text.find(self._tag)
        while start >= 0 and self._alone and not self._begins_line(text[:start]):
            start = text.find(self._tag, start + 1)
        if start >= 0:
            self.found, self._held = True, ""
            return text[:start].rstrip()
        keep = max(n for n in range(len(self._tag)) if text.endswith(self._tag[:n]))
        shown = text[: len(text) - keep].rstrip()
        self._held = text[len(shown) :]
        self._begun = self._begun or bool(shown)
        return shown

    def _begins_line(self, before: str) -> bool:
        """before: the text before a tag, as far as it was not shown."""
        said = before.rstrip()
        return "\n" in before[len(said) :] or not (said or self._begun)

    def finish(self, *, cut: bool = False) -> str:
        """Returns the text still held back when the text ends without a tag. cut: the limit on its length ended it;
        what may be the beginning of a tag is then dropped."""
        rest, self._held = self._held, ""
        return "" if cut and rest.strip() else rest


@dataclass
class AnswerText:
    """Collects what an engine generates, tag and end token included, and shows the part that is the answer.

    token_ids: all generated tokens. logprobs: one entry per token, or none at all.
    report_logprobs: whether deltas carry log-probabilities. tag_alone: `TagFilter`'s alone.
    """

    tag_text: str
    tag_ids: Sequence[int]
    report_logprobs: bool = False
    tag_alone: bool = False
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._filter = TagFilter(self.tag_text, alone=self.tag_alone)
        self._text = ""
        self._reported = 0  # tokens whose log-probabilities were sent
        self._reported_length = 0  # characters of those tokens

    @property
    def text(self) -> str:
        return self._text

    @property
    def reported_logprobs(self) -> tuple[TokenLogprob, ...]:
        """All log-probabilities sent in deltas so far."""
        return tuple(self.logprobs[: self._reported])

    @property
    def tag_found(self) -> bool:
        """Whether the text contains the tag, however the tag was tokenised."""
        return self._filter.found

    def add(
        self, piece: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()
    ) -> Delta | None:
        """Adds one step's text and tokens; returns what may be shown, or None.

        The first step always returns a delta, if only "", so that a stream begins when the model does.
        """
        begins = not self.token_ids
        self.token_ids += token_ids
        self.logprobs += logprobs
        return self._show(self._filter.feed(piece)) or (Delta("") if begins else None)

    def finish(self, length: int | None, *, stopped: bool, cut: bool = False) -> Delta | None:
        """Ends the text and returns what was held back, or None.

        length: the number of answer tokens, from `length`. stopped: whether a stop string ended the text, which
        then ends before that string. If so, or if length is None, only the text tells which tokens were shown.
        cut: whether the limit on its length ended it.
        """
        shown = self._filter.finish(cut=cut)
        whole = None if stopped and not self.tag_found else length
        return self._show(shown, whole or 0)

    def length(self, is_blank: Callable[[int], bool], *, cut: bool = False) -> int | None:
        """Number of `token_ids` that are the answer: those before the tag, without trailing blanks and end tokens.

        None if the tag was written in other tokens than its own, or the limit on the answer's length (`cut`) fell
        inside of it: then no token need end where the answer ends.
        """
        if cut and self._filter.begins_tag:
            return None
        length = _find(self.token_ids, self.tag_ids)
        if length is None:
            if self.tag_found:
                return None
            length = len(self.token_ids)
        while length and is_blank(self.token_ids[length - 1]):
            length -= 1
        return length

    def closing(self, length: int) -> list[int]:
        """What was written after the first `length` tokens, up to the tag's last; empty without the tag's tokens."""
        start = _find(self.token_ids, self.tag_ids)
        return [] if start is None else self.token_ids[length : start + len(self.tag_ids)]

    def _show(self, shown: str, least: int = 0) -> Delta | None:
        """least: number of tokens whose log-probabilities are due, regardless of their texts."""
        self._text += shown
        due = self._due(least) if self.report_logprobs else ()
        return Delta(shown, due) if shown or due else None

    def _due(self, least: int) -> tuple[TokenLogprob, ...]:
        first, length = self._reported, self._reported_length
        for number, entry in enumerate(self.logprobs[first:], first + 1):
            length += len(entry.token)
            if length > len(self._text):
                break
            if entry.token:  # an empty one is part of a character or an end token: it waits for the next text
                self._reported, self._reported_length = number, length
        self._reported = max(self._reported, min(least, len(self.logprobs)))
        return tuple(self.logprobs[first : self._reported])


def _find(ids: Sequence[int], tag: Sequence[int]) -> int | None:
    """Index of the first occurrence of `tag` in `ids`."""
    width = len(tag)
    return next((i for i in range(len(ids) - width + 1) if list(ids[i : i + width]) == list(tag)), None)
