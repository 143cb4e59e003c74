"""What was measured is judged with the region and certificate of its own alpha and estimator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from candor.policy.certificate import Certificate
from candor.policy.decision import decide, verdict_of
from candor.policy.judging import certificate_at, judge
from candor.sdm.adaptor import ExemplarAdaptor
from candor.sdm.estimator import SDMEstimator

AT_0_9 = Certificate(0.9, "lower", 0.95, 0.95, 100.0, 400, 120, 119, 0.961)
CERTIFICATES = (replace(AT_0_9, estimator="plain", rescaled_similarity_min=150.0), AT_0_9)


@pytest.fixture(scope="module")
def estimator() -> SDMEstimator:
    """On the line: y = 1 right of 0."""
    adaptor = ExemplarAdaptor(torch.zeros(1), torch.ones(1), 1, 2)
    with torch.no_grad():
        adaptor.exemplar.weight.fill_(1.0)
        adaptor.exemplar.bias.zero_()
        adaptor.head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        adaptor.head.bias.zero_()
    halves = [(h, (h[:, 0] > 0).long()) for h in (torch.linspace(-3, 3, n)[:, None] for n in (400, 300))]
    return SDMEstimator.fit(adaptor, halves[0], halves[1], (0.9, 0.95))


def test_a_certificate_is_found_by_alpha_and_estimator() -> None:
    assert certificate_at(CERTIFICATES, 0.9, "lower") is AT_0_9
    assert certificate_at(CERTIFICATES, 0.9, "plain") is CERTIFICATES[0]
    assert certificate_at(CERTIFICATES, 0.95, "lower") is certificate_at((), 0.9, "lower") is None


@pytest.mark.parametrize("kind", ["lower", "plain"])
@pytest.mark.parametrize("alpha", [0.9, 0.95])
def test_it_is_the_decision_on_the_estimate(estimator: SDMEstimator, alpha: float, kind: str) -> None:
    seen = estimator.measure(torch.linspace(-3.5, 3.5, 57)[:, None])
    calibrated, strict = torch.arange(57) % 5 > 0, torch.arange(57) % 2 > 0
    found = judge(
        estimator,
        seen,
        alpha,
        kind,  # type: ignore[arg-type]
        calibrated=calibrated,
        certificates=CERTIFICATES,
        certified_only=strict,
    )
    estimate = estimator.judge(seen, alpha)
    certificate = {(0.9, "lower"): AT_0_9, (0.9, "plain"): CERTIFICATES[0]}.get((alpha, kind))
    decisions = decide(
        estimate,
        estimator.regions[alpha],
        finite=seen.finite,
        calibrated=calibrated,
        estimator=kind,  # type: ignore[arg-type]
        certificate=certificate,
        certified_only=strict,
    )
    for row in range(57):
        assert found.verdict(row) == verdict_of(row, estimate, decisions, alpha, calibrated, certificate)
    reasons = {found.verdict(row).reason for row in range(57)}
    assert {"uncalibrated_request", "not_certified", "predicted_not_following", None} <= reasons


def test_another_alpha_is_refused(estimator: SDMEstimator) -> None:
    with pytest.raises(ValueError, match=r"no region at alpha = 0\.8"):
        judge(estimator, estimator.measure(torch.zeros(1, 1)), 0.8, "lower", calibrated=torch.ones(1).bool())
