"""Can an answer be stopped before it is finished, because its score will not reach what is certified?

    python -m studies.two_gates.early var/gates/arithmetic [--model DIR --data var/arithmetic] --accuracy 0.9

After so many tokens (`CHECKS`; 0: when prefill ends) a logistic regression on the prompt's states, the mean and last
state so far and the evidence so far says how probable it is that the finished answer's score reaches the threshold at
which the search for a certificate begins. It is fitted on the rule's fitting records, with their cross-validated
scores. An answer is stopped where these log-odds lie under a cut that all but a share `LOST` of the fitting records
that reach it pass, cross-validated too. So the stops are fixed before the certification records are looked at, and a
certificate of the rule with its stops (a stopped answer is not let through) holds as one without them does.

Answers' tokens are read again by transformers, once; they are kept beside the study's files. Without a model there is
the first check alone. What is served (`calibration.forecast`) looks once, when prefill ends, and loses less: its cut
belongs to the threshold that is certified.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from candor.calibration.certificate import Claim
from candor.calibration.data import Record, load_records
from candor.calibration.logistic import fit_chosen
from candor.calibration.rule import REACHES, RuleRows, fit_rule
from candor.calibration.rule_certificate import certify_rule, start, thresholds
from candor.calibration.rule_settings import RuleSettings
from candor.calibration.splits import split
from candor.sdm.adaptor import Block
from studies.two_gates.answers import BATCH, Answered, BatchedModel, load
from studies.two_gates.deals import layer, rows

CHECKS = (0, 8, 16, 24, 32, 48, 64)
LOST = 0.005
"""Of the fitting records that reach the threshold, the share that each check may stop."""
FEWEST = 50
"""Running answers of either kind that a check is fitted on."""


@dataclass(frozen=True, eq=False)
class Paths:
    """n answers while they were written. lengths (n,); states (n, checks - 1, 2 H + 6): mean, last state and evidence
    after so many tokens, NaN from the answer's end on; the first check sees the prompt alone."""

    lengths: Tensor
    states: Tensor

    @property
    def checks(self) -> tuple[int, ...]:
        return CHECKS[: self.states.shape[1] + 1]

    def seen(self, prompts: Tensor) -> Tensor:
        """(n, checks, P + 2 H + 6): what each check sees of answers to prompts (n, P)."""
        nothing = torch.zeros(len(self.states), 1, self.states.shape[2])
        states = torch.cat([nothing, self.states], 1)
        return torch.cat([prompts.unsqueeze(1).expand(-1, states.shape[1], -1), states], 2).double()

    def take(self, at: Tensor) -> Paths:
        return Paths(self.lengths[at], self.states[at])


def paths(model: BatchedModel, records: list[Record], answered: Answered, kept: Path) -> Paths:
    if kept.exists():
        return Paths(**torch.load(kept))
    lengths, states = [], []
    for first in tqdm(range(0, len(records), BATCH), desc=kept.stem):
        some = slice(first, first + BATCH)
        for length, row in model.along(records[some], answered.texts[some], CHECKS[1:]):
            lengths.append(length)
            states.append(row)
    found = Paths(torch.tensor(lengths), torch.stack(states))
    torch.save({"lengths": found.lengths, "states": found.states}, kept)
    return found


@dataclass(frozen=True, eq=False)
class Stops:
    """weights (checks, P + 2 H + 6), biases, cuts (checks,). The first check under its cut stops an answer."""

    weights: Tensor
    biases: Tensor
    cuts: Tensor

    @classmethod
    def fit(cls, prompts: Tensor, path: Paths, reaches: Tensor, digests: list[str], hidden: int) -> Stops:
        """prompts (n, P); reaches (n,) bool: the finished answer's cross-validated score reaches the threshold."""
        block: Block = (hidden, "scalar")
        blocks: list[Block] = [block] * 4 + [(path.states.shape[2] - 2 * hidden, "feature")]
        weights, biases, cuts = [], [], []
        seen = path.seen(prompts)
        for check, tokens in enumerate(path.checks):
            running = path.lengths > tokens
            x = seen[running, check]
            y = reaches[running].long()
            if min(int(y.sum()), int((1 - y).sum())) < FEWEST:
                weights.append(x.new_zeros(x.shape[1]))
                biases.append(x.new_zeros(()))
                cuts.append(x.new_full((), -torch.inf))
                continue
            own = [digests[i] for i in running.nonzero().flatten().tolist()]
            folds = split(own, y.tolist(), (0.2,) * 5, 0)
            chosen = fit_chosen(x, y, blocks, folds, REACHES)
            weights.append(chosen.w)
            biases.append(chosen.b)
            cuts.append(chosen.out_of_fold[y == 1].quantile(LOST))
        return cls(torch.stack(weights), torch.stack(biases), torch.stack(cuts))

    def written(self, prompts: Tensor, path: Paths) -> Tensor:
        """Tokens (n,) written of each answer: its length where it is not stopped."""
        odds = (path.seen(prompts) * self.weights).sum(2) + self.biases
        stopped = (odds < self.cuts) & (path.lengths.unsqueeze(1) > torch.tensor(path.checks))
        first = torch.tensor(path.checks)[stopped.int().argmax(1)]
        return torch.where(stopped.any(1), first, path.lengths)


