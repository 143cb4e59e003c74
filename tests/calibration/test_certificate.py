"""Certificates: the test by hand, the order of thresholds, when the sequence ends, and what is said of a failure."""

from __future__ import annotations

from dataclasses import replace
from math import log, nextafter

import pytest
import torch

from candor.calibration.certificate import (
    CUTS,
    Claim,
    certify,
    power,
    records_needed,
    start,
    summary,
    thresholds,
    walk,
)
from candor.calibration.errors import CalibrationError
from candor.calibration.generate import Labelled
from candor.calibration.served import ServedRows
from candor.sdm.adaptor import ExemplarAdaptor
from candor.sdm.estimator import SDMEstimator

WANTED = Claim(0.9, 0.05)


def served(q_prime: list[float], y: list[int], unanswered: int = 0) -> ServedRows:
    """Answered with these q', and so many more records that were not."""
    n = len(y) + unanswered
    return ServedRows(
        y=torch.tensor([*y, *[0] * unanswered]),
        y_hat=torch.ones(n, dtype=torch.int64),
        admitted=torch.arange(n) < len(y),
        sdm=torch.zeros(n, 2),
        q_prime=torch.tensor([*q_prime, *[0.0] * unanswered]),
        attempts=torch.ones(n, dtype=torch.int64),
        tokens=torch.zeros(n, dtype=torch.int64),
    )


def test_29_of_29_certify_nine_in_ten_and_28_do_not() -> None:
    # 0.9^29 = 0.0471 <= 0.05 < 0.0523 = 0.9^28: the shortest run without an error.
    (step,) = walk(served([1.0] * 29, [1] * 29), [1.0], WANTED)
    assert step.passed
    assert step.p_value == pytest.approx(0.9**29)
    (step,) = walk(served([1.0] * 28, [1] * 28), [1.0], WANTED)
    assert not step.passed
    # One error: P(X >= 45 | 46, 0.9) = 0.9^46 + 46 * 0.1 * 0.9^45 = 0.0480.
    (step,) = walk(served([1.0] * 46, [1] * 45 + [0]), [1.0], WANTED)
    assert step.p_value == pytest.approx(0.9**46 + 46 * 0.1 * 0.9**45)
    assert step.passed


def test_a_probability_of_delta_itself_passes() -> None:
    # Two of two: 0.5^2 = 0.25, to the bit.
    wanted = Claim(0.5, 0.25)
    (step,) = walk(served([1.0] * 2, [1] * 2), [1.0], wanted)
    assert (step.p_value, step.passed) == (wanted.delta, True)
    assert power(2, 0.9, wanted) == pytest.approx(0.9**2)


def test_nothing_answered_shows_nothing() -> None:
    (step,) = walk(served([], [], unanswered=5), [1.0], WANTED)
    assert (step.answered, step.p_value, step.passed) == (0, 1.0, False)


def test_the_first_failure_ends_the_sequence_even_where_a_later_threshold_would_pass() -> None:
    # From 3 on: 40 right. From 2 on: 40 right, 10 wrong. From 1 on: 340 right, 10 wrong, which would pass.
    drawn = served([3.0] * 40 + [2.0] * 10 + [1.0] * 300, [1] * 40 + [0] * 10 + [1] * 300)
    steps = walk(drawn, [3.0, 2.0, 1.0], WANTED)
    assert [(step.answered, step.right, step.passed) for step in steps] == [(40, 40, True), (50, 40, False)]
    assert walk(drawn, [1.0], WANTED)[0].passed


def test_thresholds_are_quantiles_of_the_answered_and_end_at_the_region() -> None:
    order = thresholds(served([float(q) for q in range(100, 0, -1)], [1] * 100, unanswered=50), floor=0.5)
    assert order == (*(float(101 - 5 * step) for step in range(1, CUTS)), 0.5)
    assert thresholds(served([], [], unanswered=3), floor=7.0) == (7.0,)
    assert thresholds(served([4.0] * 9, [1] * 9), floor=4.0) == (4.0,)  # ties give one threshold


def test_power_is_the_probability_of_enough_right() -> None:
    # 29 must all be right.
    assert power(29, 0.99, WANTED) == pytest.approx(0.99**29)
    assert power(28, 0.999, WANTED) == 0.0
    assert power(0, 0.999, WANTED) == 0.0
    # At the edge of the claim itself, no more than delta.
    assert all(power(n, 0.9, WANTED) <= 0.05 for n in (29, 46, 100, 1000))


