"""The text an SDM language model writes, and the texts made of it (2510.26183, section 3).

    response            <sentence>...</sentence>\\n<verified>Yes</verified>        or No
    verification input  the response up to and including its last <verified>
    hard negative       the verification input, then No</verified>\\n\\n

Generated text may be malformed in any way: without a trailing tag it gets one, and what comes before
is left as it is. Parsing is lenient, as the public code's is: sentences and verdicts are sought each by
themselves and paired in order, outer blanks aside, and a verdict is Yes in whatever case, or else No.
"""

from __future__ import annotations

import re
from typing import NamedTuple

TAG = "<verified>"
_VERDICT = re.compile(r"<verified>(?:Yes|No)</verified>\Z")
_SENTENCES = re.compile(r"<sentence>(.*?)</sentence>", re.DOTALL)
_VERDICTS = re.compile(r"<verified>(.*?)</verified>", re.DOTALL)


class Parsed(NamedTuple):
    """Tagged sentences in order, and the verdict on each (Yes: True)."""

    sentences: list[str]
    verifications: list[bool]


def verification_input(generated: str) -> str:
    """Stripped, and cut after the tag of a trailing verdict; without one, the tag on a new line is added."""
    text = generated.strip()
    verdict = _VERDICT.search(text)
    return text[: verdict.start()] + TAG if verdict else f"{text}\n{TAG}"


def hard_negative(generated: str) -> str:
    """The response as a negative example: the same text, verified No."""
    return verification_input(generated) + "No</verified>\n\n"


def parse(generated: str) -> Parsed:
    """The sentences that have a verdict, up to the first one verified Yes."""
    parsed = Parsed([], [])
    for sentence, verdict in zip(_SENTENCES.findall(generated), _VERDICTS.findall(generated), strict=False):
        parsed.sentences.append(sentence.strip())
        parsed.verifications.append(verdict.strip().lower() == "yes")
        if parsed.verifications[-1]:
            break
    return parsed
