"""What each row lets through under a certificate, over five deals, held against the first row.

    python -m studies.knows.table var/knows/words/rows ce sdm probe-2000 [--accuracy 0.95 --accuracy 0.9]

Each row is a folder with calibration.pt and test.pt, and ood.pt where strangers are asked (studies.knows.answers), of
one model; all are answers to the same records. In a deal every row sets the same prompts aside to certify on. Without
test.pt every deal looks at another fifth of the calibration's records and has only the others, and more.pt where that
is. Ratios are of what is let through, means over deals; their intervals redraw prompts, the same for both rows, and
the deals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from candor.calibration.certificate import Claim, certify
from candor.calibration.errors import CalibrationError
from candor.calibration.rule import fit_rule
from candor.calibration.rule_certificate import certify_rule
from candor.calibration.rule_settings import RuleSettings
from candor.calibration.served import Attempts
from candor.engine.base import EVIDENCE
from studies.two_gates.answers import Answered, load
from studies.two_gates.deals import layer, rows

DEALS = 5
DELTA = 0.05
REDRAWS = 2000
WAYS = {"two gates": "two gates", "region": "the region, lower"}

Passed = dict[str, Tensor]
"""By set, (n,): what is let through."""
Sets = dict[str, Answered]
Judge = Callable[[Path, int, Answered, Sets, float], Passed]


@dataclass(frozen=True, eq=False)
class Row:
    """right: by set (n,) bool. passed: by way, accuracy, deal."""

    name: str
    right: dict[str, Tensor]
    passed: dict[tuple[str, float, int], Passed]

    def share(self, way: str, accuracy: float, name: str = "test") -> Tensor:
        """(deals, n) float: whether each prompt is answered; NaN where the deal did not look at it."""
        return torch.stack([self.passed[way, accuracy, deal][name] for deal in range(DEALS)])


def by_gates(folder: Path, seed: int, known: Answered, sets: Sets, accuracy: float) -> Passed:
    hidden = known.prompts.shape[1] // 2
    deal = layer(known, seed, folder, 0.9)
    fitting = rows(known, deal.estimator, deal.fitting)
    usable = fitting.h.isfinite().all(1)
    parts = (("mean", hidden), ("last", hidden), ("evidence", len(EVIDENCE)))
    fitted = fit_rule(
        fitting[usable], deal.in_calibration[usable], parts, (hidden, hidden), RuleSettings(seed=seed)
    )
    found = certify_rule(fitted, rows(known, deal.estimator, deal.certification), Claim(accuracy, DELTA))
    passed = {}
    for name, some in sets.items():
        seen = rows(some, deal.estimator)
        judged = fitted.rule.judge(seen.prompts, seen.h, seen.figures)
        none = torch.zeros_like(judged.known)
        passed[name] = (
            found.certificate.covers(judged.known, judged.score, judged.forecast)
            if found.certificate
            else none
        )
    return passed


def by_region(folder: Path, seed: int, known: Answered, sets: Sets, accuracy: float) -> Passed:
    deal = layer(known, seed, folder, 0.9, share=0.2)
    estimator, labelled = deal.estimator.with_regions((0.9, 0.95)), known.labelled()
    half = [labelled[i] for i in deal.fitting[deal.in_calibration].tolist()]
    apart = [labelled[i] for i in deal.certification.tolist()]
    made = certify(estimator, half, apart, Claim(accuracy, DELTA)).certificates
    best = max((one for one in made if one.estimator == "lower"), key=lambda one: one.answered, default=None)
    passed = {}
    for name, some in sets.items():
        through = torch.zeros(len(some), dtype=torch.bool)
        if best is not None:
            served = Attempts.measure(estimator, some.labelled()).served(estimator, best.alpha, "lower")
            through = served.answered & (served.q_prime >= best.rescaled_similarity_min)
        passed[name] = through
    return passed


def together(one: Answered, other: Answered) -> Answered:
    return Answered(
        torch.cat([one.prompts, other.prompts]),
        torch.cat([one.h, other.h]),
        torch.cat([one.labels, other.labels]),
        torch.cat([one.complete, other.complete]),
        one.digests + other.digests,
        one.texts + other.texts,
    )


def judged(judge: Judge, folder: Path, deal: int, known: Answered, sets: Sets, accuracy: float) -> Passed:
    """As floats. Without a test set, a fifth of the records is looked at, and NaN stands for the others."""
    if "test" in sets:
        return {name: one.double() for name, one in judge(folder, deal, known, sets, accuracy).items()}
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    seen, rest = order[deal::DEALS].sort().values, order[torch.arange(len(order)) % DEALS != deal]
    looked, others = {"test": known.take(seen.tolist())}, known.take(rest.tolist())
    if (folder / "more.pt").exists():
        others = together(others, load(folder / "more.pt"))
    found = judge(folder / f"fold-{deal}", deal, others, looked, accuracy)
    passed = torch.full((len(known),), torch.nan, dtype=torch.float64)
    passed[seen] = found["test"].double()
    return {"test": passed}


def measured(folder: Path, accuracies: Sequence[float]) -> Row:
    """From `folder`/passed.pt where it has been measured before."""
    known = load(folder / "calibration.pt")
    sets = {name: load(folder / f"{name}.pt") for name in ("test", "ood") if (folder / f"{name}.pt").exists()}
    looked, kept = sets if "test" in sets else {"test": known}, folder / "passed.pt"
    passed = torch.load(kept) if kept.exists() else {}
    for deal in range(DEALS):
        for accuracy in accuracies:
            for way, judge in (("two gates", by_gates), ("region", by_region)):
                if passed.get((way, accuracy, deal), {}).keys() != looked.keys():
                    try:
                        passed[way, accuracy, deal] = judged(judge, folder, deal, known, sets, accuracy)
                    except CalibrationError as error:
                        raise typer.BadParameter(f"{folder}, deal {deal}, {way}: {error}") from error
                    torch.save(passed, kept)
    return Row(folder.name, {name: some.labels == 1 for name, some in looked.items()}, passed)


def times(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """Ratio of mean shares (deals, n) with its 95 % interval."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(REDRAWS):
        prompts = torch.randint(ours.shape[1], (ours.shape[1],), generator=generator)
        deals = torch.randint(DEALS, (DEALS,), generator=generator)
        below = theirs[deals][:, prompts].nansum()
        drawn.append(float(ours[deals][:, prompts].nansum() / below) if below else float("inf"))
    low, high = torch.tensor(drawn).quantile(torch.tensor([0.025, 0.975]), interpolation="nearest").tolist()
    return float(ours.nansum() / theirs.nansum()), low, high


