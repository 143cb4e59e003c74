"""What an answer may be drawn with, and which answers are complete."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from candor.engine.base import Sampling
from candor.policy.conversation import Conversations
from candor.policy.policy import Policy

GREEDY = Policy(max_tokens=16)
SAMPLED = Policy(temperature=0.7, top_p=0.9, top_k=40, max_tokens=16)


@pytest.mark.parametrize(
    ("policy", "sampling", "expected"),
    [
        (GREEDY, Sampling(), True),
        (GREEDY, Sampling(top_p=0.5, top_k=3, seed=7), True),
        (GREEDY, Sampling(max_tokens=5, stop=("x",), logprobs=3), True),
        (GREEDY, Sampling(temperature=0.01), False),
        (GREEDY, Sampling(frequency_penalty=0.1), False),
        (GREEDY, Sampling(presence_penalty=-0.1), False),
        (SAMPLED, Sampling(temperature=0.7, top_p=0.9, top_k=40), True),
        (SAMPLED, Sampling(temperature=0.7, top_p=0.9, top_k=40, seed=3), True),
        (SAMPLED, Sampling(temperature=0.0, top_p=0.9, top_k=40), False),
        (SAMPLED, Sampling(temperature=0.7, top_p=1.0, top_k=40), False),
        (SAMPLED, Sampling(temperature=0.7, top_p=0.9, top_k=0), False),
    ],
)
def test_draws(policy: Policy, sampling: Sampling, expected: bool) -> None:
    assert policy.draws(sampling) is expected


def test_every_field_of_sampling_that_is_not_excused_departs() -> None:
    """Default deny: a field that is new tomorrow departs, unless somebody excuses it here and in the policy."""
    excused = {"seed", "logprobs", "stop", "max_tokens"}
    others: dict[type, Any] = {int: 7, float: 0.37, tuple: ("x",), bool: True}
    for field in fields(Sampling):
        before = getattr(SAMPLED.sampling(), field.name)
        other = others[type(before)] if before is not None else 7
        assert SAMPLED.draws(replace(SAMPLED.sampling(), **{field.name: other})) is (field.name in excused)


def test_answers_under_a_grammar_are_calibrated_under_that_grammar_alone() -> None:
    held = Policy(conversations=Conversations(template_arguments={"structured_outputs": {"regex": "a"}}))
    assert held.draws(held.sampling(seed=1))
    for policy, grammar in ((held, None), (held, '{"regex": "b"}'), (GREEDY, '{"regex": "a"}')):
        assert not policy.draws(replace(policy.sampling(), grammar=grammar))


def test_wishes_are_laid_over_the_policys_own_sampling() -> None:
    assert Policy().sampling() == Sampling()  # the defaults are the same
    assert SAMPLED.sampling() == Sampling(16, 0.7, 0.9, 40)
    assert SAMPLED.sampling(top_k=0, seed=3, temperature=None) == Sampling(16, 0.7, 0.9, 0, seed=3)
    with pytest.raises(TypeError, match="unheard_of"):
        SAMPLED.sampling(unheard_of=1)


@pytest.mark.parametrize(
    ("tokens", "ended", "expected"), [(16, True, True), (17, True, False), (3, False, False), (0, True, True)]
)
def test_completed(tokens: int, ended: bool, expected: bool) -> None:
    assert GREEDY.completed(tokens, ended=ended) is expected


def test_a_given_response_that_the_model_could_not_have_given() -> None:
    ids = list(range(16))
    assert GREEDY.given("fine", ids, "<verified>") is None
    assert GREEDY.given("fine", [*ids, 16], "<verified>") == "it has 17 tokens, and answers have at most 16"
    said = GREEDY.given("a <verified>No", ids, "<verified>")
    assert said == "it holds the tag <verified>, where an answer of the model ends"


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_tokens": 0},
        {"resample": 0, "temperature": 0.5},
        {"resample": 2, "temperature": 0.0},
        {"temperature": float("nan")},
    ],
)
def test_values_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Policy(**wrong)


def test_the_ends_of_the_ranges_are_within_them() -> None:
    assert Policy(temperature=2.0, top_p=1.0, top_k=0, max_tokens=1).temperature == 2.0
    assert Policy(temperature=0.1, resample=2).resample == 2