def test_too_strict_thresholds_are_passed_over() -> None:
    """The strictest leaves 5 in a hundred: on as many records again it could show nothing, and would end all."""
    seen = served([float(q) for q in range(400, 0, -1)], [1] * 400)
    order = thresholds(seen, 1.0)
    begun = start(seen, order, 400, WANTED)
    assert 0 < begun < len(order) - 1
    expected = [round(400 * (CUTS - i) / CUTS) for i in range(CUTS)][::-1]
    assert power(expected[begun], (expected[begun] + 1) / (expected[begun] + 2), WANTED) >= 0.9
    assert power(expected[begun - 1], (expected[begun - 1] + 1) / (expected[begun - 1] + 2), WANTED) < 0.9
    assert start(seen, order, 20_000, WANTED) == 0  # with many records the strictest is as good


def test_where_nothing_is_likely_to_pass_the_likeliest_is_tried() -> None:
    # From 2 on all right, from 1 on half wrong: only the stricter has a chance.
    seen = served([2.0] * 40 + [1.0] * 40, [1] * 40 + [0] * 40)
    order = (2.0, 1.0)
    assert order[start(seen, order, 80, WANTED)] == 2.0


def test_how_many_records_would_do() -> None:
    # 28 of 28, of 56 records: 29/30 is the estimate. Every second record is answered.
    drawn = served([1.0] * 28, [1] * 28, unanswered=28)
    needed = records_needed(drawn, [1.0], WANTED)
    assert needed is not None
    assert power(round(needed / 2), 29 / 30, WANTED) >= 0.8
    assert power(round((needed - 4) / 2), 29 / 30, WANTED) < 0.8
    # Stricter is better where only those are right.
    mixed = served([2.0] * 28 + [1.0] * 28, [1] * 28 + [0] * 28)
    assert records_needed(mixed, [2.0, 1.0], WANTED) == records_needed(mixed, [2.0], WANTED)
    assert records_needed(mixed, [1.0], WANTED) is None
    assert records_needed(served([], [], unanswered=9), [1.0], WANTED) is None


def line_estimator(alphas: tuple[float, ...] = (0.9,)) -> SDMEstimator:
    """h in R: y = 1 right of 0, 0 left of it; the adaptor is h' = h, z' = (-h, h)."""
    adaptor = ExemplarAdaptor(torch.zeros(1), torch.ones(1), 1, 2)
    with torch.no_grad():
        adaptor.exemplar.weight.copy_(torch.ones(1, 1))
        adaptor.exemplar.bias.zero_()
        adaptor.head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        adaptor.head.bias.zero_()
    halves = [
        (h, (h[:, 0] > 0).long())
        for h in (torch.linspace(-3, 3, 400)[:, None], torch.linspace(-2.9, 2.9, 300)[:, None])
    ]
    return SDMEstimator.fit(adaptor, halves[0], halves[1], alphas)


def on_the_line(n: int, label: int | None = None) -> list[Labelled]:
    """Answers at points of the line, labelled by their side or all alike."""
    points = torch.linspace(-2.8, 2.8, n)
    return [
        Labelled(
            f"{n}-{i}",
            f"{n}-{i}",
            (),
            "",
            (1 if h > 0 else 0) if label is None else (1 if label else 0),
            h.view(1),
        )
        for i, h in enumerate(points)
    ]


DEPTH = {193.0: 1.45, 173.0: 1.3, 153.0: 1.15, 133.0: 1.0, 114.0: 0.85, 0.0: 0.0}
"""Points of the line with q' = q, also at d_lower: far from 0 that many exemplars are nearer than the first other."""


def at(q_prime: float, right: int, wrong: int = 0) -> list[Labelled]:
    """Answers to so many prompts, judged right with this q', and right or wrong in truth; at 0 none is answered."""
    point = torch.tensor([DEPTH[q_prime]])
    named = ((label, f"{q_prime}/{label}/{i}") for label, n in ((1, right), (0, wrong)) for i in range(n))
    return [Labelled(name, name, "", "", 1 if label else 0, point) for label, name in named]


