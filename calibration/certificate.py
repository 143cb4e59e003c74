"""Certificates: finite-sample lower bounds, at a stated confidence, on the accuracy among the answered.

A region is estimated on the half that also chose the model, so nothing is guaranteed of it. A third part, which
training, selection and Algorithm 1 never saw, can certify it. For prompts drawn at random, the number of right
answers among the n answered is Binomial(n, p), p = P(right | answered), and

    p >= accuracy   is shown with confidence 1 - delta   iff   P(at least as many right | p = accuracy) <= delta,

equivalently, iff the exact lower bound for p (Clopper-Pearson) reaches the accuracy.

A region that fails is tightened along q': only answers with q' >= t count. Trying many t until one passes would
invalidate the confidence. So the t are tested in an order fixed beforehand, each at the full delta, and the first
failure ends the test (fixed-sequence testing: Learn then Test, arXiv 2110.01052; regions with guaranteed risk,
1705.08500). The last t that passed is certified. To certify a false t, the first false t tested must pass, which has
probability at most delta.

    order     cut the answered of the calibration half at CUTS quantiles of q', strictest first
    start     at the strictest that passes with probability START_POWER if the calibration half's accuracy
              there is the true one; else at the likeliest to pass. Stricter ones leave too few answers to
              show anything, and their failure would end the test for nothing.
    end       at the region as it is

Each prompt counts once: repeated attempts at a prompt, or repeated prompts, are not independent draws.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
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
"""The power at which `records_needed` is computed where nothing could be certified."""
MOST_RECORDS = 100_000
"""The largest number of records that is named as needed."""

KINDS: tuple[EstimatorKind, ...] = ("lower", "plain")


@dataclass(frozen=True)
class Claim:
    """accuracy: to certify, among the answered. delta: the largest probability of a false certificate.

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
    """One tested threshold on q': how many were answered at or above it, how many of those were right, and the
    probability of at least as many if the true accuracy were only the wanted one."""

    threshold: float
    answered: int
    right: int
    p_value: float
    passed: bool


@dataclass(frozen=True)
class CertificateSearch:
    """The search for a certificate of one region under one estimator. steps: in test order; the last may have failed.

    certificate: None where the first test failed. records_needed: total records to set aside for ENOUGH_POWER, if
    the measured accuracy is the true one; None where there is a certificate, or MOST_RECORDS are not enough.
    """

    alpha: float
    estimator: EstimatorKind
    steps: tuple[Step, ...]
    certificate: Certificate | None
    records_needed: int | None


@dataclass(frozen=True)
class Certification:
    """The claim, the digests of the prompts (each counted once), and the searches."""

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
    """Seeks a certificate for every region found, under both estimators; each certificate holds by itself.

    calibration: the half that gave the regions; it fixes the order of tests. certification: answers not used
    to fit, choose or order anything, to prompts drawn as traffic will be. Raises CalibrationError if there
    are none.
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
        lower_bound=proven_bound(last, wanted),
    )
    return CertificateSearch(region.alpha, kind, steps, certificate, None)


def thresholds(seen: ServedRows, floor: float) -> tuple[float, ...]:
    """q' at CUTS quantiles of the answered, descending; the last is the region's own threshold."""
    q_prime = seen.q_prime[seen.answered].sort(descending=True).values
    cuts = [float(q_prime[ceil(len(q_prime) * step / CUTS) - 1]) for step in range(1, CUTS) if len(q_prime)]
    return tuple(sorted({floor, *cuts}, reverse=True))


def start(seen: ServedRows, order: Sequence[float], records: int, wanted: Claim) -> int:
    """The index in `order` to begin at, from what the calibration half `seen` predicts for this many records."""
    powers = []
    for threshold in order:
        answered, right = _count(seen, threshold)
        expected = round(records * answered / len(seen.y))
        # Add-one smoothing, since a few right answers are weak evidence.
        powers.append(power(expected, (right + 1) / (answered + 2), wanted))
    enough = [index for index, value in enumerate(powers) if value >= START_POWER]
    return enough[0] if enough else powers.index(max(powers))


def proven_bound(step: Step, wanted: Claim) -> float:
    """The exact lower bound of a step that passed; at least the wanted accuracy, to which the test was made."""
    # The bound and the test agree up to the bound's own 1e-12.
    return max(wanted.accuracy, lower_bound(step.right, step.answered, wanted.delta))


def power(answered: int, accuracy: float, wanted: Claim) -> float:
    """Probability that the test passes with this many answered and this true accuracy, in (0, 1)."""
    least_right = int((binomial_tails(answered, wanted.accuracy) > wanted.delta).sum())
    return float(binomial_tails(answered, accuracy)[least_right])


def walk(drawn: ServedRows, order: Sequence[float], wanted: Claim) -> tuple[Step, ...]:
    """Tests the thresholds in order until one fails."""
    return fixed_sequence(order, lambda threshold: _count(drawn, threshold), wanted)


def fixed_sequence(
    order: Sequence[float], count: Callable[[float], tuple[int, int]], wanted: Claim
) -> tuple[Step, ...]:
    """The test of any rule's thresholds, each at the full delta, until one fails.

    count: threshold -> (number answered, number right among them), of records that nothing else was done with.
    """
    steps: list[Step] = []
    for threshold in order:
        answered, right = count(threshold)
        p_value = float(binomial_tails(answered, wanted.accuracy)[right])
        steps.append(Step(threshold, answered, right, p_value, p_value <= wanted.delta))
        if not steps[-1].passed:
            break
    return tuple(steps)


def records_needed(drawn: ServedRows, order: Sequence[float], wanted: Claim) -> int | None:
    """About the fewest records for some threshold to pass with ENOUGH_POWER, if the measured figures are true."""
    fewest = MOST_RECORDS + 1
    for threshold in order:
        answered, right = _count(drawn, threshold)
        accuracy, share = (right + 1) / (answered + 2), answered / len(drawn.y)
        if not answered or accuracy <= wanted.accuracy:
            continue

        def enough(records: int, share: float = share, accuracy: float = accuracy) -> bool:
            return power(round(records * share), accuracy, wanted) >= ENOUGH_POWER

        if enough(fewest - 1):
            # The search assumes that power rises with the number; it does, up to small steps.
            fewest = bisect_left(range(fewest), True, key=enough)
    return fewest if fewest <= MOST_RECORDS else None


def summary(found: Certification) -> str:
    """A summary for people, one line for each region and estimator."""
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
    """(number answered with q' >= threshold, number right among them)."""
    answered: Tensor = served.answered & (served.q_prime >= threshold)
    return int(answered.sum()), int((served.y[answered] == 1).sum())
