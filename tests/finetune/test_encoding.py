"""Texts made of what an SDM language model writes, also when it's malformed."""

from __future__ import annotations

import pytest

from candor.finetune.encoding import Parsed, hard_negative, parse, verification_input

GOOD = "<sentence>A b.</sentence>\n<verified>"


@pytest.mark.parametrize(
    ("generated", "judged"),
    [
        (GOOD + "Yes</verified>", GOOD),
        (GOOD + "No</verified>\n\n", GOOD),
        ("  plain \n", "plain\n<verified>"),
        ("", "\n<verified>"),
        (GOOD + "Yes", GOOD + "Yes\n<verified>"),
        (GOOD + "Maybe</verified>", GOOD + "Maybe</verified>\n<verified>"),
        (GOOD + "Yes</verified> more", GOOD + "Yes</verified> more\n<verified>"),
        (GOOD + "No</verified>\n" + GOOD + "Yes</verified>", GOOD + "No</verified>\n" + GOOD),
    ],
)
def test_the_input_ends_with_the_tag_and_the_negative_with_no(generated: str, judged: str) -> None:
    assert verification_input(generated) == judged
    assert hard_negative(generated) == judged + "No</verified>\n\n"


def test_a_negative_of_a_negative_is_itself() -> None:
    once = hard_negative(GOOD + "Yes</verified>")
    assert hard_negative(once) == once


def test_parsing_stops_after_the_first_yes() -> None:
    def answer(text: str, verdict: str) -> str:
        return f"<sentence>{text}</sentence>\n<verified>{verdict}</verified>\n\n"

    text = answer("a", "No") + answer("b", "Yes") + answer("c", "No")
    assert parse(text) == Parsed(["a", "b"], [False, True])
    assert parse(GOOD + "Yes") == Parsed([], [])
    assert parse("") == Parsed([], [])


@pytest.mark.parametrize(
    ("generated", "sentences", "verifications"),
    [
        ("<sentence>a</sentence>\n<verified>no</verified>", ["a"], [False]),
        ("<sentence>a</sentence>\n<verified> YES </verified>", ["a"], [True]),
        ("<sentence>\n a b\t</sentence>\n<verified>\nyes</verified>", ["a b"], [True]),
        ("<sentence>a</sentence><verified>No</verified> so <sentence>b</sentence> <verified>Yes</verified>",
         ["a", "b"], [False, True]),
        ("<sentence>a</sentence>\n<verified>Maybe</verified>", ["a"], [False]),
        ("<sentence>a</sentence>\n<verified></verified>", ["a"], [False]),
        # Only as many as both there are of; tags in another case are none.
        ("<sentence>a</sentence><sentence>b</sentence><verified>No</verified>", ["a"], [False]),
        ("<Sentence>a</Sentence>\n<verified>Yes</verified>", [], []),
        ("<verified>Yes</verified>", [], []),
        # By their order, not by what stands beside them.
        ("no tag\n<verified>No</verified>\n<sentence>a</sentence>\n<verified>Yes</verified>", ["a"], [False]),
    ],
)  # fmt: skip
def test_parsing_minds_neither_case_nor_blanks(
    generated: str, sentences: list[str], verifications: list[bool]
) -> None:
    assert parse(generated) == Parsed(sentences, verifications)
