"""What holds a calibration back, and what is most likely to help: in words, from the halves and the held-out figures.

It speaks of what lets answers through: of two gates, where there are any, else of the papers' regions. A rule lacks a
certificate where too few records were let through to show anything, or too many of them were wrong.

Where there is no region, Algorithm 1 failed at every threshold q'. At one of them it failed least: there, each class
lacks points, or has too many under alpha,

    lacking_c = max(0, ceil(1 / (1 - alpha)) - n_c)        excess_c = max(0, under_c - floor((1 - alpha) n_c)),

and their sum over the classes is the smallest. What is lacking takes more records. What is in excess takes a score
that tells better. Suspects are answers whose nearest, by h', have the other label: many of these labels are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, inf, isfinite, log
from typing import Any

import torch
from torch import Tensor

from candor.calibration.evaluate import Evaluation
from candor.calibration.fit import Fitted
from candor.calibration.generate import Labelled, count_faults
from candor.calibration.rule_certificate import RuleCertification
from candor.sdm.region import minimum_points, quantile_index

CLASSES = ("wrong", "right")
NEIGHBOURS = 10
AGAINST = 8
"""Of its nearest answers by h', the number that must have the other label. With a tenth of the demo's labels turned,
of those named 73 % were turned ones, and 70 % of the turned ones were named (docs/log.md)."""
MOST_SUSPECTS = 500
_MOST_COMPARED = 20_000
_MUCH = 0.5
"""A share of the ceiling under this is said to be little."""
_LOW_CEILING = 2 / 3
"""Where no rule can let more through than this, better answers are what helps most."""
_CHANCE = 0.65
"""An AUROC whose interval begins under this tells little."""
_FEW = 0.05
"""A share of records under this is left without a word."""


@dataclass(frozen=True)
class Shortfall:
    """Why there is no region at alpha, at the q' where least is wanting. By class, wrong answers first.

    points: at or above it. needed: points that a class must have. under: those of its points whose SDM is under
    alpha. allowed: how many may be.
    """

    alpha: float
    q_prime: float
    points: tuple[int, int]
    needed: int
    under: tuple[int, int]
    allowed: tuple[int, int]

    @property
    def factor(self) -> float | None:
        """How many times the records would give every class its points; None where that is not what is wanting."""
        if any(u > a for u, a in zip(self.under, self.allowed, strict=True)) or min(self.points) == 0:
            return None
        return self.needed / min(self.points)

    def __str__(self) -> str:
        said = []
        for name, n, under, allowed in zip(CLASSES, self.points, self.under, self.allowed, strict=True):
            if n < self.needed:
                said.append(f"the {name} answers have {n} of the {self.needed} points needed")
            if under > allowed:
                said.append(
                    f"{under} of {n} {name} answers are not told with probability {self.alpha}, and {allowed} may be"
                )
        return (
            f"no region at alpha {self.alpha}: where least is wanting (q' >= {self.q_prime:.3g}), "
            + "; ".join(said)
        )


def shortfall(sdm: Tensor, q_prime: Tensor, labels: Tensor, alpha: float) -> Shortfall | None:
    """Calibration points sdm (n, 2), q' (n,), labels (n,) -> the threshold that fails least; None without q' > 0."""
    kept = q_prime > 0
    if not bool(kept.any()):
        return None
    labels, q_prime = labels[kept], q_prime[kept]
    own = sdm[kept].gather(1, labels.unsqueeze(1)).squeeze(1).float()
    order = q_prime.argsort(descending=True)
    member = torch.nn.functional.one_hot(labels[order], 2)
    n = member.cumsum(0)  # (n, 2)
    under = (member * (own[order] < torch.tensor(alpha, dtype=torch.float32)).unsqueeze(1)).cumsum(0)
    needed = int(minimum_points(alpha))
    allowed = torch.where(n > 0, quantile_index(n, alpha), 0)
    wanting = (needed - n).clamp(min=0) + (under - allowed).clamp(min=0)
    total = wanting.sum(dim=1)  # (n,)
    together = q_prime[order]
    total[:-1][together[1:] == together[:-1]] = total.max() + 1  # equal q' enter together
    at = int((total == total.min()).nonzero()[-1])  # of equals, the loosest

    def pair(counts: Tensor) -> tuple[int, int]:
        return int(counts[at, 0]), int(counts[at, 1])

    return Shortfall(alpha, float(q_prime[order][at]), pair(n), needed, pair(under), pair(allowed))


@dataclass(frozen=True)
class Suspect:
    """An answer among answers of the other label. against: how many of its NEIGHBOURS have it. twin: the nearest."""

    id: str
    label: int
    against: int
    twin: str


def suspects(fitted: Fitted) -> list[Suspect]:
    """Answers fitted on, of both halves, whose label is not that of their nearest: the surest first."""
    rows = fitted.answers[:_MOST_COMPARED]
    if len(rows) <= NEIGHBOURS:
        return []
    h_prime = fitted.estimator.measure(torch.stack([answer.h for answer in rows])).h_prime  # (n, M)
    y = torch.tensor([answer.label for answer in rows])
    found = []
    for start in range(0, len(rows), 1000):
        distances = torch.cdist(h_prime[start : start + 1000], h_prime)
        own = torch.arange(len(distances))
        distances[own, start + own] = inf
        nearest, at = distances.topk(NEIGHBOURS, largest=False)  # (m, NEIGHBOURS)
        against = (y[at] != y[start : start + len(distances), None]).sum(dim=1)
        for i in (against >= AGAINST).nonzero().flatten().tolist():
            row = rows[start + i]
            one = Suspect(row.id, row.label, int(against[i]), rows[int(at[i, 0])].id)
            found.append((-one.against, float(nearest[i].mean()), one))
    return [one for _, _, one in sorted(found, key=lambda each: each[:2])][:MOST_SUSPECTS]


@dataclass(frozen=True)
class Advice:
    """holds_back: what does, one sentence each. helps: what to try, likeliest first. suspects: labels to look at."""

    holds_back: list[str]
    helps: list[str]
    suspects: list[Suspect]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = ["What holds it back:", *(f"  - {one}" for one in self.holds_back)] if self.holds_back else []
        lines += ["What may help:", *(f"  - {one}" for one in self.helps)] if self.helps else []
        if self.suspects:
            first = ", ".join(one.id for one in self.suspects[:5])
            lines.append(
                f"Labels to look at: {len(self.suspects)} answers are among answers of the other label, the surest "
                f"first: {first} (all in report.json)"
            )
        return "\n".join(lines)


def of_rule(found: RuleCertification) -> tuple[list[str], list[str]]:
    """(what holds a two-gate rule back at this alpha, what helps)."""
    held, helps, at, accuracy = [], [], f"alpha {found.alpha:g}", f"{found.wanted.accuracy:g}"
    if found.certificate is None:
        tried, least = found.steps[0], ceil(log(found.wanted.delta) / log(found.wanted.accuracy))
        if tried.answered < least:
            held.append(
                f"{at}: no certificate: {tried.answered} records reach the score at which the search begins, and "
                f"{least}, all right, are the fewest that show an accuracy of {accuracy}"
            )
        else:
            held.append(
                f"{at}: no certificate: at the score at which the search begins {tried.right} of {tried.answered} "
                f"are right, which does not show an accuracy of {accuracy}"
            )
    elif found.answered < _MUCH * found.ceiling:
        held.append(
            f"{at}: {found.answered:.1%} answered of the {found.ceiling:.1%} that any rule could answer: the score "
            "does not tell the other right answers well enough from wrong ones"
        )
    if held:
        more = next((one for one in found.outlook if one.share > found.answered), None)
        if more is not None:
            helps.append(
                f"{at}: {more.records} records to certify on, in place of {len(found.prompts)}, for {more.share:.1%} "
                "answered, were this the truth"
            )
        elif found.certificate is None:
            helps.append(f"a lower --alpha than {found.alpha:g}: more records would not bring this one")
    return held, helps


def advise(
    fitted: Fitted,
    answers: Sequence[Labelled],
    evaluation: Evaluation,
    rule: Sequence[RuleCertification] | None = None,
) -> Advice:
    """answers: the fitting part, including those that could not be scored. rule: of two gates, at every alpha; None:
    the papers' regions judge."""
    held, helps = [], []
    halves = len(fitted.training) + len(fitted.calibration)
    points = fitted.estimator.calibration
    missing = [
        alpha
        for alpha, region in fitted.estimator.regions.items()
        if rule is None and not isfinite(region.q_prime_min)
    ]
    for one in rule or ():
        holds, help_ = of_rule(one)
        held += holds
        helps += help_
    for alpha in missing:
        found = shortfall(points.sdm, points.q_prime, points.labels, alpha)
        if found is None:
            held.append(
                f"no region at alpha {alpha}: no calibration answer has a near neighbour of its verdict"
            )
            continue
        held.append(str(found))
        if found.factor is not None:
            more = ceil(halves * (found.factor - 1))
            rarer = CLASSES[found.points.index(min(found.points))]
            helps.append(
                f"alpha {alpha}: about {more} more records to fit on give every class its points, if they are like "
                f"these; fewer, if they are such as are answered {rarer}"
            )
    right = sum(answer.label for answer in answers) / len(answers)
    if min(right, 1 - right) < 0.1:
        rare, kind = ("wrong", "harder") if right > 0.5 else ("right", "easier")
        held.append(
            f"only {min(right, 1 - right):.0%} of the answers are {rare}: there is little to learn them from"
        )
        helps.append(f"{kind} records, of the kind that will come")
    alpha = min(fitted.estimator.regions)
    if right / alpha < _LOW_CEILING:
        held.append(
            f"{right:.0%} of the answers are right: at an accuracy of {alpha:g} no rule can let more than "
            f"{right / alpha:.0%} through"
        )
        helps.append("better answers: fine-tuning on right ones (docs/finetuning.md), or a better model")
    auroc = evaluation.auroc
    if auroc is not None and auroc[1] < _CHANCE:
        held.append(
            f"the score hardly tells right from wrong: AUROC {auroc[0]:.2f} [{auroc[1]:.2f}, {auroc[2]:.2f}] on "
            "held-out answers, and 0.5 is chance"
        )
        helps.append(
            "fine-tuning, which teaches the model to tell its right answers: --loss sdm on pairs, or --loss probe on "
            "its own answers, where these are short (docs/finetuning.md)"
        )
    for fault, count in count_faults(answers).items():
        if count > _FEW * len(answers):
            held.append(f"{count} of {len(answers)} answers are left out as {fault}")
            if fault == "truncated":
                helps.append("a higher --max-tokens, or prompts that ask for a short answer")
    ood = evaluation.ood
    if rule is None and ood.value is not None and ood.value > 0.2:
        held.append(
            f"{ood.value:.0%} of the held-out answers have no reliable neighbour among those fitted on"
        )
        helps.append("more records of every kind that will come")
    named = suspects(fitted)
    if missing and len(named) > _FEW * halves:
        held.append(
            f"{len(named)} of {halves} labels are not those of their nearest answers: noise, or mere chance"
        )
        helps.append(
            "a look at these labels: a few wrong ones among sure answers are enough to lose a region"
        )
    if missing and not helps:
        lower = [f"{alpha:g}" for alpha in (0.8, 0.9) if alpha < min(missing)]
        helps.append("more records" + (f", or a lower --alpha ({' or '.join(lower)})" if lower else ""))
    return Advice(held, helps, named)
