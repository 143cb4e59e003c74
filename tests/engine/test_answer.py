"""The tag never shows, however the text is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from candor.engine.answer import Answer, TagFilter
from candor.engine.base import Delta

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
    answer = Answer(TAG, (7, 8))
    assert [answer.add(piece, [1]) for piece in ("<", "ver", "dict>")] == [
        Delta(""),
        None,
        Delta("<verdict>"),
    ]


def blank(token: int) -> bool:
    return token in (0, 9)


def test_length_stops_before_tag_blanks_and_end() -> None:
    answer = Answer(TAG, (7, 8))
    answer.add("text" + TAG, [1, 2, 0, 7, 8, 3])
    assert answer.length(blank) == 2
    assert answer.text == "text"


def test_length_without_a_tag() -> None:
    answer = Answer(TAG, (7, 8))
    answer.add("text", [1, 2, 7, 0, 9])
    assert answer.length(blank) == 3


def test_length_is_unknown_when_the_tag_came_in_other_tokens() -> None:
    answer = Answer(TAG, (7, 8))
    answer.add("text" + TAG, [1, 2, 5, 6])
    assert answer.tag_found
    assert answer.length(blank) is None
