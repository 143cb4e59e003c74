"""Methods that ask the model again: what they ask, what they make of the replies, and what is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

from candor.calibration.cache import AnswerCache
from candor.calibration.errors import CalibrationError
from candor.calibration.generate import Labelled
from candor.comparison.comparators import platt, semantic_entropy, verbalised
from candor.comparison.comparators.passes import AskedAgain, FurtherQuestion, Replies, ask
from candor.engine.base import Sampling
from candor.engine.prompt import ChatFormat
from candor.policy.conversation import Conversation
from candor.policy.policy import Policy

POLICY = Policy(temperature=0.0, top_p=1.0, top_k=0, max_tokens=16)
ANSWER = Labelled("r3", "digest", ({"role": "user", "content": "number 3"},), "3", 1, torch.zeros(1))
TURNS = ({"role": "user", "content": "number 3"},)
SERVED = Conversation(TURNS, {}, None)


def served(number: int) -> Conversation:
    return Conversation(({"role": "user", "content": f"number {number}"},), {}, None)


def asked(*texts: str) -> AskedAgain:
    return AskedAgain(TURNS, ANSWER, Replies(texts, 0, 0))


def test_semantic_entropy_by_hand() -> None:
    assert semantic_entropy.score(asked("a", "A ", "a")) == 0  # one meaning after normalising
    assert semantic_entropy.score(asked("a", "b", "c", "d")) == pytest.approx(-log(4))
    assert semantic_entropy.score(asked("a", "a", "a", "b")) == pytest.approx(
        0.75 * log(0.75) + 0.25 * log(0.25)
    )


def test_samples_are_drawn_at_temperature_one_with_seeds_of_their_own() -> None:
    several = semantic_entropy.questions(SERVED, ANSWER, POLICY)
    assert len(several) == semantic_entropy.SAMPLES
    assert all(question.conversation == SERVED for question in several)
    assert all(question.sampling.temperature == 1 for question in several)
    assert all(question.sampling.max_tokens == POLICY.max_tokens for question in several)
    assert len({question.sampling.seed for question in several}) == len(several)
    assert several == semantic_entropy.questions(SERVED, ANSWER, POLICY)


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        ("85", 0.85),
        ("I would say 90 %.", 0.9),
        ("100", 1.0),
        ("0", 0.0),
        ("99.5", 0.995),
        ("120", None),
        ("2024-01", None),
        ("very likely", None),
        ("", None),
    ],
)
def test_what_a_reply_states(reply: str, share: float | None) -> None:
    assert verbalised.stated(reply) == share
    assert verbalised.score(asked(reply)) == (share or 0.0)


def test_the_question_follows_the_answer() -> None:
    (question,) = verbalised.questions(SERVED, ANSWER, POLICY)
    assert [turn["role"] for turn in question.conversation.turns] == ["user", "assistant", "user"]
    assert question.conversation.turns[1]["content"] == "3"
    assert question.sampling.temperature == 0


def test_a_score_becomes_a_probability_that_rises_with_it() -> None:
    known = [0.0, 0.1, 0.2, 0.3, 0.8, 0.9, 1.0, 0.25, 0.85]
    labels = [0, 0, 0, 1, 1, 1, 1, 0, 0]
    found = platt.judge(known, labels, [0.0, 0.5, 1.0], (0.6,))
    assert found.probability is not None
    ones = torch.where(found.y_hat == 1, found.probability, 1 - found.probability)
    assert ones.diff().min() > 0
    assert found.y_hat.tolist()[::2] == [0, 1]
    assert found.admitted[0.6].tolist()[::2] == [True, True]


def test_one_class_alone_teaches_that_class() -> None:
    found = platt.judge([0.1, 0.9], [0, 0], [0.5], (0.9,))
    assert found.y_hat.tolist() == [0]
    assert found.admitted[0.9].tolist() == [True]


def test_replies_are_counted_and_kept(
    make_engine: Callable[..., Any], chat: ChatFormat, tmp_path: Path
) -> None:
    questions = [[FurtherQuestion(served(i), Sampling(8, 1.0, seed=s)) for s in range(3)] for i in (12, 7)]
    engine = make_engine()
    done: list[int] = []
    with AnswerCache(tmp_path) as cache:
        first = asyncio.run(ask(engine, chat, questions, cache, 2, done.append))
        assert len(engine.asked) == sum(done) == 6
        again = asyncio.run(ask(engine, chat, questions, cache, 2, done.append))
    assert again == first
    assert len(engine.asked) == 6
    assert [reply.texts[0].rstrip("?") for reply in first] == ["12", "7"]
    # "<user>number 12<assistant>": 26 characters, a token each, three times.
    assert first[0].read == 3 * 26
    assert first[0].written == sum(map(len, first[0].texts))


def test_a_template_that_takes_no_such_question_is_told(
    make_engine: Callable[..., Any], chat: ChatFormat, tmp_path: Path
) -> None:
    questions = [verbalised.questions(SERVED, ANSWER, POLICY)]
    with AnswerCache(tmp_path) as cache, pytest.raises(CalibrationError, match="leave this method out"):
        asyncio.run(ask(make_engine(), chat, questions, cache, 2, lambda _: None))