def main(
    folder: Annotated[Path, typer.Argument(help="Of the task's answers.")],
    model: Annotated[Path | None, typer.Option(help="Directory of the model.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of calibration.jsonl and test.jsonl.")] = None,
    accuracy: Annotated[float, typer.Option(help="To certify.")] = 0.9,
    deals: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    torch.set_num_threads(1)
    sets = {name: load(folder / f"{name}.pt") for name in ("calibration", "test")}
    wanted = Claim(accuracy, 0.05)
    path = {
        name: Paths(torch.ones(len(found), dtype=torch.int64), torch.empty(len(found), 0, found.h.shape[1]))
        for name, found in sets.items()
    }
    if model is not None and data is not None:
        reader = BatchedModel(model)
        for name, answered in sets.items():
            kept = folder / f"paths-{name}.pt"
            path[name] = paths(reader, load_records(data / f"{name}.jsonl"), answered, kept)
    known, hidden = sets["calibration"], sets["test"].prompts.shape[1] // 2
    parts = (("mean", hidden), ("last", hidden), ("evidence", known.h.shape[1] - 2 * hidden))
    for seed in range(deals):
        deal = layer(known, seed, folder, 0.9)
        fitting = rows(known, deal.estimator, deal.fitting)
        usable = fitting.h.isfinite().all(1)
        rule = fit_rule(fitting[usable], deal.in_calibration[usable], parts, (hidden, hidden), RuleSettings())
        everyone = len(rule.scores) == int(usable.sum())  # else those of the layer's calibration half
        own = deal.fitting[usable if everyone else usable & deal.in_calibration]
        order = thresholds(rule)
        begins = order[start(rule, order, len(deal.certification), wanted)]
        stops = Stops.fit(
            known.prompts[own],
            path["calibration"].take(own),
            rule.known & (rule.scores >= begins),
            [known.digests[i] for i in own.tolist()],
            hidden,
        )
        apart = rows(known, deal.estimator, deal.certification)
        for name, some, on in (
            ("certification", apart, path["calibration"].take(deal.certification)),
            ("test", rows(sets["test"], deal.estimator), path["test"]),
        ):
            written = stops.written(some.prompts, on)
            stopped = written < on.lengths
            plain = certify_rule(rule, apart, wanted).certificate
            if name == "certification":
                left = RuleRows(
                    apart.prompts,
                    apart.h.where(~stopped.unsqueeze(1), torch.nan),
                    apart.figures,
                    apart.y,
                    apart.digests,
                )
                stopping = certify_rule(rule, left, wanted).certificate
                typer.echo(
                    f"deal {seed}: certified without stops {plain and (plain.answered, plain.right)}, "
                    f"with them {stopping and (stopping.answered, stopping.right)}"
                )
                continue
            if plain is None or stopping is None:
                typer.echo("  no certificate")
                continue
            judged = rule.rule.judge(some.prompts, some.h, some.figures)
            before, after = (
                plain.covers(judged.known, judged.score, judged.forecast),
                stopping.covers(judged.known, judged.score, judged.forecast),
            )
            after &= ~stopped
            withheld, half = ~before & judged.known, written <= on.lengths / 2
            tokens = int(on.lengths[judged.known].sum())
            typer.echo(
                f"  held out: let through {_share(before)} ({_share(some.y[before] == 1)} right), with stops "
                f"{_share(after)} ({_share(some.y[after] == 1)} right); lost by stops {_share(stopped[before])}; "
                f"withheld ones not begun {_share(written[withheld] == 0)}, "
                f"stopped {_share(stopped[withheld])}, by half {_share((stopped & half)[withheld])}; "
                f"tokens saved {1 - int(written[judged.known].sum()) / tokens:.1%}"
            )


def _share(flags: Tensor) -> str:
    return f"{float(flags.double().mean()):.1%}"


if __name__ == "__main__":
    typer.run(main)
