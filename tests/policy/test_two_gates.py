"""Two gates: the table of reasons on one row and on many, prompts judged before their answers, and the words."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from candor.policy.certificate import RuleCertificate, RuleTerms
from candor.policy.decision import REASONS, REGION_OF, Verdict, decide_by_rule
from candor.policy.judging import TwoGates, judge_by_rule, judge_prompts
from candor.policy.words import explanation
from candor.sdm.adaptor import ExemplarAdaptor
from candor.sdm.estimator import SDMEstimator
from candor.sdm.forecast import ScoreForecast
from candor.sdm.gate import PromptGate
from candor.sdm.probe import StrangerProbe
from candor.sdm.rule import AnswerRule, RuleEstimate
from candor.sdm.score import AnswerScore

AT_0_9 = RuleCertificate(0.9, 0.95, 0.95, 1.5, 400, 200, 197, 300, 0.96)
TERMS = RuleTerms("evidence", 0.02, 0.019, 0.95, 12.5, 0, (AT_0_9,))


def plainly(known: bool, score: float, finite: bool, calibrated: bool, least: float | None) -> str | None:
    """The reason, in the words of the table."""
    if not finite:
        return "scoring_unavailable"
    if not known:
        return "out_of_distribution"
    if not calibrated:
        return "uncalibrated_request"
    if least is None:
        return "no_certificate_at_alpha"
    return None if score >= least else "below_score_threshold"


@given(
    rows=st.lists(
        st.tuples(
            st.booleans(), st.sampled_from([-math.inf, 1.4999, 1.5, 9.0]), st.booleans(), st.booleans()
        ),
        min_size=1,
        max_size=12,
    ),
    certified=st.booleans(),
)
def test_many_rows_are_one_row_after_the_other(
    rows: list[tuple[bool, float, bool, bool]], certified: bool
) -> None:
    known, score, finite, calibrated = zip(*rows, strict=True)
    ones = torch.ones(len(rows))
    found = decide_by_rule(
        RuleEstimate(ones, torch.tensor(known), ~torch.tensor(known), ones, torch.tensor(score), ones),
        AT_0_9 if certified else None,
        finite=torch.tensor(finite),
        calibrated=torch.tensor(calibrated),
    )
    expected = [plainly(*row, 1.5 if certified else None) for row in rows]
    assert [REASONS[code] for code in found.reason.tolist()] == expected
    through = [reason is None for reason in expected]
    assert found.answered.tolist() == found.covered.tolist() == found.follows.tolist() == through


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


@pytest.fixture(scope="module")
def gates() -> TwoGates:
    """S = h; a prompt is known iff it is near 0."""
    draw = torch.Generator().manual_seed(0)
    gate = PromptGate.fit(
        torch.randn(40, 2, generator=draw), torch.randn(60, 2, generator=draw), (1, 1), 1, 1
    )
    double = torch.float64
    weight = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    score = AnswerScore(
        weight, torch.tensor(0.0), torch.tensor(2.0, dtype=double), torch.tensor(0.0, dtype=double)
    )
    return TwoGates(AnswerRule(gate, score), TERMS)


def test_every_verdict_carries_what_both_gates_measured(estimator: SDMEstimator, gates: TwoGates) -> None:
    h = torch.tensor([[2.0], [1.0], [2.0], [math.nan], [2.0]])
    prompts = torch.tensor([[0.0, 0.0], [0.0, 0.0], [90.0, 0.0], [0.0, 0.0], [math.nan, 0.0]])
    calibrated = torch.ones(5, dtype=torch.bool)
    found = judge_by_rule(estimator, gates, estimator.measure(h), h, prompts, 0.9, calibrated=calibrated)
    through, below, stranger, *unmeasured = (found.verdict(row) for row in range(5))
    assert (through.reason, through.certificate, through.settles) == (None, AT_0_9, True)
    assert through.rule is not None
    assert through.figures is not None
    assert (through.rule.score, through.rule.score_min) == (2.0, 1.5)
    assert through.probability == through.rule.probability == pytest.approx(1 / (1 + math.exp(-4)))
    assert (below.reason, below.region, below.certificate) == ("below_score_threshold", "low", None)
    assert (stranger.reason, stranger.region) == ("out_of_distribution", "ood")
    assert stranger.rule is not None
    assert stranger.rule.prompt_p_value == pytest.approx(1 / 61)
    assert stranger.figures == through.figures  # the layer's, whatever the prompt
    for verdict in unmeasured:
        assert (verdict.reason, verdict.rule, verdict.figures) == ("scoring_unavailable", None, None)


def test_without_a_certificate_nothing_is_let_through(estimator: SDMEstimator, gates: TwoGates) -> None:
    h, prompts = torch.full((1, 1), 1e6), torch.zeros(1, 2)
    found = judge_by_rule(
        estimator, gates, estimator.measure(h), h, prompts, 0.95, calibrated=torch.tensor([True])
    )
    assert found.verdict(0).reason == "no_certificate_at_alpha"


def early_verdicts(
    gates: TwoGates, prompts: torch.Tensor, alpha: float, calibrated: torch.Tensor | None = None
) -> list[Verdict]:
    kept = torch.ones(len(prompts), dtype=torch.bool) if calibrated is None else calibrated
    return judge_prompts(gates, prompts, gates.rule.know(prompts), alpha, calibrated=kept)


def test_a_prompt_is_refused_early_iff_no_answer_to_it_could_be_let_through(
    estimator: SDMEstimator, gates: TwoGates
) -> None:
    """Whatever is refused at prefill is refused at the answer's end for the same reason, whatever its score."""
    prompts = torch.tensor([[0.0, 0.0], [90.0, 0.0], [math.nan, 0.0]])
    best = torch.full((3, 1), 9.0)
    for alpha, kept in product((0.9, 0.95), (True, False)):
        calibrated = torch.full((3,), kept)
        early = early_verdicts(gates, prompts, alpha, calibrated)
        late = judge_by_rule(
            estimator, gates, estimator.measure(best), best, prompts, alpha, calibrated=calibrated
        )
        assert [one.reason for one in early] == [late.verdict(row).reason for row in range(3)]
    assert [one.figures for one in early_verdicts(gates, prompts, 0.9)] == [None] * 3


