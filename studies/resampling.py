"""What a policy that resamples buys and costs: share answered, accuracy and tokens against k.

    python -m studies.resampling [--attempts 4] [--temperature 0.7] [--json]      the demo's task and model
    python -m studies.resampling --model DIR --data DIR --max-tokens 96           another's (studies.two_tasks)
    python -m studies.resampling --synthetic                                      states drawn by a formula

One layer is fitted on first attempts; for every k the region is that of the policy with at most k attempts
(`calibration.served`), and prompts that nothing was fitted on are answered by it. Beside it the same k attempts
within the region of single answers, which is what resampling does to a region that was not made for it. Answers
are kept beside the data, so a stopped run goes on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.certificates.world import WIDTH
from benchmarks.demo_accuracy import ROOT
from candor.calibration.answering import AnsweringOptions, DataFile, answer_file
from candor.calibration.certificate import KINDS
from candor.calibration.evaluate import region_figures
from candor.calibration.fit import FitSettings, fit, standardisation_blocks
from candor.calibration.generate import Labelled
from candor.calibration.served import Attempts, regions_of_policy
from candor.engine.base import EVIDENCE, Representation
from candor.engine.factory import start_engine
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineSettings
from candor.policy.policy import Policy


@dataclass(frozen=True)
class Row:
    """One k under one estimator. region: made for this policy, or for single answers. Intervals are 95 %.

    attempts, tokens: a prompt, on average. tokens_an_answer: all tokens over the answers given; None without any.
    """

    k: int
    region: str
    estimator: str
    answered: float
    answered_interval: tuple[float | None, float | None]
    right: float | None
    right_interval: tuple[float | None, float | None]
    attempts: float
    tokens: float
    tokens_an_answer: float | None


async def answer(
    model: Path, data: Path, numbers: tuple[int, int], policy: Policy, cache: Path
) -> tuple[list[Labelled], list[Labelled], tuple[tuple[int, str], ...]]:
    """Answers to prompts to fit on and to judge by, and how h is standardised."""
    representation = Representation(order=("mean", "last", "evidence"), evidence=EVIDENCE)
    chat = ChatFormat.from_directory(model)
    engine = await start_engine(
        EngineSettings(
            model=model, kind="vllm", representation=representation, max_model_len=1024, eager=True
        ),
        chat,
    )
    try:
        sets = []
        for name, most in zip(("calibration", "test"), numbers, strict=True):
            file = DataFile.load(data / f"{name}.jsonl")
            part = replace(file, records=file.records[:most])
            sets.append(await answer_file(engine, chat, part, policy, AnsweringOptions(cache, 64), name))
        blocks = standardisation_blocks(representation, engine.identity.hidden_size)
        return sets[0], sets[1], blocks
    finally:
        await engine.close()


def imagined(numbers: tuple[int, int], attempts: int) -> tuple[list[Labelled], list[Labelled]]:
    """Prompts of which some are answered rightly almost always, some hardly ever; an attempt is one token."""
    generator = torch.Generator().manual_seed(0)
    easy = torch.randn(sum(numbers), generator=generator) * 2 + 0.5
    right = torch.rand(sum(numbers), attempts, generator=generator) < easy.sigmoid().unsqueeze(1)
    shift = torch.full((WIDTH,), 1.1 / WIDTH**0.5)  # states of right and wrong answers lie 2.2 apart
    h = torch.randn(sum(numbers), attempts, WIDTH, generator=generator)
    h += torch.where(right.unsqueeze(2), shift, -shift)
    answers = []
    for i in range(sum(numbers)):
        first, *more = (
            Labelled(f"{i}", f"{i}", (), "", 1 if right[i, j] else 0, h[i, j], tokens=1)
            for j in range(attempts)
        )
        answers.append(replace(first, more=tuple(more)))
    return answers[: numbers[0]], answers[numbers[0] :]


def rows(
    fitting: list[Labelled], judged: list[Labelled], blocks: Any, alpha: float, most: int
) -> Iterator[Row]:
    """For k = 1, ..., most."""
    settings = FitSettings((alpha,), rounds=3, epochs=60, exemplar_dim=256, learning_rate=1e-4)
    fitted = fit(fitting, blocks, settings, lambda _: None)
    single = fitted.estimator.with_regions((alpha,))
    calibration, test = (Attempts.measure(single, part) for part in (fitted.calibration, judged))
    for k in range(1, most + 1):
        made_for_it = replace(single, regions=regions_of_policy(single, calibration.first(k)))
        for region, estimator in (("this policy", made_for_it), ("single answers", single)):
            if k == 1 and estimator is single:
                continue
            for kind in KINDS:
                served = test.first(k).served(estimator, alpha, kind)
                found = region_figures(served)
                answered = found.answered.hits
                yield Row(
                    k=k,
                    region=region,
                    estimator=kind,
                    answered=found.answered.value or 0.0,
                    answered_interval=(found.answered.low, found.answered.high),
                    right=found.accuracy_answered.value,
                    right_interval=(found.accuracy_answered.low, found.accuracy_answered.high),
                    attempts=float(served.attempts.double().mean()),
                    tokens=found.tokens,
                    tokens_an_answer=int(served.tokens.sum()) / answered if answered else None,
                )


def main(
    model: Annotated[Path, typer.Option()] = ROOT / "var/models/smollm2-135m-word-ordering",
    data: Annotated[Path, typer.Option(help="Folder of calibration.jsonl and test.jsonl.")] = ROOT
    / "var/demo",
    prompts: Annotated[int, typer.Option(min=40, help="To fit on.")] = 500,
    judged: Annotated[int, typer.Option(min=1, help="To judge by.")] = 300,
    attempts: Annotated[int, typer.Option(min=1, help="Largest k.")] = 4,
    temperature: Annotated[float, typer.Option(min=0.01, max=2)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    alpha: Annotated[float, typer.Option()] = 0.9,
    synthetic: Annotated[bool, typer.Option(help="Without a model: states drawn by a formula.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    if synthetic:
        found = list(rows(*imagined((prompts, judged), attempts), ((WIDTH, "scalar"),), alpha, attempts))
    else:
        policy = Policy(temperature, max_tokens=max_tokens, resample=attempts)
        made = asyncio.run(answer(model, data, (prompts, judged), policy, data / "resampled"))
        found = list(rows(*made, alpha, attempts))
    if as_json:
        typer.echo(
            json.dumps({"alpha": alpha, "temperature": temperature, "rows": [asdict(row) for row in found]})
        )
        return
    heads = f"{'k':<3}{'region of':<16}{'estimator':<11}{'answered':<22}{'right':<22}{'attempts':<10}"
    typer.echo(heads + "tokens a prompt, an answer")
    for row in found:
        shares = "".join(
            f"{_percent(value, interval):<22}"
            for value, interval in ((row.answered, row.answered_interval), (row.right, row.right_interval))
        )
        cost = f"{row.tokens:.1f}, {row.tokens_an_answer or float('nan'):.1f}"
        typer.echo(f"{row.k:<3}{row.region:<16}{row.estimator:<11}{shares}{row.attempts:<10.2f}{cost}")


def _percent(value: float | None, interval: tuple[float | None, float | None]) -> str:
    low, high = interval
    if value is None or low is None or high is None:
        return "-"
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    typer.run(main)
