"""Labels of answers: given, kept, or asked of a verifier; and of a person for what is left.

What a person said goes before everything, so labels can be mended without asking the model again. Then comes the
label given in the data, then the verifier's, which is kept where it was dear. `UNKNOWN` answers are not fitted on.
Where figures are reported or certified, they count as wrong: nobody said that they are right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from candor.calibration.cache import AnswerCache, cache_key
from candor.calibration.data import Record
from candor.calibration.verifiers import Question, Verdict, Verifier, load_verifier

_WORDS: dict[str, Verdict] = {"right": True, "wrong": False, "unknown": None}
"""What a person types, or its first letter."""


def verifier_of(record: Record) -> Verifier | None:
    """None where the label is given."""
    if record.label is not None or record.verifier is None:
        return None
    return load_verifier(record.verifier, record.folder)


async def label(record: Record, response: str, cache: AnswerCache | None, relabel: bool = False) -> Verdict:
    """Returns whether the response is right, None if nobody can say so far.

    cache: None keeps nothing. relabel: asks the verifier again, whatever is kept. Raises VerifierError or CacheError.
    """
    if cache is not None and (said := cache.get_label(_key("person", record, response))) is not None:
        return said[0]
    verifier = verifier_of(record)
    if verifier is None:
        return None if record.label is None else record.label == 1
    if verifier.deferred:
        return None
    question = Question(response, record.reference, record.messages, record.row)
    if verifier.key is None or cache is None:
        return await verifier.label(question)
    key = _key(verifier.key, record, response)
    kept = None if relabel else cache.get_label(key)
    if kept is not None:
        return kept[0]
    verdict = await verifier.label(question)
    cache.put_label(key, verdict)
    return verdict


def keep_persons(record: Record, response: str, verdict: Verdict, cache: AnswerCache) -> None:
    """Keeps what a person said of an answer. Raises CacheError."""
    cache.put_label(_key("person", record, response), verdict)


def ask_person(
    answers: Sequence[tuple[Record, str]],
    cache: AnswerCache,
    read: Callable[[str], str] = input,
    out: TextIO | None = None,
) -> int:
    """Asks at the terminal about answers, one by one, and keeps what is said; returns how many were labelled.

    Of what a person called unknown nobody is asked again. It ends at the last answer, at "stop" or at the end of the
    input. Raises CacheError.
    """
    done = 0
    out = sys.stderr if out is None else out
    answers = [one for one in answers if cache.get_label(_key("person", *one)) is None]
    for number, (record, response) in enumerate(answers, start=1):
        reference = "" if record.reference is None else f"\nReference: {record.reference}"
        print(f"\n[{number} of {len(answers)}] {record.prompt}{reference}\nAnswer: {response}", file=out)
        while True:
            try:
                said = read("right, wrong, unknown or stop? [r/w/u/s] ").strip().lower()
            except EOFError:
                return done
            if said in ("s", "stop"):
                return done
            word = next((word for word in _WORDS if said in (word, word[0])), None)
            if word is not None:
                break
        keep_persons(record, response, _WORDS[word], cache)
        done += 1
    return done


def _key(of: str, record: Record, response: str) -> str:
    columns = {name: repr(value) for name, value in record.row.items()} if ":" in of.split(" ")[0] else {}
    return cache_key(
        verifier=of,
        messages=list(record.messages),
        reference=repr(record.reference),
        response=response,
        **({"row": columns} if columns else {}),
    )
