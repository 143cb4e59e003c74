"""Verbalised confidence: the model is asked how likely its answer is right (Tian et al., 2305.14975).

The model writes one more turn after the answer, greedily; the score is the first number in the reply, in per cent. A
reply without a number from 0 to 100 counts as 0, since an unstated confidence is not trusted.
"""

from __future__ import annotations

import re
from dataclasses import replace

from candor.calibration.generate import Labelled
from candor.comparison.comparators.passes import AskedAgain, FurtherQuestion
from candor.policy.conversation import Conversation
from candor.policy.policy import Policy

QUESTION = (
    "How likely is it that your answer above is right? "
    "Reply with a whole number from 0 (surely wrong) to 100 (surely right) and nothing else."
)
_NUMBER = re.compile(r"(?<![\d.-])(\d{1,3}(?:\.\d+)?)(?![\d-])")


def questions(conversation: Conversation, answer: Labelled, policy: Policy) -> list[FurtherQuestion]:
    turns = (
        *conversation.turns,
        {"role": "assistant", "content": answer.response},
        {"role": "user", "content": QUESTION},
    )
    return [
        FurtherQuestion(replace(conversation, turns=turns), policy.sampling(temperature=0.0, max_tokens=16))
    ]


def score(asked: AskedAgain) -> float:
    """The stated confidence in [0, 1]; 0 where no number was stated."""
    said = stated(asked.replies.texts[0])
    return 0.0 if said is None else said


def stated(reply: str) -> float | None:
    """The share that a reply states; None where it states none."""
    found = _NUMBER.search(reply)
    if found is None or float(found[1]) > 100:
        return None
    return float(found[1]) / 100
