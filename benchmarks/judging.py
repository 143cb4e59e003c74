"""Times what judging costs: a prompt when its prefill ends, an answer at its end, by two gates and by the region.

    python -m benchmarks.judging [--bundle demo/bundle] [--rows 2500 --rows 20000] [--dimensions 1000] [--rounds 300]

One at a time, as most come, on one thread: CPU time of the thread, so that other load matters little; median [tenth,
ninetieth percentile]. The bundle's own support comes first, then supports of so many rows under its own adaptor, or
under one of M dimensions, drawn as training begins.
States are drawn about the bundle's means, in 64 directions of falling variance, and told apart in one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from candor.app.answering.scoring import Scorer, ScoringRequest
from candor.engine.base import HiddenSummary, PromptStates
from candor.model_store.bundle import Bundle, load_bundle
from candor.sdm.adaptor import ExemplarAdaptor, FrozenAdaptor
from candor.sdm.support import Support

DIRECTIONS, ASKED, WARM_UP = 64, 100, 20


def drawn(n: int, mean: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
    """(n, D) states."""
    mixing = torch.randn(DIRECTIONS, len(mean), generator=torch.Generator().manual_seed(0))
    latent = torch.randn(n, DIRECTIONS, generator=generator) * torch.arange(1, DIRECTIONS + 1) ** -0.5
    return mean + scale * (latent @ mixing)


def widened(bundle: Bundle, dimensions: int, generator: torch.Generator) -> Bundle:
    """The bundle with an untrained adaptor of so many dimensions. Its support must be drawn anew."""
    was = bundle.estimator.adaptor
    adaptor = ExemplarAdaptor(was.mean, was.scale, dimensions, was.num_classes, generator)
    return replace(bundle, estimator=replace(bundle.estimator, adaptor=adaptor))


def grown(bundle: Bundle, rows: int, generator: torch.Generator) -> Bundle:
    """The bundle with a support of so many rows; a tenth of them are not valid."""
    estimator = bundle.estimator
    h = drawn(rows, estimator.adaptor.mean, estimator.adaptor.scale, generator)
    h_prime, _, predictions, _ = FrozenAdaptor(estimator.adaptor)(h)
    wrong = torch.rand(rows, generator=generator) < 0.1
    support = Support(h_prime, torch.where(wrong, 1 - predictions, predictions), predictions)
    return replace(bundle, estimator=replace(estimator, support=support))


def timed(work: Callable[[int], object], rounds: int) -> str:
    """In milliseconds."""
    for number in range(WARM_UP):
        work(number)
    taken = []
    for number in range(rounds):
        start = time.thread_time()
        work(number)
        taken.append(time.thread_time() - start)
    low, middle, high = (
        1e3 * float(torch.tensor(taken, dtype=torch.float64).quantile(q)) for q in (0.1, 0.5, 0.9)
    )
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def requests(bundle: Bundle, generator: torch.Generator) -> list[tuple[ScoringRequest, PromptStates]]:
    assert bundle.rule is not None
    adaptor, gate, size = bundle.estimator.adaptor, bundle.rule.rule.gate, bundle.manifest.model.hidden_size
    h = drawn(ASKED, adaptor.mean, adaptor.scale, generator)
    states = drawn(ASKED, gate.mean, gate.scale, generator)
    asked, alpha = [], max(bundle.estimator.regions)
    for row, prompt in zip(h, states, strict=True):
        hidden = HiddenSummary(row[:size], row[size : 2 * size], row[2 * size :], positions=50, complete=True)
        read = PromptStates(prompt[:size], prompt[size:], complete=True)
        asked.append((ScoringRequest(hidden, alpha, calibrated=True, prompt=read), read))
    return asked


def line(bundle: Bundle, rounds: int, generator: torch.Generator) -> str:
    asked = requests(bundle, generator)
    gates, region = (Scorer(bundle, "lower", 60, rule) for rule in (bundle.rule, None))

    def prompts(number: int) -> Sequence[object]:
        request, prompt = asked[number % ASKED]
        return gates._judge_prompts([(prompt, request.alpha, True)])

    seen = [
        replace(one, prompt_seen=gates._judge_prompts([(prompt, one.alpha, True)])[0].seen)
        for one, prompt in asked
    ]
    cells = (
        timed(prompts, rounds),
        timed(lambda number: gates._judge_batch([seen[number % ASKED]]), rounds),
        timed(lambda number: region._judge_batch([asked[number % ASKED][0]]), rounds),
    )
    return f"| {len(bundle.estimator.support):,} | " + " | ".join(cells) + " |"


def main(
    bundle: Annotated[Path, typer.Option(help="With two gates, of mean, last state and evidence.")] = Path(
        "demo/bundle"
    ),
    rows: Annotated[list[int] | None, typer.Option(help="Of the support; repeat for several.")] = None,
    dimensions: Annotated[int | None, typer.Option(min=1, help="M of the drawn supports.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 300,
) -> None:
    torch.set_num_threads(1)
    loaded, generator = load_bundle(bundle), torch.Generator().manual_seed(1)
    print("| exemplars | prompt, ms | answer by two gates | answer by the region |\n|---|---|---|---|")
    print(line(loaded, rounds, generator), flush=True)
    if dimensions is not None:
        loaded = widened(loaded, dimensions, generator)
    for size in rows or (2_500, 20_000):
        print(line(grown(loaded, size, generator), rounds, generator), flush=True)


if __name__ == "__main__":
    typer.run(main)
