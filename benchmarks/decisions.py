"""Decisions over HTTP, with OpenAI's client: how right, how often refused, how well calibrated, and how fast.

    python -m benchmarks.decisions --model var/models/gemma3-270m-reviews --bundle var/reviews/decisions \\
      --data var/reviews/test-questions.jsonl [--count 300] [--inputs 8] [--questions 1 --questions 8 --questions 64]

The data are labelled predicates (docs/calibration.md). Each is asked by itself for the first table. For the second,
so many questions about one input are asked in one request, and one by one through chat with the same prompts, in
turn. A chat answer has the bundle's length, one token, and is checked like a decision.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from openai import OpenAI

from benchmarks.servers import serving
from candor.calibration.intervals import clopper_pearson
from candor.calibration.ranking import probabilistic
from candor.engine.prompt import ChatFormat
from candor.policy.conversation import BREAK
from candor.policy.decisions import Question, ask


@dataclass(frozen=True)
class Given:
    """One labelled predicate. probability, own: that it is true, calibrated and by the model itself."""

    probability: float
    own: float
    true: bool
    let_through: bool


def main(
    model: Annotated[Path, typer.Option(help="the model's directory")],
    bundle: Annotated[Path, typer.Option(help="a decisions bundle")],
    data: Annotated[Path, typer.Option(help="labelled predicates that the bundle was not made from")],
    alpha: Annotated[float, typer.Option(help="accuracy asked for")] = 0.9,
    count: Annotated[int, typer.Option(help="records of the first table")] = 300,
    inputs: Annotated[int, typer.Option(help="inputs of the second table")] = 8,
    joined: Annotated[int, typer.Option(help="records' inputs joined to one of those")] = 10,
    questions: Annotated[list[int] | None, typer.Option(help="questions about one input")] = None,
    max_model_len: Annotated[int, typer.Option(help="longest sequence in tokens")] = 512,
    eager: Annotated[bool, typer.Option(help="no compilation")] = False,
) -> None:
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    settings = {"CANDOR_MAX_MODEL_LEN": str(max_model_len), "CANDOR_EAGER": str(eager).lower()}
    chat = ChatFormat.from_directory(model)
    with serving(model, bundle, settings) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)
        name = client.models.list().data[0].id
        typer.echo(accuracy([_ask(client, name, row, alpha) for row in rows[:count]]))
        texts = ["\n".join(row["input"] for row in rows[at * joined :][:joined]) for at in range(inputs)]
        typer.echo(
            "\n| questions about an input | a second, in one request | one by one through chat | ratio |"
        )
        typer.echo("|---|---|---|---|")
        for number in questions or [1, 8, 64]:
            typer.echo(_speed(client, name, chat, texts, number))


def _ask(client: OpenAI, name: str, row: dict[str, Any], alpha: float) -> Given:
    def decide(**options: Any) -> Any:
        asked = {"reliability": options}
        return client.decisions.create(
            model=name, input=row["input"], questions=[row["question"]], extra_body=asked
        )

    shown, own = decide(mode="annotate", alpha=alpha), decide(mode="off")
    [result] = shown.reliability["results"]
    return Given(
        shown.answers[0].probability, own.answers[0].probability, row["answer"], not result["abstained"]
    )


def accuracy(given: Sequence[Given]) -> str:
    """The first table."""

    def share(hits: int, of: int) -> str:
        if not of:
            return "none"
        low, high = clopper_pearson(hits, of)
        return f"{hits / of:.1%} [{low:.1%}, {high:.1%}]"

    def error(probabilities: list[float]) -> str:
        of_one_class = torch.zeros(len(given), dtype=torch.int64)
        true = torch.tensor([one.true for one in given])
        weights = torch.ones(1, len(given), dtype=torch.float64)
        found = probabilistic(weights, torch.tensor(probabilities), of_one_class, true)
        return f"{float(found['top_label_ece']):.1%}"

    through = [one for one in given if one.let_through]
    own = sum((one.own >= 0.5) == one.true for one in given)
    calibrated = sum((one.probability >= 0.5) == one.true for one in given)
    right = sum((one.own >= 0.5) == one.true for one in through)
    lines = [
        ("right, the model's own probabilities at 1/2", share(own, len(given))),
        ("right, the calibrated ones at 1/2", share(calibrated, len(given))),
        ("refused in mode abstain", share(len(given) - len(through), len(given))),
        ("right of those let through", share(right, len(through))),
        ("calibration error, the model's own", error([one.own for one in given])),
        ("calibration error, calibrated", error([one.probability for one in given])),
    ]
    return "\n".join(
        [f"| {len(given)} predicates | |", "|---|---|", *(f"| {what} | {said} |" for what, said in lines)]
    )


def _speed(client: OpenAI, name: str, chat: ChatFormat, inputs: Sequence[str], number: int) -> str:
    """One line of the second table: medians over the inputs, and the ratios' median and range."""
    rates: dict[str, list[float]] = {"together": [], "chat": []}
    for round_, text in enumerate(inputs):
        asked = [
            Question("predicate", f"Reader {at} of round {round_} would like this.") for at in range(number)
        ]
        questions = [{"type": one.type, "instructions": one.instructions} for one in asked]
        began = time.perf_counter()
        made = client.decisions.create(model=name, input=f"Once. {text}", questions=questions)  # type: ignore[arg-type]
        rates["together"].append(number / (time.perf_counter() - began))
        assert len(made.answers) == number
        began = time.perf_counter()
        for one in asked:
            content = f"Again. {text}{BREAK}{ask(one, chat).text}"
            client.chat.completions.create(model=name, messages=[{"role": "user", "content": content}])
        rates["chat"].append(number / (time.perf_counter() - began))
    ratios = [one / other for one, other in zip(rates["together"], rates["chat"], strict=True)]
    together, single = (statistics.median(rates[way]) for way in ("together", "chat"))
    low, high = min(ratios), max(ratios)
    return f"| {number} | {together:.1f} | {single:.1f} | {statistics.median(ratios):.1f} [{low:.1f}, {high:.1f}] |"


if __name__ == "__main__":
    typer.run(main)
