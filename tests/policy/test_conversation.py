"""Which conversations are those that were calibrated; every other one departs."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from candor.policy.conversation import Conversations, SystemPrompt, Turn, order, shown, taken_apart

BRIEF = "Be brief."


def turns(*said: tuple[str, str]) -> list[Turn]:
    return [{"role": role, "content": content} for role, content in said]


ASK = ("user", "ask")
SINGLE = turns(ASK)
NEXT = turns(ASK, ("assistant", "ok"), ("user", "and?"))
LED = turns(("system", BRIEF), ASK)


def departs(calibrated: Conversations, asked: list[Turn]) -> str | None:
    return calibrated.resolve(asked).departure


def test_without_a_system_prompt_none_is_calibrated() -> None:
    plain = Conversations.of_records([SINGLE])
    assert plain == Conversations(SystemPrompt("none"), ("user",), {})
    assert departs(plain, SINGLE) is None
    assert departs(plain, LED) == "it has a system prompt, and calibration had none"
    assert departs(plain, turns(("system", ""), ASK)) is not None
    assert plain.resolve(LED).turns == tuple(LED)  # put to the model as it was asked


def test_a_fixed_one_leads_and_no_other_does() -> None:
    fixed = Conversations.of_records([SINGLE], BRIEF)
    assert fixed.system_prompt == SystemPrompt("fixed", BRIEF)
    assert fixed.resolve(SINGLE).turns == tuple(LED)
    assert departs(fixed, SINGLE) is None
    assert departs(fixed, LED) is None
    assert fixed.resolve(LED).turns == tuple(LED)  # not twice
    for other in ("Be brief. ", "Be long.", ""):
        assert departs(fixed, turns(("system", other), ASK)) == "its system prompt is not the calibrated one"
    late = turns(ASK, ("system", BRIEF))
    assert fixed.resolve(late).turns == tuple(late)
    assert departs(fixed, late) is not None


def test_the_records_own_are_known_by_digest() -> None:
    own = Conversations.of_records([LED, turns(("system", "Be long."), ASK)])
    assert own.system_prompt.kind == "records"
    assert hashlib.sha256(BRIEF.encode()).hexdigest() in own.system_prompt.digests
    assert departs(own, LED) is None
    assert departs(own, turns(("system", "Be long."), ASK)) is None
    assert departs(own, turns(("system", "Lie."), ASK)) is not None
    assert departs(own, SINGLE) == "it has no system prompt, and every calibration record had one"
    assert departs(Conversations.of_records([LED, SINGLE]), SINGLE) is None


@pytest.mark.parametrize(
    ("calibrated", "asked", "known"),
    [
        ([SINGLE], SINGLE, True),
        ([SINGLE], NEXT, False),
        ([NEXT], SINGLE, False),
        ([SINGLE, NEXT], NEXT, True),
        ([NEXT], turns(ASK, ("assistant", "x"), ASK, ("assistant", "x"), ASK), False),
        ([SINGLE], turns(ASK, ASK), False),
        ([SINGLE], turns(("assistant", "hello"), ASK), False),
    ],
)
def test_turns_that_calibration_never_saw(
    calibrated: list[list[Turn]], asked: list[Turn], known: bool
) -> None:
    assert (departs(Conversations.of_records(calibrated), asked) is None) is known


def test_template_arguments() -> None:
    thinking = Conversations.of_records([SINGLE], None, {"enable_thinking": False})
    assert thinking.resolve(SINGLE).template_arguments == {"enable_thinking": False}
    assert departs(thinking, SINGLE) is None
    assert thinking.resolve(SINGLE, {"enable_thinking": False}).departure is None
    assert thinking.resolve(SINGLE, {"enable_thinking": True}).departure is not None
    assert thinking.resolve(SINGLE, {}).departure is not None
    assert Conversations().resolve(SINGLE, {"x": 1}).departure is not None


def test_a_grammar_is_the_engines_and_not_the_templates() -> None:
    held = Conversations.of_records([SINGLE], None, {"structured_outputs": {"regex": "a"}, "x": 1})
    assert held.grammar == '{"regex": "a"}'
    assert held.for_template == held.resolve(SINGLE).template_arguments == {"x": 1}
    assert held.resolve(SINGLE, {"x": 1}).departure is None
    assert Conversations().grammar is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "none", "text": "x"},
        {"kind": "fixed"},
        {"kind": "fixed", "text": "x", "digests": ("a",)},
        {"kind": "none", "optional": True},
        {"kind": "records", "text": "x"},
    ],
)
def test_a_system_prompt_that_contradicts_itself(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="system prompt of kind"):
        SystemPrompt(**wrong)  # type: ignore[arg-type]


_TURNS = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["system", "user", "assistant"]),
        st.sampled_from(["a", BRIEF, "", "x\ny"]),
    ),
    min_size=1,
    max_size=4,
)


@given(st.lists(_TURNS, min_size=1, max_size=4), st.sampled_from([None, BRIEF]))
def test_what_was_calibrated_is_calibrated(records: list[list[Turn]], system_prompt: str | None) -> None:
    """Unless a fixed system prompt was wanted and a record speaks against it."""
    calibrated = Conversations.of_records(records, system_prompt)
    for record in records:
        own = [turn["content"] for turn in record if turn["role"] == "system"]
        contradicts = (
            system_prompt is not None and bool(own) and record[0] != {"role": "system", "content": BRIEF}
        )
        assert (departs(calibrated, record) is None) is not contradicts


@given(_TURNS)
def test_shown_texts_can_be_taken_apart(record: list[Turn]) -> None:
    if any("\n" in turn["content"] for turn in record):
        return  # such contents may look like turns; then nothing is promised
    again = taken_apart(shown(record))
    assert shown(again) == shown(record)
    assert list(again) == record or len(record) == 1


def test_orders() -> None:
    assert order(SINGLE) == order(LED) == "user"
    assert order(NEXT) == "user assistant user"
    assert order(turns(ASK, ("system", "x"))) == "user system"


def test_a_text_that_looks_like_turns_is_taken_as_them() -> None:
    assert taken_apart("system: Be brief.\nuser: ask") == tuple(LED)
    assert taken_apart("a question: why?\nuser: ask") == (
        {"role": "user", "content": "a question: why?\nuser: ask"},
    )


def test_a_single_question_is_shown_as_it_is_and_all_else_with_its_roles() -> None:
    assert shown(SINGLE) == "ask"
    assert shown(turns(("assistant", "ask"))) == "assistant: ask"
    assert shown(NEXT) == "user: ask\nassistant: ok\nuser: and?"


def test_its_turns_and_its_template_arguments_are_what_is_encoded() -> None:
    class Chat:
        def encode_chat(self, asked: object, arguments: object) -> list[int]:
            assert (asked, arguments) == (tuple(LED), {"thinking": False})
            return [1, 2, 3]

    calibrated = Conversations.of_records([SINGLE], BRIEF, {"thinking": False})
    assert calibrated.resolve(SINGLE).encode(Chat()) == [1, 2, 3]  # type: ignore[arg-type]
