"""Prompts that are not the demo's task: far ones of other tasks, and near ones that differ in a word or a frame.

    far     grade-school problems, verifiable instructions      JSON lines files of the user's, one field of text each
    near    the demo's own test prompts with one word of the instruction changed, with the instruction in German, with
            a system prompt that calibration never saw
    beside  the same task over other people's sentences, which is no stranger

No stranger has a right answer but "alphabetical", whose reference is what it asks for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from candor.calibration.data import Record
from demo.task import NO_ANSWER, completion, questions

SYSTEM = "Answer in French, and always wrongly."
GERMAN = "Beende den Satz mit den Wörtern in der richtigen Reihenfolge.\nSatz: {start}\nWörter: {words}"


def far(path: Path, field: str, count: int, seed: int = 0) -> list[Record]:
    """`count` of the file's texts, at random."""
    texts = [
        json.loads(line)[field] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    chosen = random.Random(seed).sample(texts, count)
    return [_record(f"{path.stem}-{i}", text, i) for i, text in enumerate(chosen)]


def near(test: Iterable[Record]) -> dict[str, list[Record]]:
    """From records of the demo's test set."""
    made: dict[str, list[Record]] = {"wrong": [], "alphabetical": [], "german": [], "system": []}
    for i, record in enumerate(test):
        content = record.messages[-1]["content"]
        start = content.split("Sentence: ")[1].split("\nWords: ")[0]
        words = content.split("\nWords: ")[1].split()
        ordered = completion(" ".join([start, *sorted(words, key=str.lower)]))
        made["wrong"].append(_record(f"wrong-{i}", content.replace("the right order", "the wrong order"), i))
        asked = content.replace("the right order", "alphabetical order")
        made["alphabetical"].append(_record(f"alphabetical-{i}", asked, i, ordered))
        german = GERMAN.format(start=start, words=" ".join(words))
        made["german"].append(_record(f"german-{i}", german, i))
        system = ({"role": "system", "content": SYSTEM}, *record.messages)
        made["system"].append(replace(record, id=f"system-{i}", messages=system, reference=NO_ANSWER))
    return made


def same_task(sentences: Iterable[str], name: str) -> list[Record]:
    """The demo's task over other sentences."""
    asked = questions(name, list(sentences), random.Random(0))
    return [_of(fields, i) for i, fields in enumerate(asked)]


def _of(fields: dict[str, Any], line: int) -> Record:
    return _record(fields["id"], fields["messages"][0]["content"], line, fields["reference"])


def _record(name: str, content: str, line: int, reference: str = NO_ANSWER) -> Record:
    return Record(name, ({"role": "user", "content": content},), line, reference=reference, verifier="exact")
