"""The verdict as a table: every region, reason and order of precedence, on one row and on many."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from candor.policy.certificate import Certificate, EstimatorKind
from candor.policy.decision import (
    FOLLOWS,
    REASONS,
    REGION_OF,
    Decisions,
    Figures,
    Verdict,
    decide,
    unavailable,
    verdict_of,
)
from candor.sdm.outputs import Estimate
from candor.sdm.region import Region

ALPHA = 0.9


@dataclass(frozen=True)
class Row:
    """What one answer's row of an estimate says, and what else its decision rests on."""

    y_hat: int = 1
    q_prime: float = 90.0
    q_prime_lower: float = 80.0
    is_ood: bool = False
    admitted: bool = True
    admitted_lower: bool = True
    finite: bool = True
    calibrated: bool = True
    certified_only: bool = False


ADMITTED = Row()
REFUSED = Row(admitted=False, admitted_lower=False)
REGION = Region(ALPHA, 70.0, torch.tensor([0.95, 0.95]))
NOWHERE = Region(ALPHA, math.inf, torch.full((2,), math.inf))


def estimate(rows: list[Row]) -> Estimate:
    def of(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([getattr(row, name) for row in rows], dtype=dtype)

    n = len(rows)
    lean = torch.tensor([[-1.0, 1.0] if row.y_hat == 1 else [1.0, -1.0] for row in rows])  # (n, 2)
    known: dict[str, Any] = {name: torch.full((n,), 0.5) for name in ("d_nearest", "d", "d_lower", "d_upper")}
    known |= {name: torch.sigmoid(4 * lean) for name in ("sdm", "sdm_lower", "sdm_upper")}
    known |= {"z_prime": lean, "q": torch.full((n,), 100), "epsilon": torch.full((n,), 0.1)}
    known |= {"effective_sample_size": torch.full((n, 2), 50), "y_hat": of("y_hat", torch.int64)}
    known |= {name: of(name) for name in ("q_prime", "q_prime_lower")}
    known |= {name: of(name, torch.bool) for name in ("is_ood", "admitted", "admitted_lower")}
    return Estimate(**known)


def decisions(
    rows: list[Row],
    kind: EstimatorKind = "lower",
    region: Region = REGION,
    certificate: Certificate | None = None,
) -> Decisions:
    return decide(
        estimate(rows),
        region,
        finite=torch.tensor([row.finite for row in rows]),
        calibrated=torch.tensor([row.calibrated for row in rows]),
        estimator=kind,
        certificate=certificate,
        certified_only=torch.tensor([row.certified_only for row in rows]),
    )


def verdict(
    row: Row,
    kind: EstimatorKind = "lower",
    region: Region = REGION,
    certificate: Certificate | None = None,
) -> Verdict:
    found = decisions([row], kind, region, certificate)
    return verdict_of(0, estimate([row]), found, ALPHA, torch.tensor([row.calibrated]), certificate)


def plainly(row: Row, kind: str, threshold: float, least_certified: float | None) -> str | None:
    """The reason, in the words of the table, one answer at a time."""
    lower = kind == "lower"
    similarity = row.q_prime_lower if lower else row.q_prime
    if not row.finite:
        return "scoring_unavailable"
    if row.is_ood:
        return "out_of_distribution"
    if not row.calibrated:
        return "uncalibrated_request"
    if math.isinf(threshold):
        return "no_region_at_alpha"
    if not (row.admitted_lower if lower else row.admitted):
        return "below_similarity_threshold" if similarity < threshold else "below_class_threshold"
    if row.y_hat != FOLLOWS:
        return "predicted_not_following"
    if row.certified_only and (least_certified is None or similarity < least_certified):
        return "not_certified"
    return None


@pytest.mark.parametrize("kind", ["lower", "plain"])
@pytest.mark.parametrize(
    ("row", "region", "expected"),
    [
        (ADMITTED, REGION, None),
        (replace(ADMITTED, y_hat=0), REGION, "predicted_not_following"),
        (replace(ADMITTED, calibrated=False), REGION, "uncalibrated_request"),
        (replace(ADMITTED, is_ood=True), REGION, "out_of_distribution"),
        (replace(ADMITTED, is_ood=True, calibrated=False), REGION, "out_of_distribution"),
        (REFUSED, NOWHERE, "no_region_at_alpha"),
        (REFUSED, replace(REGION, q_prime_min=90.5), "below_similarity_threshold"),
        (REFUSED, REGION, "below_class_threshold"),
        (replace(REFUSED, y_hat=0), REGION, "below_class_threshold"),
        (replace(REFUSED, calibrated=False), REGION, "uncalibrated_request"),
        (replace(ADMITTED, finite=False), REGION, "scoring_unavailable"),
        (replace(ADMITTED, finite=False, calibrated=False), REGION, "scoring_unavailable"),
    ],
)
def test_reasons(row: Row, region: Region, expected: str | None, kind: EstimatorKind) -> None:
    found = verdict(row, kind, region)
    assert found.reason == expected
    assert found.abstained is (expected is not None)


@pytest.mark.parametrize(
    ("reason", "region"),
    [
        (None, "high"),
        ("predicted_not_following", "high"),
        ("not_certified", "high"),
        ("certificate_suspended", "high"),
        ("below_class_threshold", "low"),
        ("below_similarity_threshold", "low"),
        ("no_region_at_alpha", "low"),
        ("below_score_threshold", "low"),
        ("no_certificate_at_alpha", "low"),
        ("uncalibrated_request", "low"),
        ("out_of_distribution", "ood"),
        ("scoring_unavailable", "unavailable"),
    ],
)
def test_each_reason_has_its_region(reason: Any, region: str) -> None:
    assert ({None: "high"} | REGION_OF)[reason] == region
    assert (None, *REGION_OF) == REASONS
    assert len(REASONS) == 13


def test_the_estimator_in_force_admits() -> None:
    thin = replace(ADMITTED, admitted_lower=False)
    assert verdict(thin, "plain").reason is None
    assert verdict(thin, "lower").reason == "below_class_threshold"


def test_the_reason_speaks_of_the_estimator_in_force() -> None:
    """q' = 90 and q'_lower = 80 stand on either side of the threshold 85."""
    between = replace(REGION, q_prime_min=85.0)
    assert verdict(REFUSED, "plain", between).reason == "below_class_threshold"
    assert verdict(REFUSED, "lower", between).reason == "below_similarity_threshold"


def test_the_threshold_itself_is_enough() -> None:
    exact = replace(REGION, q_prime_min=80.0)
    assert verdict(REFUSED, "lower", exact).reason == "below_class_threshold"


CERTIFICATE = Certificate(ALPHA, "lower", 0.95, 0.95, 80.0, 400, 120, 119, 0.961)


@pytest.mark.parametrize("certified_only", [False, True])
@pytest.mark.parametrize(
    ("kind", "least", "covered"),
    [("lower", 80.0, True), ("lower", 80.5, False), ("plain", 80.5, True), ("plain", 90.5, False)],
)
def test_a_certificate_comes_with_what_it_covers(
    kind: EstimatorKind, least: float, covered: bool, certified_only: bool
) -> None:
    """q' is 90 and q'_lower is 80: the estimator in force says which is compared."""
    certificate = replace(CERTIFICATE, rescaled_similarity_min=least)
    found = verdict(replace(ADMITTED, certified_only=certified_only), kind, certificate=certificate)
    assert found.region == "high"
    assert (found.certificate is not None) is covered
    assert found.reason == ("not_certified" if certified_only and not covered else None)
    assert found.settles


@pytest.mark.parametrize("certified_only", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        replace(ADMITTED, finite=False),
        REFUSED,
        replace(ADMITTED, calibrated=False),
        replace(ADMITTED, is_ood=True),
        replace(ADMITTED, y_hat=0),
    ],
)
def test_no_certificate_helps_what_is_not_answered(row: Row, certified_only: bool) -> None:
    found = verdict(replace(row, certified_only=certified_only), certificate=CERTIFICATE)
    assert found == verdict(row)
    assert (found.abstained, found.certificate, found.settles) == (True, None, False)