def main(
    folder: Annotated[Path, typer.Argument(help="Of the rows' folders.")],
    names: Annotated[list[str], typer.Argument(help="Rows; the first is the one that others are held to.")],
    accuracy: Annotated[list[float] | None, typer.Option(help="To certify; repeat it for several.")] = None,
) -> None:
    torch.set_num_threads(1)
    accuracies = accuracy or [0.95, 0.9]
    found = [measured(folder / name, accuracies) for name in names]
    for wanted in accuracies:
        for way, title in WAYS.items():
            typer.echo(f"\n{title}, {wanted} certified\n")
            typer.echo(
                "| row | right of all | no certificate | answered | right | times the first | strangers |"
            )
            typer.echo("|---|---|---|---|---|---|---|")
            first = found[0].share(way, wanted)
            for row in found:
                share, right = row.share(way, wanted), row.right["test"].double()
                missing = int((share.nansum(1) == 0).sum())
                good = f"{float((share * right).nansum() / share.nansum()):.1%}" if share.nansum() else "-"
                ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*times(share, first)) if first.nansum() else "-"
                strangers = (
                    f"{float(row.share(way, wanted, 'ood').mean()):.1%}" if "ood" in row.right else "-"
                )
                base, answered = float(right.mean()), float(share.nanmean())
                typer.echo(
                    f"| {row.name} | {base:.1%} | {missing} of {DEALS} | {answered:.1%} | {good} | {ratio} | "
                    f"{strangers} |"
                )


if __name__ == "__main__":
    typer.run(main)