def test_an_early_verdict_knows_no_score(gates: TwoGates) -> None:
    [verdict] = early_verdicts(gates, torch.tensor([[90.0, 0.0]]), 0.9)
    assert verdict.rule is not None
    assert (verdict.rule.score, verdict.rule.probability, verdict.probability) == (None, None, None)
    assert explanation(verdict) == (
        "The prompt is unlike those calibrated on: a share of 1.6% of them lies as far out."
    )


def test_declared_strangers_are_named(gates: TwoGates) -> None:
    """b = s0: a prompt at (2, 0) is near enough for the gate, and strange to the probe."""
    probe = StrangerProbe.fit(torch.tensor([1.0, 0.0]), torch.zeros(9, 2), 1)
    probed = replace(gates, rule=replace(gates.rule, probe=probe))
    [verdict] = early_verdicts(probed, torch.tensor([[1.0, 0.0]]), 0.9)
    assert verdict.reason == "out_of_distribution"
    assert verdict.rule is not None
    assert verdict.rule.like_strangers
    assert verdict.rule.prompt_p_value > 0.1  # the gate's, which knows it
    assert explanation(verdict) == "The prompt is like those that were declared strange."


def test_a_score_beyond_bounds_is_not_measured(estimator: SDMEstimator, gates: TwoGates) -> None:
    weight = torch.full((7,), 3e38)
    broken = replace(gates, rule=replace(gates.rule, score=replace(gates.rule.score, weight=weight)))
    h, prompts = torch.full((1, 1), 1e6), torch.zeros(1, 2)
    found = judge_by_rule(
        estimator, broken, estimator.measure(h), h, prompts, 0.9, calibrated=torch.tensor([True])
    )
    assert found.verdict(0).reason == "scoring_unavailable"


