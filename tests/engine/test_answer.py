"""The tag never shows, however the text is cut into pieces; log-probabilities are those of the tokens shown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from candor.engine.answer import AnswerText, TagFilter
from candor.engine.base import Delta, TokenLogprob

TAG = "<verified>"


def show(pieces: list[str]) -> tuple[list[str], TagFilter]:
    tag = TagFilter(TAG)
    return [*(tag.feed(piece) for piece in pieces), tag.finish()], tag


@given(st.text(alphabet="ab <>/verifd\n", max_size=30), st.lists(st.integers(0, 60), max_size=8))
def test_pieces_make_no_difference(answer: str, cuts: list[int]) -> None:
    for text in (answer, answer + "\n" + TAG + "Yes</verified>"):
        at = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
        shown, tag = show([text[a:b] for a, b in pairwise(at)])
        start = text.find(TAG)
        assert tag.found == (start >= 0)
        assert "".join(shown) == (text[:start].rstrip() if tag.found else text)


def test_what_cannot_be_the_tag_is_shown_at_once() -> None:
    shown, _ = show(["one", " two", " <ver", "y nice>"])
    assert shown == ["one", " two", "", " <very nice>", ""]


def test_text_after_the_tag_is_swallowed() -> None:
    shown, tag = show(["right", "\n<veri", "fied>Yes</verified> and more", " and more"])
    assert tag.found
    assert "".join(shown) == "right"


def test_the_first_step_shows_something_even_where_all_of_it_is_held_back() -> None:
    answer = AnswerText(TAG, (7, 8))
    assert [answer.add(piece, [1]) for piece in ("<", "ver", "dict>")] == [
        Delta(""),
        None,
        Delta("<verdict>"),
    ]


def blank(token: int) -> bool:
    return token in (0, 9)


def test_length_stops_before_tag_blanks_and_end() -> None:
    answer = AnswerText(TAG, (7, 8))
    answer.add("text" + TAG, [1, 2, 0, 7, 8, 3])
    assert answer.length(blank) == 2
    assert answer.text == "text"


def test_length_without_a_tag() -> None:
    answer = AnswerText(TAG, (7, 8))
    answer.add("text", [1, 2, 7, 0, 9])
    assert answer.length(blank) == 3


def test_length_is_unknown_when_the_tag_came_in_other_tokens() -> None:
    answer = AnswerText(TAG, (7, 8))
    answer.add("text" + TAG, [1, 2, 5, 6])
    assert answer.tag_found
    assert answer.length(blank) is None


def stream(
    pieces: Sequence[tuple[str, str]], *, stopped: bool = False
) -> tuple[str, list[tuple[str, list[str]]], list[str]]:
    """(text shown in this step, the token's own text) a step -> the answer, deltas with their tokens, all tokens.

    Ids count from 20, but for the tag's, 7 and 8, blanks, 0, and the end, 9.
    """
    answer = AnswerText(TAG, (7, 8), report_logprobs=True)
    known = {"<veri": 7, "fied>": 8, "\n": 0, "<|end|>": 9}
    deltas = []
    for number, (text, token) in enumerate(pieces, 20):
        entry = TokenLogprob(known.get(token, number), token, -0.5)
        deltas.append(answer.add(text, [entry.token_id], [entry]))
    deltas.append(answer.finish(answer.length(blank), stopped=stopped))
    told = [(delta.text, [entry.token for entry in delta.logprobs]) for delta in deltas if delta]
    whole = [entry.token for entry in answer.reported_logprobs]
    assert [token for _, tokens in told for token in tokens] == whole
    assert "".join(text for text, _ in told) == answer.text
    return answer.text, told, whole


def as_they_come(*tokens: str) -> list[tuple[str, str]]:
    return [(token, token) for token in tokens]


def test_a_tokens_log_probability_comes_with_its_text() -> None:
    _, told, whole = stream(as_they_come("The", " ran", "."))
    assert told == [("The", ["The"]), (" ran", [" ran"]), (".", ["."])]
    assert whole == ["The", " ran", "."]


@pytest.mark.parametrize(
    ("shown", "whole"),
    [
        (("The", " children ", ""), ["The", " children"]),  # a blank of " ran" is shown, not all of it
        (("The", " children", ""), ["The", " children"]),
        (("The", " child", ""), ["The"]),
        (("", "", ""), []),
    ],
)
def test_a_stop_string_leaves_the_tokens_that_lie_wholly_before_it(
    shown: tuple[str, ...], whole: list[str]
) -> None:
    tokens = ("The", " children", " ran")
    assert stream(list(zip(shown, tokens, strict=True)), stopped=True)[2] == whole


@given(st.lists(st.text("ab c", min_size=1, max_size=4), min_size=1, max_size=8), st.data())
def test_wherever_a_stop_string_cuts_and_however_late_text_comes(
    tokens: list[str], data: st.DataObject
) -> None:
    text = "".join(tokens)
    cut = data.draw(st.integers(0, len(text)))
    ends = [len("".join(tokens[: i + 1])) for i in range(len(tokens))]
    bounds = [0, *sorted(data.draw(st.integers(0, min(end, cut))) for end in ends[:-1]), cut]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    shown, _, whole = stream(list(zip(pieces, tokens, strict=True)), stopped=True)
    assert shown == text[:cut]
    assert whole == [token for token, end in zip(tokens, ends, strict=True) if end <= cut]


def test_text_that_comes_later_than_its_token_brings_it_along() -> None:
    """As where an engine holds back what may become a stop string."""
    late = [("", "The"), ("Th", " children"), ("e childr", " ran"), ("en ran", "<|end|>")]
    _, told, whole = stream(late)
    assert told == [("", []), ("Th", []), ("e childr", ["The"]), ("en ran", [" children", " ran"])]
    assert whole == ["The", " children", " ran"]


def test_tokens_that_make_one_character_together() -> None:
    # Without text of their own, they go out with the one that completes it.
    _, told, whole = stream([("a", "a"), ("", ""), ("", ""), ("\u20ac", "\u20ac"), ("", "<|end|>")])
    assert told == [("a", ["a"]), ("\u20ac", ["", "", "\u20ac"])]
    assert whole == ["a", "", "", "\u20ac"]
    # With one that does not add up, they and what follows go out at the end.
    marks = [("a", "a"), ("", "\ufffd"), ("", "\ufffd"), ("\u20ac", "\ufffd"), (" b", " b"), ("", "<|end|>")]
    _, told, whole = stream(marks)
    assert whole == ["a", "\ufffd", "\ufffd", "\ufffd", " b"]
    assert told[-1] == ("", [" b"])
    # Half a character is no text, but an answer's token.
    assert stream([("a", "a"), ("", "")])[2] == ["a", ""]


def test_a_stop_string_after_half_a_character_leaves_it_out() -> None:
    assert stream([("a", "a"), ("", ""), ("", "\u20ac")], stopped=True)[2] == ["a"]


def test_the_tag_and_the_blanks_before_it_have_none() -> None:
    text, _, whole = stream(as_they_come("Yes", ".", "\n", "<veri", "fied>", "Yes"))
    assert (text, whole) == ("Yes.", ["Yes", "."])
    # A token that is partly a blank before the tag is the answer's last.
    text, told, whole = stream(as_they_come("Yes", ".\n", "<veri", "fied>"))
    assert (text, whole) == ("Yes.", ["Yes", ".\n"])
    assert told[-1] == ("", [".\n"])


def test_a_stop_string_after_the_tag_cuts_nothing() -> None:
    pieces = [*as_they_come("Yes", ".\n", "<veri", "fied>"), ("", "stop")]
    assert stream(pieces, stopped=True)[2] == ["Yes", ".\n"]


def test_a_tag_in_other_tokens_leaves_those_before_it() -> None:
    text, _, whole = stream(as_they_come("Yes", ".\n", "<", "verified", ">"))
    assert (text, whole) == ("Yes.", ["Yes"])


def test_closing_blanks_that_are_shown_have_theirs() -> None:
    text, _, whole = stream([*as_they_come("Yes", "\n"), ("", "<|end|>")])
    assert (text, whole) == ("Yes\n", ["Yes", "\n"])


def test_without_being_asked_none_are_reported() -> None:
    answer = AnswerText(TAG, (7, 8))
    assert answer.add("a", [20], [TokenLogprob(20, "a", -0.5)]) == Delta("a")
    assert answer.finish(1, stopped=False) is None
    assert answer.reported_logprobs == ()
    assert len(answer.logprobs) == 1


def test_what_closes_an_answer_is_what_was_written() -> None:
    answer = AnswerText(TAG, (7, 8))
    answer.token_ids += [20, 21, 5, 7, 8, 30]  # 5: a blank
    assert answer.length(lambda token: token == 5) == 2
    assert answer.closing(2) == [5, 7, 8]
    other = AnswerText(TAG, (7, 8), token_ids=[20, 21, 30])
    assert other.closing(2) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"a": "x <verified>Yes"}', '{"a": "x <verified>Yes"}'),
        ("The answer.\n<verified>Yes</verified>", "The answer."),
        ("<verified>Yes</verified>", ""),
        ('{"a": "<verified>"}\n <verified>Yes', '{"a": "<verified>"}'),
    ],
)
@given(data=st.data())
def test_where_it_may_be_part_of_a_text_the_tag_counts_at_the_beginning_of_a_line(
    text: str, shown: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    tag = TagFilter(TAG, alone=True)
    pieces = [tag.feed(text[start:end]) for start, end in pairwise(cuts)]
    assert "".join([*pieces, tag.finish()]) == shown
