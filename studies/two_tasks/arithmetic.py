"""Word problems with generated numbers: the second task, of another kind than putting words in order.

    Ruth has 12 eggs. Ruth buys 7 more. Ben has 3 times as many eggs as Ruth. How many eggs does Ben have now?

    12 + 7 = 19
    19 * 3 = 57
    Answer: 57

A model is taught one to four steps with numbers up to 40. What is asked: *in distribution* the same, one in five with
three-digit numbers, so that some answers are almost surely wrong; *shifted* five or six steps; *out of distribution*
questions of GSM8K, which have a right answer, and prompts that have none. The verifier reads the last line alone.

    python -m studies.two_tasks.arithmetic --gsm8k FILE --out var/arithmetic

FILE is train.jsonl of openai/grade-school-math, or any lines with "question" and "answer".
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from demo.sentences import PROMPTS, TOPICS
from demo.task import NO_ANSWER

NAMES = (
    *("Maria", "Ben", "Aisha", "Tom", "Lena", "Omar", "Ruth", "Ivan"),
    *("Chloe", "Sam", "Nina", "Paul", "Grace", "Hugo", "Mei", "Carlos"),
)
THINGS = (
    *("apples", "marbles", "stamps", "books", "coins", "shells"),
    *("pencils", "cards", "eggs", "stones", "buttons", "tickets"),
)
MORE = (
    "{name} buys {n} more.",
    "{name} finds {n} more.",
    "A friend gives {name} {n} more.",
    "Then {n} more {things} come in the post for {name}.",
)
FEWER = (
    "{name} loses {n} of them.",
    "{name} gives {n} away.",
    "{name} sells {n} {things}.",
    "A neighbour borrows {n} of them from {name}.",
)
TIMES = "{other} has {n} times as many {things} as {name}."
SHARE = "{name} puts the {things} into {n} equal bags and keeps one bag."
QUESTION = "How many {things} does {name} have now?"

STEPS = (1, 4)
LARGEST = 40
SHARE_HARD, HARD = 0.2, 400
SHIFTED_STEPS = (5, 6)
SEED = 20261124


@dataclass(frozen=True)
class Problem:
    question: str
    equations: tuple[str, ...]
    answer: int

    @property
    def solution(self) -> str:
        return "\n".join((*self.equations, f"Answer: {self.answer}"))


@dataclass(frozen=True)
class Sizes:
    train: int = 3000
    development: int = 100
    calibration: int = 1500
    test: int = 600
    shifted: int = 400
    ood: int = 250


def problem(rng: random.Random, steps: int, largest: int) -> Problem:
    """A story of so many steps; no number that is added or taken away is above `largest`."""
    name, things, value = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, largest)
    told, equations = [f"{name} has {value} {things}."], []
    for _ in range(steps):
        shares = [n for n in range(2, 10) if value % n == 0 and value // n > 1]
        kinds = [
            "+",
            *(["-"] if value > 3 else []),
            *(["*"] if value <= 2 * largest else []),
            *("/" * bool(shares)),
        ]
        kind, other = rng.choice(kinds), name
        if kind == "+":
            n = rng.randint(2, largest)
            after, sentence = value + n, rng.choice(MORE)
        elif kind == "-":
            n = rng.randint(2, min(value - 1, largest))
            after, sentence = value - n, rng.choice(FEWER)
        elif kind == "*":
            n, other = rng.randint(2, 9), rng.choice([one for one in NAMES if one != name])
            after, sentence = value * n, TIMES
        else:
            n = rng.choice(shares)
            after, sentence = value // n, SHARE
        told.append(sentence.format(name=name, other=other, n=n, things=things))
        equations.append(f"{value} {kind} {n} = {after}")
        value, name = after, other
    told.append(QUESTION.format(name=name, things=things))
    return Problem(" ".join(told), tuple(equations), value)


def record(name: str, question: str, answer: object) -> dict[str, Any]:
    """One prompt; right is a response whose last line is the answer."""
    return {
        "id": name,
        "messages": [{"role": "user", "content": question}],
        "reference": rf"(?m)^Answer: {answer}\Z",
        "verifier": "regex",
    }


def lesson(name: str, made: Problem) -> dict[str, Any]:
    """A pair to fine-tune on (finetune.data); the wrong one errs in the answer alone."""
    wrong = replace(made, answer=made.answer + 1)
    return record(name, made.question, made.answer) | {
        "positive": made.solution,
        "negative": wrong.solution,
    }


def out_of_distribution(gsm8k: Path, count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Half of them GSM8K's, with its answers; half stories and explanations to write, where nothing is right."""
    lines = [json.loads(line) for line in gsm8k.read_text(encoding="utf-8").splitlines()]
    for index, line in enumerate(rng.sample(lines, count // 2)):
        number = line["answer"].rpartition("#### ")[2].replace(",", "")
        yield record(f"ood-gsm8k-{index:05d}", line["question"], number)
    asks = list(product(PROMPTS, TOPICS.read_text(encoding="utf-8").splitlines()))
    for index, (ask, topic) in enumerate(rng.sample(asks, count - count // 2)):
        made = record(f"ood-other-{index:05d}", ask.format(topic=topic), "")
        yield made | {"reference": NO_ANSWER, "verifier": "exact"}


def build(gsm8k: Path, sizes: Sizes) -> dict[str, list[dict[str, Any]]]:
    """File name -> its lines. No question stands twice."""
    seen: set[str] = set()

    def problems(kind: str, count: int) -> Iterator[tuple[str, Problem]]:
        rng = random.Random(f"{SEED}:{kind}")
        asked = kind in ("calibration", "test")
        number = 0
        while number < count:
            steps = rng.randint(*(SHIFTED_STEPS if kind == "shifted" else STEPS))
            largest = HARD if asked and rng.random() < SHARE_HARD else LARGEST
            made = problem(rng, steps, largest)
            if made.question not in seen:
                seen.add(made.question)
                yield f"{kind}-{number:05d}", made
                number += 1

    return {
        "train": [lesson(*one) for one in problems("train", sizes.train)],
        "development": [lesson(*one) for one in problems("development", sizes.development)],
        **{
            kind: [record(name, one.question, one.answer) for name, one in problems(kind, count)]
            for kind, count in (
                ("calibration", sizes.calibration),
                ("test", sizes.test),
                ("shifted", sizes.shifted),
            )
        },
        "ood": list(out_of_distribution(gsm8k, sizes.ood, random.Random(f"{SEED}:ood"))),
    }


def main(
    gsm8k: Annotated[Path, typer.Option(help="Questions of GSM8K, JSON Lines.")],
    out: Annotated[Path, typer.Option(help="Directory of the JSON Lines files.")] = Path("var/arithmetic"),
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for kind, rows in build(gsm8k, Sizes()).items():
        with (out / f"{kind}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        typer.echo(f"{len(rows):6d} prompts -> {out / kind}.jsonl")


if __name__ == "__main__":
    typer.run(main)
