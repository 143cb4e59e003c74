"""Certificates: what holds of the answers let through, with a confidence, for finitely many records.

A region is estimated on the half that also chose the model, so nothing holds of it for sure. A third part, which
training, selection and Algorithm 1 never saw, can certify it: of prompts drawn at random, the right ones among the n
that are answered are Binomial(n, p), p = P(right | answered), and

    p >= accuracy   is shown with confidence 1 - delta   iff   P(as many right | p = accuracy) <= delta,

which is: iff the exact lower bound for p (Clopper-Pearson) reaches the accuracy.

A region that fails is tightened along q': only answers with q' >= t count. Trying many t until one passes would
break the promise, so they are tested in an order fixed beforehand, each at the full delta, and the first failure ends
it (fixed-sequence testing: Learn then Test, arXiv 2110.01052; regions with guaranteed risk, 1705.08500). The t that
passed last is certified: some false t would have had to be the first false one tested, which passes with
probability delta at most.

    order     on the calibration half, cut the answered at CUTS quantiles of q', strictest first,
    start     at the strictest that passes with probability START_POWER, were the calibration half's
              accuracy there the true one; else at the likeliest. Stricter ones leave too few answers to
              show anything, and their failure would end the test for nothing.
    end       at the region as it is

Two attempts at one prompt, or one prompt twice, are no independent draws: each prompt counts once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from torch import Tensor

from candor.calibration.errors import CalibrationError
from candor.calibration.generate import Labelled
from candor.calibration.intervals import binomial_tails, lower_bound
from candor.calibration.served import Attempts, ServedRows
from candor.policy.certificate import Certificate, EstimatorKind
from candor.sdm.estimator import SDMEstimator
from candor.sdm.region import Region

CUTS = 20
START_POWER = 0.9
ENOUGH_POWER = 0.8
"""Of the number of records that is named where nothing could be certified."""
MOST_RECORDS = 100_000
"""Beyond which none is named."""

KINDS: tuple[EstimatorKind, ...] = ("lower", "plain")


@dataclass(frozen=True)
class Claim:
    """accuracy: to certify, among the answered. delta: chance that a certificate is false, at most.

    Raises ValueError out of range.
    """

    accuracy: float
    delta: float

    def __post_init__(self) -> None:
        if not (0 < self.accuracy < 1 and 0 < self.delta < 0.5):
            raise ValueError(
                "the accuracy to certify must be between 0 and 1 and delta between 0 and 0.5, e.g. 0.95 and 0.05; "
                f"got {self.accuracy} and {self.delta}"
            )


@dataclass(frozen=True)
class Step:
    """One threshold on q', tested: of those answered from it on, how many were right, and the probability of as
    many or more, were the true accuracy only what is wanted."""

    threshold: float
    answered: int
    right: int
    p_value: float
    passed: bool


@dataclass(frozen=True)
class CertificateSearch:
    """A certificate, sought for one region under one estimator. steps: in their order, the last one perhaps failed.

    certificate: None where the first test failed. records_needed: set aside in all, for ENOUGH_POWER, if the
    accuracy measured is the true one; None where there is a certificate, or MOST_RECORDS would not do.
    """

    alpha: float
    estimator: EstimatorKind
    steps: tuple[Step, ...]
    certificate: Certificate | None
    records_needed: int | None


@dataclass(frozen=True)
class Certification:
    """What was asked, of which prompts (their digests; each counted once), and what came of it."""

    wanted: Claim
    prompts: frozenset[str]
    sought: tuple[CertificateSearch, ...]

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        return tuple(one.certificate for one in self.sought if one.certificate is not None)

    def to_json(self) -> dict[str, Any]:
        sought = [asdict(one) for one in self.sought]
        return asdict(self.wanted) | {"records": len(self.prompts), "sought": sought}


def certify(
    estimator: SDMEstimator,
    calibration: Sequence[Labelled],
    certification: Sequence[Labelled],
    wanted: Claim,
) -> Certification:
    """For every region that was found, and both estimators; each certificate holds by itself.

    calibration: the half that gave the regions; it fixes the order of tests. certification: answers that
    nothing was fitted, chosen or ordered on, to prompts drawn as they will come. Raises CalibrationError
    without any.
    """
    if not certification:
        raise CalibrationError("no record is left to certify on: add records, or name a file of its own")
    first_of_each = {answer.prompt_digest: answer for answer in reversed(certification)}
    known = Attempts.measure(estimator, calibration)
    fresh = Attempts.measure(estimator, list(first_of_each.values()))
    sought = [
        _seek(
            region, kind, known.served(estimator, alpha, kind), fresh.served(estimator, alpha, kind), wanted
        )
        for alpha, region in estimator.regions.items()
        if region.found
        for kind in KINDS
    ]
    return Certification(wanted, frozenset(first_of_each), tuple(sought))


def _seek(
    region: Region, kind: EstimatorKind, seen: ServedRows, drawn: ServedRows, wanted: Claim
) -> CertificateSearch:
    order = thresholds(seen, region.q_prime_min)
    steps = walk(drawn, order[start(seen, order, len(drawn.y), wanted) :], wanted)
    passed = [step for step in steps if step.passed]
    if not passed:
        return CertificateSearch(region.alpha, kind, steps, None, records_needed(drawn, order, wanted))
    last = passed[-1]
    certificate = Certificate(
        alpha=region.alpha,
        estimator=kind,
        accuracy=wanted.accuracy,
        confidence=1 - wanted.delta,
        rescaled_similarity_min=last.threshold,
        records=len(drawn.y),
        answered=last.answered,
        right=last.right,
        # The bound and the test say the same but for the bound's own 1e-12.
        lower_bound=max(wanted.accuracy, lower_bound(last.right, last.answered, wanted.delta)),
    )
    return CertificateSearch(region.alpha, kind, steps, certificate, None)


def thresholds(seen: ServedRows, floor: float) -> tuple[float, ...]:
    """q' at CUTS quantiles of the answered, descending, the last one the region's own threshold."""
    q_prime = seen.q_prime[seen.answered].sort(descending=True).values
    cuts = [float(q_prime[ceil(len(q_prime) * step / CUTS) - 1]) for step in range(1, CUTS) if len(q_prime)]
    return tuple(sorted({floor, *cuts}, reverse=True))


def start(seen: ServedRows, order: Sequence[float], records: int, wanted: Claim) -> int:
    """Where in `order` to begin, from what the calibration half `seen` lets expect of so many records."""
    powers = []
    for threshold in order:
        answered, right = _count(seen, threshold)
        expected = round(records * answered / len(seen.y))
        # Add-one: a handful of right answers is no sure sign.
        powers.append(power(expected, (right + 1) / (answered + 2), wanted))
    enough = [index for index, value in enumerate(powers) if value >= START_POWER]
    return enough[0] if enough else powers.index(max(powers))


def power(answered: int, accuracy: float, wanted: Claim) -> float:
    """Probability that so many answered certify, with this as their true accuracy in (0, 1)."""
    least_right = int((binomial_tails(answered, wanted.accuracy) > wanted.delta).sum())
    return float(binomial_tails(answered, accuracy)[least_right])


def walk(drawn: ServedRows, order: Sequence[float], wanted: Claim) -> tuple[Step, ...]:
    """Thresholds in their order until one fails."""
    steps: list[Step] = []
    for threshold in order:
        answered, right = _count(drawn, threshold)
        p_value = float(binomial_tails(answered, wanted.accuracy)[right])
        steps.append(Step(threshold, answered, right, p_value, p_value <= wanted.delta))
        if not steps[-1].passed:
            break
    return tuple(steps)


def records_needed(drawn: ServedRows, order: Sequence[float], wanted: Claim) -> int | None:
    """About the fewest records with which some threshold passes with ENOUGH_POWER, if what was measured is true."""
    fewest = MOST_RECORDS + 1
    for threshold in order:
        answered, right = _count(drawn, threshold)
        accuracy, share = (right + 1) / (answered + 2), answered / len(drawn.y)
        if not answered or accuracy <= wanted.accuracy:
            continue

        def enough(records: int, share: float = share, accuracy: float = accuracy) -> bool:
            return power(round(records * share), accuracy, wanted) >= ENOUGH_POWER

        if enough(fewest - 1):
            # As if power only rose with the number, which it does but for small steps.
            fewest = bisect_left(range(fewest), True, key=enough)
    return fewest if fewest <= MOST_RECORDS else None


def summary(found: Certification) -> str:
    """For people: a line for each region and estimator."""
    if not found.sought:
        return "No certificate: no region was found at any alpha."
    wanted, records = found.wanted, len(found.prompts)
    lines = [
        f"certified on {records} records: {wanted.accuracy:g} of the answered are right, "
        f"with confidence {1 - wanted.delta:g}"
    ]
    for one in found.sought:
        step = one.steps[-1] if one.steps[-1].passed or one.certificate is None else one.steps[-2]
        counts = f"{step.right} right of {step.answered} answered"
        if one.certificate is not None:
            said = (
                f"yes, from q' = {step.threshold:.2f} on: {counts}, bound {one.certificate.lower_bound:.4f}"
            )
        elif one.records_needed is None:
            said = f"no: {counts}; were that the true accuracy, even {MOST_RECORDS} records would not show it"
        else:
            more = max(one.records_needed - records, 1)
            said = f"no: {counts}; were that the true accuracy, some {more} more records to certify on would show it"
        lines.append(f"  alpha {one.alpha:<7}{one.estimator:<7}{said}")
    return "\n".join(lines)


def _count(served: ServedRows, threshold: float) -> tuple[int, int]:
    """(answered with q' from the threshold on, right among them)."""
    answered: Tensor = served.answered & (served.q_prime >= threshold)
    return int(answered.sum()), int((served.y[answered] == 1).sum())