def test_where_only_certified_answers_count_and_there_is_no_certificate_nothing_is_answered() -> None:
    assert verdict(replace(ADMITTED, certified_only=True)).reason == "not_certified"


def test_uncertified_answers_count_unless_somebody_asked_for_certified_ones() -> None:
    flags = torch.tensor([True])
    found = decide(estimate([ADMITTED]), REGION, finite=flags, calibrated=flags, estimator="lower")
    assert found.answered.tolist() == [True]
    assert not found.covered.any()
    assert found.reason.dtype == torch.int64


def test_the_figures_are_those_of_the_row_and_of_the_class_predicted() -> None:
    """Of three classes, so that the largest of the others is not the only other."""
    measured = replace(
        estimate([ADMITTED, ADMITTED]),
        y_hat=torch.tensor([0, 1]),
        z_prime=torch.tensor([[5.0, -1.0, 2.0], [-4.0, 3.0, 1.0]]),
        sdm=torch.tensor([[0.75, 0.125, 0.125], [0.25, 0.5, 0.25]]),
        sdm_lower=torch.tensor([[0.625, 0.25, 0.125], [0.375, 0.4375, 0.1875]]),
        sdm_upper=torch.tensor([[0.875, 0.0625, 0.0625], [0.125, 0.625, 0.25]]),
        q=torch.tensor([7, 9]),
        q_prime=torch.tensor([6.5, 8.5]),
        q_prime_lower=torch.tensor([5.5, 7.5]),
        d=torch.tensor([0.25, 0.75]),
        effective_sample_size=torch.tensor([[1, 2, 3], [4, 5, 6]]),
    )
    flags = torch.tensor([True, True])
    found = decide(measured, REGION, finite=flags, calibrated=flags, estimator="lower")
    first, second = (verdict_of(row, measured, found, ALPHA, flags, None).figures for row in (0, 1))
    assert first == Figures(0, 0.75, 0.625, 0.875, 7, 6.5, 0.25, 3.0, [1, 2, 3])
    assert second == Figures(1, 0.5, 0.4375, 0.625, 9, 8.5, 0.75, 2.0, [4, 5, 6])


