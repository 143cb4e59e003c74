"""The arithmetic task's problems, and the table over tasks and seeds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from candor.calibration.data import load_records
from candor.finetune.data import load_pairs
from studies.two_tasks import arithmetic, table
from studies.two_tasks.arithmetic import Sizes, build

SIZES = Sizes(train=60, development=10, calibration=60, test=40, shifted=30, ood=20)


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    path = tmp_path / "gsm8k.jsonl"
    lines = [{"question": f"What is {n} thousand?", "answer": f"Think.\n#### {n},000"} for n in range(1, 30)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_equations_hold_and_lead_to_the_answer(gsm8k: Path) -> None:
    for line in build(gsm8k, SIZES)["train"]:
        *equations, last = line["positive"].splitlines()
        assert 1 <= len(equations) <= 4
        left = "0"
        for equation in equations:
            terms, _, value = equation.partition(" = ")
            assert eval(terms) == int(value) >= 0
            assert left in ("0", terms.split()[0])
            left = value
        assert last == f"Answer: {left}"


def test_files_are_read_and_no_question_stands_twice(gsm8k: Path, tmp_path: Path) -> None:
    made = build(gsm8k, SIZES)
    assert made == build(gsm8k, SIZES)
    questions = [line["messages"][0]["content"] for lines in made.values() for line in lines]
    assert len(questions) == len(set(questions)) == 220
    for name, lines in made.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        if name in ("train", "development"):
            load_pairs(path)  # checks that right is right and wrong is wrong
        else:
            assert len(load_records(path)) == len(lines)
    assert sum("1000" in line["reference"] or "000" in line["reference"] for line in made["ood"]) == 10


def test_shifted_problems_have_more_steps() -> None:
    made = arithmetic.problem(random.Random(0), 6, 40)
    assert len(made.equations) == 6
    assert made.question.count(".") == 7


def scores(aurc: float, answered: float) -> dict[str, Any]:
    share = {"value": answered}
    names = ("admitted", "marginal", "class_0", "class_1", "answered", "predicted_1")
    ranked = {name: {"value": aurc} for name in ("aurc", "roc_auc", "coverage_at_risk")}
    return {
        "admitted": {"0.9": dict.fromkeys(names, share)},
        "answers": ranked,
        "verdicts": {"augrc": {"value": aurc}},
        "difference": {"answers": {"value": aurc - 0.1, "low": aurc - 0.15, "high": aurc - 0.05}},
    }


def run(aurc: float) -> dict[str, Any]:
    methods = {"softmax": scores(aurc, 0.5), "sdm_hr_lower": scores(0.1, 0.25)}
    one = {"records": 9, "faults": {"truncated": 1}, "correct": 0.75, "cost": {}, "methods": methods}
    return {"training_half": 4, "calibration_half": 5, "sets": dict.fromkeys(table.SETS, one), "sampled": {}}


def test_the_table_shows_means_spread_and_who_ranks_better() -> None:
    text = "\n".join(table.markdown({"arithmetic": [run(0.02), run(0.2)]}))
    assert "2 seeds; halves of 4 and 5 answers. test: 8 of 9 answers scored, 75.0 % right" in text
    assert "| Softmax | 50.0 | 50.0 |" in text
    assert "| Softmax | 0.110 (0.020 to 0.200) |" in text
    assert "| better in 1, worse in 1 of 2 |" in text
    assert "AnsweringOptions the model again" not in text
