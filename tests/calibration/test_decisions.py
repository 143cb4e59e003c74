"""Labelled questions in, a published decisions bundle out, with a scripted engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from candor.calibration.answering import (
    AnsweringOptions,
    Answers,
    DataFile,
    Inputs,
    answer_file,
    answer_inputs,
    require_unseen,
)
from candor.calibration.errors import DataError
from candor.calibration.fit import FitSettings
from candor.calibration.rule_settings import RuleSettings
from candor.calibration.run import Certifying, evaluate_sets, make_bundle
from candor.engine.base import Representation
from candor.engine.prompt import ChatFormat
from candor.model_store.bundle import load_bundle
from candor.policy.conversation import Conversations
from candor.policy.decisions import EVIDENCE
from candor.policy.policy import Policy

SETTINGS = FitSettings(alphas=(0.8, 0.9), rounds=1, epochs=10, exemplar_dim=8, learning_rate=1e-2)
PREDICATE = {"type": "predicate", "instructions": "It is even."}
CHOICE = {
    "type": "choice",
    "instructions": "Even?",
    "choices": [{"value": True}, {"value": "no", "description": "odd"}],
}
SCORE = {"type": "score", "instructions": "Odd?", "levels": [{"label": "not at all"}, {"label": "wholly"}]}


def write(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbers(path: Path, some: Iterable[int]) -> Path:
    return write(
        path,
        ({"id": f"q{i}", "input": f"number {i}", "question": PREDICATE, "answer": i % 2 == 0} for i in some),
    )


def answered(engine: Any, chat: ChatFormat, inputs: Inputs, folder: Path) -> Answers:
    engine.representation = Representation(order=("mean", "last", "evidence"), evidence=EVIDENCE)
    conversations = Conversations.of_records([record.messages for record in inputs.fitting.records])
    policy = Policy(max_tokens=1, conversations=conversations)
    asking = AnsweringOptions(folder / "cache", concurrency=8)
    return asyncio.run(answer_inputs(engine, chat, inputs, policy, asking))


def test_a_bundle_of_decisions(
    make_engine: Callable[..., Any], chat: ChatFormat, hard: Callable[[int], float], tmp_path: Path
) -> None:
    engine = make_engine()
    data = numbers(tmp_path / "questions.jsonl", range(600))
    inputs = Inputs.load(data, [], questions_for=chat)
    answers = answered(engine, chat, inputs, tmp_path)
    assert len(engine.asked) == 600
    assert [one.label for one in answers.fitting] == [int(hard(i) <= 0.7) for i in range(600)]
    again = answered(engine, chat, inputs, tmp_path)
    assert len(engine.asked) == 600  # kept
    assert all(one.h.equal(other.h) for one, other in zip(answers.fitting, again.fitting, strict=True))

    made = make_bundle(
        inputs,
        answers,
        SETTINGS,
        tmp_path / "bundle",
        "even",
        Certifying(None, 0.1, 0.4),
        RuleSettings(delta=0.1),
    )
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.digest == made.digest
    conversations = bundle.policy.conversations
    assert (conversations.turns, conversations.decides, bundle.policy.max_tokens) == (
        ("user predicate",),
        True,
        1,
    )
    assert bundle.manifest.representation.evidence == EVIDENCE
    assert bundle.rule is not None
    assert [one.alpha for one in bundle.rule.terms.certificates] == [0.8, 0.9]
    exemplar = bundle.exemplars[0]
    said = json.loads(exemplar.response)
    assert list(said) == ["Yes", "No"]
    assert sum(said.values()) == pytest.approx(1)
    assert [turn["role"] for turn in exemplar.messages] == ["user", "predicate"]

    held_out = DataFile.load_decisions(numbers(tmp_path / "test.jsonl", range(1000, 1200)), chat)
    require_unseen(bundle, held_out)
    asking = AnsweringOptions(tmp_path / "cache", concurrency=8)
    answers = asyncio.run(answer_file(engine, chat, held_out, bundle.manifest.policy, asking, "answering"))
    [evaluation] = evaluate_sets(bundle, {"test": answers}).values()
    assert evaluation.to_json()["auroc"]["value"] > 0.9
    with pytest.raises(DataError, match="the bundle was fitted on this prompt"):
        require_unseen(bundle, inputs.fitting)


def test_kinds_of_question_and_of_input(chat: ChatFormat, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "number 4"}, {"role": "assistant", "content": "It is."}]
    rows = [
        {"input": "number 2", "question": CHOICE, "answer": True},
        {"input": "number 3", "question": CHOICE, "answer": "no"},
        {"input": "number 3", "question": SCORE, "answer": "wholly"},
        {"input": talk, "question": PREDICATE, "answer": True},
    ]
    file = DataFile.load_decisions(write(tmp_path / "q.jsonl", rows), chat)
    assert [record.right for record in file.records] == [0, 1, 1, 0]  # type: ignore[attr-defined]
    assert [record.reference for record in file.records] == ["true", "no", "wholly", "Yes"]
    assert file.records[3].messages[0]["content"] == "user: number 4\nassistant: It is."
    assert file.records[1].messages[1]["content"].endswith("\n- true\n- no: odd")
    assert (file.to_json()["records"], file.to_json()["verifiers"], len(file.sha256)) == (4, [], 64)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"answer": None}, '"answer" null is none of the question\'s options'),
        ({"answer": 1}, '"answer" 1 is none'),
        ({"question": CHOICE, "answer": "true"}, '"answer" "true" is none'),
        ({"question": "even?"}, "must be an object whose type is one of predicate, choice, score"),
        ({"question": {"type": "predicate"}}, 'must have "instructions"'),
        ({"question": {**CHOICE, "choices": [{"value": 1}, {"value": "a"}]}}, 'must have "choices"'),
        ({"question": {**SCORE, "levels": [{"label": "a"}]}}, "two or more, all different"),
        ({"question": {**SCORE, "levels": [{"label": "a"}, {"label": "a"}]}}, "two or more, all different"),
        ({"input": 5}, '"input" must be a text'),
        ({"input": [{"role": "user"}]}, '"input" must be a text'),
    ],
)
def test_a_wrong_record_is_named(chat: ChatFormat, tmp_path: Path, change: Any, problem: str) -> None:
    right = {"input": "number 2", "question": PREDICATE, "answer": True}
    path = write(tmp_path / "q.jsonl", [right, {**right, "input": "number 4", **change}])
    with pytest.raises(DataError) as caught:
        DataFile.load_decisions(path, chat)
    assert "line 2: " in str(caught.value)
    assert problem in str(caught.value)


def test_the_same_question_with_two_answers(chat: ChatFormat, tmp_path: Path) -> None:
    rows = [{"input": "number 2", "question": PREDICATE, "answer": said} for said in (True, False)]
    with pytest.raises(DataError, match="line 2: same prompt as line 1"):
        DataFile.load_decisions(write(tmp_path / "q.jsonl", rows), chat)
    with pytest.raises(DataError, match=r'missing "input", "question", "answer"'):
        DataFile.load_decisions(write(tmp_path / "q.jsonl", [{"prompt": "number 2"}]), chat)
