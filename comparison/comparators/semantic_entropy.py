"""Semantic entropy: how much sampled answers disagree in meaning (Kuhn et al., 2302.09664).

    K answers at temperature 1, in classes of one meaning with shares p_m;   score = sum_m p_m ln p_m

This is the discrete form, negated so that higher means more confident. Two answers mean the same here when they are
equal after the `normalised` rule, which is exact for tasks with one right wording. The papers use an entailment model
in both directions, which this project does not ship; free prose would need it.
"""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from math import log

from candor.calibration.generate import Labelled
from candor.calibration.verifiers import normalise
from candor.comparison.comparators.passes import AskedAgain, FurtherQuestion
from candor.policy.conversation import Conversation
from candor.policy.policy import Policy

SAMPLES = 10


def questions(conversation: Conversation, answer: Labelled, policy: Policy) -> list[FurtherQuestion]:
    """The served conversation, K times, each with its own seed."""

    def seed(number: int) -> int:
        return int.from_bytes(sha256(f"{answer.id}:{number}".encode()).digest()[:4], "big")

    return [
        FurtherQuestion(conversation, policy.sampling(temperature=1.0, seed=seed(number)))
        for number in range(SAMPLES)
    ]


def score(asked: AskedAgain) -> float:
    """Negative entropy in nats, from -ln K (all differ) to 0 (all agree)."""
    counts = Counter(normalise(text) for text in asked.replies.texts)
    total = sum(counts.values())
    return sum(count / total * log(count / total) for count in counts.values())