def test_the_depths_are_what_they_are_said_to_be() -> None:
    estimator = line_estimator()
    for kind in ("admitted", "admitted_lower"):
        got = estimator.estimate(torch.tensor(list(DEPTH.values()))[:, None], 0.9)
        assert getattr(got, kind).tolist() == [True] * 5 + [False]
    assert got.q_prime.tolist()[:-1] == got.q_prime_lower.tolist()[:-1] == list(DEPTH)[:-1]
    assert not (got.y_hat[:-1] - 1).any()


def test_the_calibration_half_orders_and_the_certification_records_count() -> None:
    """No threshold lies where only certification records do, and no calibration record is counted."""
    estimator = line_estimator()
    known = at(173.0, 300) + at(133.0, 300)
    fresh = at(193.0, 60) + at(173.0, 40) + at(153.0, 40) + at(133.0, 37, wrong=3) + at(114.0, 20)
    floor = estimator.regions[0.9].q_prime_min
    for one in certify(estimator, known, fresh, WANTED).sought:
        assert [(step.threshold, step.answered, step.right, step.passed) for step in one.steps] == [
            (173.0, 100, 100, True),
            (133.0, 180, 177, True),
            (floor, 200, 197, True),
        ]
        certificate = one.certificate
        assert certificate is not None
        assert (certificate.rescaled_similarity_min, certificate.records) == (floor, 200)
        assert (certificate.answered, certificate.right) == (200, 197)
        assert certificate.covers(floor)
        assert not certificate.covers(nextafter(floor, 0))


def test_the_calibration_half_says_where_to_begin() -> None:
    """Of 1,000 known 400 lie at 193: of 60 fresh ones 24 are expected there, and 24 show nothing (0.9^24 = 0.08).

    That all 60 do lie there is not to be known beforehand.
    """
    estimator = line_estimator()
    floor = estimator.regions[0.9].q_prime_min
    found = certify(estimator, at(193.0, 400) + at(153.0, 600), at(193.0, 60), WANTED)
    for one in found.sought:
        assert [step.threshold for step in one.steps] == [153.0, floor]


def test_what_passed_before_the_first_failure_is_certified_and_nothing_after_it() -> None:
    """From 193 on 40 of 40, from 153 on 70 of 80; from the region's own threshold on 670 of 680, never asked."""
    known = at(193.0, 300) + at(153.0, 300) + at(114.0, 300)
    fresh = at(193.0, 40) + at(153.0, 30, wrong=10) + at(114.0, 600)
    for one in certify(line_estimator(), known, fresh, WANTED).sought:
        assert [(step.threshold, step.passed) for step in one.steps] == [(193.0, True), (153.0, False)]
        assert one.certificate is not None
        assert one.certificate.rescaled_similarity_min == 193.0
        assert (one.certificate.answered, one.certificate.right) == (40, 40)


def test_people_are_told_what_was_certified_not_what_failed_after_it() -> None:
    known = at(193.0, 300) + at(153.0, 100)
    found = certify(line_estimator(), known, at(193.0, 60) + at(153.0, 10, wrong=10), WANTED)
    assert summary(found).count("yes, from q' = 193.00 on: 60 right of 60 answered, bound 0.9513") == 2
    report = found.to_json()
    assert (report["accuracy"], report["delta"], report["records"]) == (0.9, 0.05, 80)
    assert [one["certificate"]["right"] for one in report["sought"]] == [60, 60]


def test_the_lower_estimators_thresholds_are_q_prime_at_d_lower() -> None:
    estimator = line_estimator()
    moved = [replace(answer, h=torch.tensor([1.2])) for answer in at(153.0, 300)]  # d = 0.4 there
    got = estimator.estimate(moved[0].h[None], 0.9)
    first = {one.estimator: one.steps[0].threshold for one in certify(estimator, moved, moved, WANTED).sought}
    assert first == {"lower": got.q_prime_lower.item(), "plain": got.q_prime.item()}
    assert first["lower"] < first["plain"] < 160


def test_of_a_prompt_that_stands_there_twice_the_first_counts() -> None:
    twenty_nine = at(153.0, 29)
    other = replace(twenty_nine[0], id="again", label=0)

    def right(fresh: list[Labelled]) -> set[tuple[int, int]]:
        found = certify(line_estimator(), at(153.0, 300), fresh, WANTED)
        return {(one.steps[0].answered, one.steps[0].right) for one in found.sought}

    assert right([*twenty_nine, other]) == {(29, 29)}
    assert right([other, *twenty_nine]) == {(29, 28)}