def test_an_answer_that_could_not_be_scored_has_no_figures() -> None:
    found = unavailable(ALPHA, calibrated=True)
    assert (found.reason, found.region, found.figures) == ("scoring_unavailable", "unavailable", None)
    assert verdict(replace(ADMITTED, finite=False)) == found


def test_one_way_leads_to_an_answer() -> None:
    """Over every combination of flags, one row at a time against the table in words."""
    flags = [name.name for name in fields(Row) if name.type == "bool"]
    for values in product([False, True], repeat=len(flags)):
        for y_hat, kind, least in product((0, 1), ("lower", "plain"), (None, 80.0, 95.0)):
            row = Row(y_hat=y_hat, **dict(zip(flags, values, strict=True)))
            certificate = None if least is None else replace(CERTIFICATE, rescaled_similarity_min=least)
            found = verdict(row, kind, certificate=certificate)  # type: ignore[arg-type]
            assert found.reason == plainly(row, kind, 70.0, least)
            assert found.abstained is (found.reason is not None)
            assert found.region == ({None: "high"} | REGION_OF)[found.reason]
            assert found.settles is (found.reason in (None, "not_certified"))


_ROWS = st.builds(
    Row,
    y_hat=st.sampled_from([0, 1]),
    q_prime=st.sampled_from([0.0, 69.5, 70.0, 80.0, 100.0]),
    q_prime_lower=st.sampled_from([0.0, 69.5, 70.0, 80.0, 100.0]),
    **{name: st.booleans() for name in (field.name for field in fields(Row) if field.type == "bool")},
)


@given(
    st.lists(_ROWS, min_size=1, max_size=12),
    st.sampled_from(["lower", "plain"]),
    st.sampled_from([REGION, NOWHERE]),
    st.sampled_from([None, 70.0, 80.0]),
)
def test_the_decision_on_many_rows_is_that_on_each(
    rows: list[Row], kind: EstimatorKind, region: Region, least: float | None
) -> None:
    certificate = None if least is None else replace(CERTIFICATE, rescaled_similarity_min=least)
    many = decisions(rows, kind, region, certificate)
    for number, row in enumerate(rows):
        one = decisions([row], kind, region, certificate)
        assert {name: value[number] for name, value in vars(many).items()} == {
            name: value[0] for name, value in vars(one).items()
        }
        assert REASONS[int(many.reason[number])] == plainly(row, kind, region.q_prime_min, least)
        assert bool(many.answered[number]) is not verdict(row, kind, region, certificate).abstained
