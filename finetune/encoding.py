"""The text an SDM language model writes, and the texts made of it (2510.26183, section 3).

    response            <sentence>...</sentence>\\n<verified>Yes</verified>        or No
    verification input  the response up to and including its last <verified>
    hard negative       the verification input, then No</verified>\\n\\n

Generated text may be malformed in any way: a text without a trailing tag gets one, and the rest of it is
unchanged. Parsing is lenient, as in the public code: sentences and verdicts are found separately and
paired in order, without outer blanks; a verdict is Yes in any case of letters, otherwise No.
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
    """Strips the text and cuts it after the tag of a trailing verdict; without one, adds the tag on a new line."""
    text = generated.strip()
    verdict = _VERDICT.search(text)
    return text[: verdict.start()] + TAG if verdict else f"{text}\n{TAG}"


def hard_negative(generated: str) -> str:
    """Returns the response as a negative example: the same text with the verdict No."""
    return verification_input(generated) + "No</verified>\n\n"


def parse(generated: str) -> Parsed:
    """Returns the sentences that have a verdict, up to the first one verified Yes."""
    parsed = Parsed([], [])
    for sentence, verdict in zip(_SENTENCES.findall(generated), _VERDICTS.findall(generated), strict=False):
        parsed.sentences.append(sentence.strip())
        parsed.verifications.append(verdict.strip().lower() == "yes")
        if parsed.verifications[-1]:
            break
    return parsed
