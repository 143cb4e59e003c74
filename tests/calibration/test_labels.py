"""Labels: kept where they were dear, mended by a person, unknown where nobody can say."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from candor.calibration.cache import AnswerCache
from candor.calibration.data import Record, load_records
from candor.calibration.errors import VerifierError
from candor.calibration.generate import Labelled, collect
from candor.calibration.labels import ask_person, keep_persons
from candor.calibration.verifiers import load_verifier
from candor.engine.prompt import ChatFormat
from candor.policy.policy import Policy

MakeEngine = Callable[..., Any]
COUNTING = """
from pathlib import Path
def same(response, reference):
    with open(Path(__file__).with_name("log"), "a") as log:
        log.write(response + "\\n")
    if response == "13":
        raise RuntimeError("unlucky")
    return "unknown" if response == "4" else response == reference
"""


def task(folder: Path, numbers: Sequence[int], verifier: str = "mine.py:same") -> list[Record]:
    rows = [
        {"id": f"r{i}", "prompt": f"number {i}", "reference": str(i), "verifier": verifier} for i in numbers
    ]
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_verifier.cache_clear()
    return load_records(path)


def gather(
    engine: Any, chat: ChatFormat, records: Sequence[Record], folder: Path, **more: Any
) -> list[Labelled]:
    policy = Policy(max_tokens=16)
    with AnswerCache(folder / "cache") as cache:
        return asyncio.run(
            collect(engine, chat, records, policy, engine.representation, cache, 1, lambda _: None, **more)
        )


def calls(folder: Path) -> int:
    return len((folder / "log").read_text().splitlines()) if (folder / "log").exists() else 0


def test_a_users_function_is_asked_once_an_answer(
    make_engine: MakeEngine, chat: ChatFormat, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(COUNTING)
    records = task(tmp_path, [1, 2, 4])
    first = gather(make_engine(), chat, records, tmp_path)
    assert calls(tmp_path) == 3
    assert [(one.label, one.unknown) for one in first][2] == (0, True)
    assert [one.label for one in gather(make_engine(), chat, records, tmp_path)] == [
        one.label for one in first
    ]
    assert calls(tmp_path) == 3
    gather(make_engine(), chat, records, tmp_path, relabel=True)
    assert calls(tmp_path) == 6
    (tmp_path / "mine.py").write_text(COUNTING + "# another\n")
    gather(make_engine(), chat, task(tmp_path, [1, 2, 4]), tmp_path)
    assert calls(tmp_path) == 9


def test_one_that_fails_on_the_first_answer_ends_before_the_next_is_written(
    make_engine: MakeEngine, chat: ChatFormat, hard: Callable[[int], float], tmp_path: Path
) -> None:
    assert hard(13) <= 0.7  # answered with "13"
    (tmp_path / "mine.py").write_text(COUNTING)
    engine = make_engine(delay=0.02)
    with pytest.raises(VerifierError, match="failed with RuntimeError: unlucky"):
        gather(engine, chat, task(tmp_path, [13, *range(100, 140)]), tmp_path)
    assert len(engine.asked) <= 3
    again = make_engine()
    (tmp_path / "mine.py").write_text(COUNTING.replace('"13"', '"-13"'))
    gather(again, chat, task(tmp_path, [13]), tmp_path)
    assert again.asked == []


def test_what_a_person_says_goes_before_all(
    make_engine: MakeEngine, chat: ChatFormat, tmp_path: Path
) -> None:
    records = task(tmp_path, range(5), "exact")
    before = gather(make_engine(), chat, records, tmp_path)
    with AnswerCache(tmp_path / "cache") as cache:
        keep_persons(records[2], before[2].response, before[2].label == 0, cache)
        keep_persons(records[3], before[3].response, None, cache)
    engine = make_engine()
    after = gather(engine, chat, records, tmp_path)
    assert engine.asked == []
    assert after[2].label == 1 - before[2].label
    assert after[3].unknown
    assert [one.label for one in after][:2] == [one.label for one in before][:2]


def test_a_person_at_the_terminal(make_engine: MakeEngine, chat: ChatFormat, tmp_path: Path) -> None:
    records = task(tmp_path, range(6), "person")
    answers = gather(make_engine(), chat, records, tmp_path)
    assert all(one.unknown for one in answers)
    left = [(record, one.response) for record, one in zip(records, answers, strict=True)]
    typed = iter(["r", "what?", " Wrong", "u", "s"])
    shown = io.StringIO()
    with AnswerCache(tmp_path / "cache") as cache:
        assert ask_person(left, cache, lambda _: next(typed), shown) == 3
    assert "[1 of 6] number 0\nReference: 0\nAnswer: " in shown.getvalue()
    labelled = gather(make_engine(), chat, records, tmp_path)
    assert [(one.label, one.unknown) for one in labelled[:4]] == [
        (1, False),
        (0, False),
        (0, True),
        (0, True),
    ]

    def ended(_: str) -> str:
        raise EOFError

    with AnswerCache(tmp_path / "cache") as cache:
        assert ask_person(left, cache, ended, shown) == 0