def test_how_many_would_do_is_reckoned_from_the_certification_records() -> None:
    """28 right of 56: half are answered, and 29/30 is the estimate, however well the calibration half did."""
    fresh = at(153.0, 28) + at(0.0, 0, wrong=28)
    for one in certify(line_estimator(), at(153.0, 300), fresh, WANTED).sought:
        assert one.certificate is None
        assert one.records_needed is not None
        assert power(round(one.records_needed / 2), 29 / 30, WANTED) >= 0.8
        assert power(round((one.records_needed - 4) / 2), 29 / 30, WANTED) < 0.8


def test_a_region_that_keeps_its_promise_is_certified_as_it_is() -> None:
    estimator = line_estimator()
    found = certify(estimator, on_the_line(300), on_the_line(200), WANTED)
    assert {(one.alpha, one.estimator) for one in found.certificates} == {(0.9, "lower"), (0.9, "plain")}
    region = estimator.regions[0.9]
    for one in found.certificates:
        assert one.rescaled_similarity_min == region.q_prime_min
        assert one.right == one.answered >= 29
        assert one.lower_bound == pytest.approx(0.05 ** (1 / one.answered))  # none wrong: bound^n = delta
        assert (one.records, one.accuracy, one.confidence) == (200, 0.9, 0.95)
    assert "yes" in summary(found)


def test_wrong_answers_get_no_certificate_and_no_number_of_records_is_named() -> None:
    found = certify(line_estimator(), on_the_line(300), on_the_line(200, label=0), WANTED)
    assert found.certificates == ()
    assert all(one.records_needed is None and len(one.steps) == 1 for one in found.sought)
    assert "even 100000 records" in summary(found)


def test_too_few_records_get_none_and_are_told_how_many_would_do() -> None:
    found = certify(line_estimator(), on_the_line(300), on_the_line(40), WANTED)
    assert found.certificates == ()
    for one in found.sought:
        assert one.records_needed is not None
        assert one.records_needed > 40
        assert f"some {one.records_needed - 40} more records" in summary(found)


def test_a_prompt_counts_once_however_often_it_stands_there() -> None:
    once = on_the_line(40)
    often = [replace(answer, id=f"{answer.id}/{i}") for answer in once for i in range(20)]
    one, other = (certify(line_estimator(), on_the_line(300), part, WANTED) for part in (once, often))
    assert one == other


def test_without_a_region_nothing_is_sought() -> None:
    estimator = line_estimator((0.999,))  # takes a thousand points of each class
    found = certify(estimator, on_the_line(300), on_the_line(200), WANTED)
    assert found.sought == ()
    assert summary(found) == "No certificate: no region was found at any alpha."


def test_no_records_at_all() -> None:
    with pytest.raises(CalibrationError, match="no record is left to certify on"):
        certify(line_estimator(), on_the_line(300), [], WANTED)


@pytest.mark.parametrize(
    ("accuracy", "delta"), [(0.0, 0.05), (1.0, 0.05), (95, 0.05), (0.9, 0.0), (0.9, 0.5)]
)
def test_what_cannot_be_wanted(accuracy: float, delta: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Claim(accuracy, delta)


def test_what_can_just_be_wanted() -> None:
    assert Claim(0.001, 0.499) == Claim(accuracy=0.001, delta=0.499)


def test_a_false_claim_is_certified_with_probability_delta_at_most() -> None:
    """Every threshold is false, at the edge: 1,000 sequences of nested sets, true accuracy 0.9 - 1e-9."""
    generator = torch.Generator().manual_seed(0)
    n, redraws = 200, 1000
    q_prime = [float(n - i) for i in range(n)]
    order = [float(n - k) for k in (30, 50, 80, 120, 199)]
    issued = 0
    for _ in range(redraws):
        y = (torch.rand(n, generator=generator) < WANTED.accuracy - 1e-9).int().tolist()
        issued += walk(served(q_prime, y), order, WANTED)[0].passed
    # The first test alone decides; 4 standard errors above delta.
    assert issued / redraws <= 0.05 + 4 * (0.05 * 0.95 / redraws) ** 0.5
    # And it is no empty promise: P(no error in 31) = 0.9^31 is near what was found.
    assert issued / redraws == pytest.approx(0.9**31, abs=4 * (0.04 / redraws) ** 0.5)
    assert log(0.05) / log(0.9) < 31