def test_which_verdicts_no_further_attempt_changes(estimator: SDMEstimator, gates: TwoGates) -> None:
    h = torch.tensor([[1.0], [2.0], [2.0]])
    prompts = torch.tensor([[0.0, 0.0], [90.0, 0.0], [0.0, 0.0]])
    for alpha, expected in ((0.9, [False, True, False]), (0.95, [True, True, True])):
        found = judge_by_rule(
            estimator, gates, estimator.measure(h), h, prompts, alpha, calibrated=torch.ones(3).bool()
        )
        assert [found.verdict(row).final for row in range(3)] == expected


def test_a_prompt_that_promises_too_little_is_refused_early_and_late(
    estimator: SDMEstimator, gates: TwoGates
) -> None:
    """F = the prompt's first state: what lies under the cut is withheld whatever the answer's score."""
    least = replace(AT_0_9, forecast_min=-0.5)
    with pytest.raises(ValueError, match="nothing may be lost"):
        replace(TERMS, certificates=(least,))
    cautious = TwoGates(
        replace(gates.rule, forecast=ScoreForecast(torch.tensor([1.0, 0.0]), torch.tensor(0.0))),
        replace(TERMS, certificates=(least,), may_lose=0.02),
    )
    prompts = torch.tensor([[-0.5, 0.0], [-0.6, 0.0]])
    h, kept = torch.full((2, 1), 9.0), torch.ones(2, dtype=torch.bool)
    early = early_verdicts(cautious, prompts, 0.9)
    found = judge_by_rule(estimator, cautious, estimator.measure(h), h, prompts, 0.9, calibrated=kept)
    late = [found.verdict(row) for row in range(2)]
    for through, withheld in (early, late):
        assert (through.reason, through.certificate) == (None, least)
        assert (withheld.reason, withheld.region, withheld.final) == ("unpromising_prompt", "low", True)
        assert withheld.rule is not None
        assert withheld.rule.prompt_known
        assert withheld.rule.forecast == pytest.approx(-0.6)
        assert withheld.rule.forecast_min == -0.5
        assert explanation(withheld) == (
            "The prompt is of the kind calibrated on, but hardly any answer to it would be rated reliable enough for "
            "90% accuracy."
        )
    beyond = early_verdicts(cautious, prompts, 0.95)
    assert {one.reason for one in beyond} == {"no_certificate_at_alpha"}
    [stranger] = early_verdicts(cautious, torch.tensor([[-90.0, 0.0]]), 0.9)
    assert stranger.reason == "out_of_distribution"


def test_the_words(estimator: SDMEstimator, gates: TwoGates) -> None:
    h, prompts = torch.tensor([[2.0], [1.0]]), torch.zeros(2, 2)
    found = judge_by_rule(
        estimator, gates, estimator.measure(h), h, prompts, 0.9, calibrated=torch.tensor([True, True])
    )
    assert explanation(found.verdict(0)) == (
        "The prompt is of the kind calibrated on, and the answer's score 2.00 reaches 1.50. Of such answers at least "
        "95% are right, certified with confidence 95%."
    )
    assert explanation(found.verdict(1)) == (
        "The prompt is of the kind calibrated on, but the answer's score 1.00 is below 1.50."
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"score_min": math.inf}, "finite"),
        ({"forecast_min": math.inf}, "finite"),
        ({"base_right": 196}, "do not go with"),
        ({"base_right": 401}, "do not go with"),
        ({"right": 201}, "do not go with|expected 0 < right"),
        ({"lower_bound": 0.94}, "does not show"),
        ({"confidence": 1.0}, "confidence"),
        ({"alpha": 0.96}, "does not serve at alpha 0.96"),
    ],
)
def test_certificates_that_do_not_fit(changed: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RuleCertificate(**(vars(AT_0_9) | changed))  # type: ignore[arg-type]


def test_terms_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="one certificate for each alpha"):
        RuleTerms("evidence", 0.02, 0.02, 0.95, 1.0, 0, (AT_0_9, AT_0_9))
    with pytest.raises(ValueError, match="eps"):
        RuleTerms("evidence", 0.0, 0.02, 0.95, 1.0)


def test_every_reason_is_of_one_rule_at_least() -> None:
    assert set(REASONS) == {None, *REGION_OF}
