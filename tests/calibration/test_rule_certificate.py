"""The certificate of a rule: the walk by hand, the horizon by another's law, and its promise in worlds that are
known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from benchmarks.certificates.__main__ import SCENARIOS, redraw, redraw_whole
from candor.calibration.certificate import Claim
from candor.calibration.errors import CalibrationError
from candor.calibration.rule import FittedRule, RuleRows
from candor.calibration.rule_certificate import (
    CUTS,
    Drawn,
    Unbegun,
    certify_rule,
    horizon,
    start,
    summary,
    thresholds,
    walk,
)
from candor.calibration.rule_certificate import ceiling as ceiling_of
from candor.calibration.rule_settings import RuleSettings
from candor.sdm.forecast import ScoreForecast
from candor.sdm.gate import PromptGate
from candor.sdm.rule import AnswerRule, RuleEstimate
from candor.sdm.score import AnswerScore

WANTED = Claim(0.9, 0.05)


def fitted_rule(scores: Tensor, y: Tensor, known: Tensor | None = None) -> FittedRule:
    """S is the first column of h; a prompt is known iff its states lie near 0."""
    double = torch.float64
    gate = PromptGate(
        torch.zeros(2),
        torch.ones(2),
        torch.tensor([[1.0, 0.0]]),
        torch.ones(1, dtype=double),
        torch.tensor(1.0, dtype=double),
        torch.tensor([0.5, 1.0], dtype=double),
        torch.tensor(1),
    )
    score = AnswerScore(
        torch.tensor([0.0, 0.0, 1.0]),
        torch.tensor(0.0),
        torch.tensor(1.0, dtype=double),
        torch.tensor(0.0, dtype=double),
    )
    known = torch.ones(len(y), dtype=torch.bool) if known is None else known
    return FittedRule(AnswerRule(gate, score), scores.float(), known, y, "last", {}, {}, 0.02)


def rows(scores: list[float], y: list[int], strangers: int = 0, digests: list[str] | None = None) -> RuleRows:
    """The first `strangers` of them have prompts far off."""
    prompts = torch.zeros(len(y), 2)
    prompts[:strangers] = 10
    names = digests or [str(i) for i in range(len(y))]
    return RuleRows(
        prompts, torch.tensor(scores).unsqueeze(1), torch.empty(len(y), 0), torch.tensor(y), names
    )


def ladder(n: int, wrong_below: float) -> tuple[Tensor, Tensor]:
    """Scores from 1 down to 0; right from `wrong_below` on."""
    scores = torch.linspace(1, 0, n)
    return scores, (scores >= wrong_below).long()


def test_thresholds_are_the_quantiles_of_known_scores_strictest_first() -> None:
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])
    known = torch.tensor([True, True, True, True, False])
    assert thresholds(fitted_rule(scores, torch.ones(5).long(), known)) == (9.0, 8.0, 7.0, 6.0)
    many = thresholds(fitted_rule(torch.arange(1_000.0), torch.ones(1_000).long()))
    assert len(many) == CUTS
    assert (many[0], many[-1]) == (980.0, 0.0)
    assert list(many) == sorted(many, reverse=True)


def test_ties_make_one_threshold() -> None:
    assert thresholds(fitted_rule(torch.ones(100), torch.ones(100).long())) == (1.0,)


def test_the_walk_by_hand() -> None:
    """P(X >= r) at 0.9: 29 of 29 0.047 passes; 43 of 44 0.057 fails; nothing after it is tested."""
    scores = [3.0] * 29 + [2.0] * 15 + [1.0] * 50
    y = [1] * 29 + [1] * 14 + [0] + [1] * 50
    given = rows(scores, y)
    fitted = fitted_rule(torch.zeros(1), torch.zeros(1).long())
    judged = fitted.rule.judge(given.prompts, given.h, given.figures)
    steps = walk(fitted, Drawn.of(judged, given.y), (3.0, 2.0, 1.0), WANTED)
    assert [(step.threshold, step.answered, step.right, step.passed) for step in steps] == [
        (3.0, 29, 29, True),
        (2.0, 44, 43, False),
    ]
    assert steps[0].p_value == pytest.approx(0.9**29)
    assert steps[1].p_value == pytest.approx(stats.binom(44, 0.9).sf(42))


def test_where_to_begin() -> None:
    """Where the fitting records say that it will pass; far fewer records begin later, where more are let through."""
    scores, y = ladder(1_000, 0.3)
    fitted = fitted_rule(scores, y)
    order = thresholds(fitted)
    few, many = (start(fitted, order, records, WANTED) for records in (100, 1_000))
    assert many < few
    assert order[few] > 0.3


def test_a_certificate_from_end_to_end() -> None:
    scores, y = ladder(500, 0.25)
    fitted = fitted_rule(scores, y)
    fresh_scores, fresh_y = ladder(400, 0.25)
    given = rows(fresh_scores.tolist(), fresh_y.tolist())
    found = certify_rule(fitted, given, WANTED)
    made = found.certificate
    assert made is not None
    assert made.lower_bound >= 0.9
    assert (made.records, made.base_right) == (400, 300)
    assert made.answered == int((fresh_scores >= made.score_min).sum())
    assert found.ceiling == pytest.approx(0.75 / 0.9)
    assert 0.9 < found.answered / found.ceiling <= 1
    judged = fitted.rule.judge(given.prompts, given.h, given.figures)
    assert int(made.covers(judged.known, judged.score, judged.forecast).sum()) == made.answered
    assert found.to_json()["horizon"] == found.horizon
    json.dumps(found.to_json())
    assert [one.records for one in found.outlook] == [400, 800, 1_600, 3_200]
    shares = [one.share for one in found.outlook]
    assert shares == sorted(shares)
    assert shares[0] > 0.75


def test_what_the_gate_refuses_is_not_counted_as_answered() -> None:
    scores, y = ladder(500, 0.25)
    fresh_scores, fresh_y = ladder(400, 0.25)
    found = certify_rule(
        fitted_rule(scores, y), rows(fresh_scores.tolist(), fresh_y.tolist(), strangers=50), WANTED
    )
    assert found.refused == 50
    assert found.certificate is not None
    assert found.certificate.answered == int((fresh_scores[50:] >= found.certificate.score_min).sum())


def test_each_prompt_counts_once_by_its_first_answer() -> None:
    scores, y = ladder(500, 0.25)
    fresh_scores, fresh_y = ladder(200, 0.25)
    once = rows(fresh_scores.tolist(), fresh_y.tolist())
    names = list(once.digests)
    twice = rows(
        fresh_scores.tolist() * 2,
        fresh_y.tolist() + [1 - label for label in fresh_y.tolist()],
        digests=names * 2,
    )
    fitted = fitted_rule(scores, y)
    assert certify_rule(fitted, twice, WANTED) == certify_rule(fitted, once, WANTED)


def test_an_answer_that_could_not_be_scored_is_not_let_through() -> None:
    scores, y = ladder(500, 0.25)
    fresh_scores, fresh_y = ladder(200, 0.25)
    values = fresh_scores.tolist()
    values[:3] = [math.nan] * 3
    made = certify_rule(fitted_rule(scores, y), rows(values, fresh_y.tolist()), WANTED).certificate
    assert made is not None
    assert made.records == 200
    assert made.answered == int((fresh_scores[3:] >= made.score_min).sum())


def test_without_a_certificate_nothing_is_answered() -> None:
    scores, y = ladder(500, 0.25)
    generator = torch.Generator().manual_seed(0)
    given = rows(torch.rand(200, generator=generator).tolist(), [0, 1] * 100)
    fitted = fitted_rule(scores, y)
    found = certify_rule(fitted, given, WANTED)
    assert found.certificate is None
    assert found.answered == 0
    assert found.to_json()["certificate"] is None


def test_what_people_are_told() -> None:
    scores, y = ladder(500, 0.25)
    fitted = fitted_rule(scores, y)
    fresh_scores, fresh_y = ladder(400, 0.25)
    said = summary(certify_rule(fitted, rows(fresh_scores.tolist(), fresh_y.tolist(), strangers=5), WANTED))
    assert "certified on 400 records: 0.9 of the answered right, with confidence 0.95" in said
    assert "no rule can answer more than 83.3%" in said
    assert "of the next 1,000 answered at most" in said
    assert "refused    5 prompts" in said
    coin = rows(fresh_scores.tolist(), [0, 1] * 200)
    said = summary(certify_rule(fitted, coin, WANTED))
    assert "no certificate on 400 records" in said
    assert "even 3200 records would not bring one" in said


def test_nothing_to_certify_on() -> None:
    scores, y = ladder(500, 0.25)
    with pytest.raises(CalibrationError, match="no record is left"):
        certify_rule(fitted_rule(scores, y), rows([], []), WANTED)


@pytest.mark.parametrize(
    ("base", "wanted", "most"), [(0.759, 0.95, 0.759 / 0.95), (0.97, 0.95, 1.0), (0.0, 0.9, 0.0)]
)
def test_the_ceiling(base: float, wanted: float, most: float) -> None:
    assert ceiling_of(base, wanted) == pytest.approx(most)
    if most < 1:  # 2606.29054: with risk mu and a allowed, at least (mu - a) / (1 - a) is withheld
        mu, a = 1 - base, 1 - wanted
        assert 1 - most == pytest.approx((mu - a) / (1 - a))


def test_the_horizon_by_hand() -> None:
    """The demo's 1 of 128: at most 38 of the next 1,000. None of 1: uniform over 0..1, whose 95 % is 1."""
    assert horizon(1, 128, 1_000, 0.05) == 38
    assert horizon(0, 1, 1, 0.05) == 1


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 2_000),
    share=st.floats(0, 0.99),
    m=st.integers(1, 3_000),
    delta=st.sampled_from([0.01, 0.05, 0.3]),
)
def test_the_horizon_is_scipys(n: int, share: float, m: int, delta: float) -> None:
    wrong = int(share * n)
    expected = stats.betabinom(m, wrong + 1, n - wrong)
    u = horizon(wrong, n, m, delta)
    assert expected.cdf(u) >= 1 - delta - 1e-9
    assert u == 0 or expected.cdf(u - 1) < 1 - delta + 1e-9


def test_the_horizon_needs_a_right_answer() -> None:
    with pytest.raises(ValueError, match="wrong < answered"):
        horizon(3, 3, 10, 0.05)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), base=st.floats(0.3, 0.99), n=st.integers(5, 300))
def test_what_is_certified_has_its_bound(seed: int, base: float, n: int) -> None:
    """Whatever the scores: a certificate's own counts reach the accuracy by the exact bound."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, generator=generator)
    y = (torch.rand(n, generator=generator) < base).long()
    found = certify_rule(fitted_rule(scores, y), rows(scores.tolist(), y.tolist()), WANTED)
    assert all(step.passed for step in found.steps[:-1])
    if found.certificate:
        made = found.certificate
        exact = stats.beta(made.right, made.answered - made.right + 1).ppf(0.05)
        assert exact >= 0.9 - 1e-9
        assert found.horizon is not None
        assert found.horizon <= 0.2 * 1_000


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_few_certificates_are_false(scenario) -> None:  # type: ignore[no-untyped-def]
    """The benchmark in small: of 40 redraws with delta 0.05, more than 6 false ones come with probability 0.003."""
    assert sum(redraw(scenario, 10_000 + seed).false for seed in range(40)) <= 6


def test_few_certificates_are_false_with_layer_and_probe() -> None:
    """In the world where nearly every certificate is just false: more than 5 of 30 come with probability 0.003."""
    [scenario] = [one for one in SCENARIOS if one.name == "none true"]
    drawn = [redraw_whole(scenario, 10_000 + seed) for seed in range(30)]
    assert sum(one.false for one in drawn) <= 5
    [scenario] = [one for one in SCENARIOS if one.name == "few wrong"]
    assert sum(redraw_whole(scenario, seed).issued for seed in range(5)) >= 4


def test_a_choice_by_eye_would_be_false_often() -> None:
    """What the test is for: the loosest threshold at which fitting scores keep the accuracy is false in half the
    cases, so a certificate that never refused would be caught by the test above."""
    generator = torch.Generator().manual_seed(1)
    false = 0
    for _ in range(200):
        scores = torch.rand(300, generator=generator)
        y = (torch.rand(300, generator=generator) < 0.6 + 0.4 * scores).long()
        order = scores.argsort(descending=True)
        share = y[order].double().cumsum(0) / torch.arange(1, 301)
        passing = (share >= 0.9).nonzero()
        if len(passing):
            threshold = float(scores[order][passing[-1]])
            false += (1 + threshold) / 2 * 0.4 + 0.6 < 0.9
    assert false > 60


def test_judged_rows_need_both_gates_to_count() -> None:
    judged = RuleEstimate(
        torch.ones(4),
        torch.tensor([True, True, False, True]),
        torch.tensor([False, False, True, False]),
        torch.full((4,), torch.inf),
        torch.tensor([1.0, 0.0, 1.0, -math.inf]),
        torch.ones(4),
    )
    fitted = fitted_rule(torch.zeros(1), torch.zeros(1).long())
    (step,) = walk(fitted, Drawn.of(judged, torch.ones(4).long()), (-1e30,), WANTED)
    assert step.answered == 2


def test_of_several_attempts_the_first_that_is_let_through_counts() -> None:
    """Two attempts: the first is too low or unknown, so the second is served; a prompt counts once."""
    drawn = Drawn(
        torch.tensor([[0.0, 2.0], [2.0, 2.0], [2.0, 3.0], [0.0, 0.0]]),
        torch.tensor([[True, True], [True, True], [False, True], [True, True]]),
        torch.tensor([[0, 1], [0, 1], [1, 0], [1, 1]]),
        torch.full((4, 2), torch.inf),
    )
    assert drawn.count(1.0) == (3, 1)  # right: the second; wrong: the first; wrong: the second


def test_more_can_be_right_of_what_is_served_than_of_first_attempts() -> None:
    """The ceiling is about the best attempt: resampling finds right answers that the first attempt had not."""
    generator = torch.Generator().manual_seed(0)
    n, k = 300, 4
    y = (torch.rand(n * k, generator=generator) < 0.5).long()
    scores = y + 0.3 * torch.randn(n * k, generator=generator)
    given = rows(scores.tolist(), y.tolist(), digests=[str(i // k) for i in range(n * k)])
    fitted = fitted_rule(scores[::k], y[::k])
    found = certify_rule(fitted, given, WANTED, attempts=k)
    made = found.certificate
    assert made is not None
    assert made.records == n
    assert made.right > int(y[::k].sum())
    assert found.answered <= found.ceiling


def test_the_cut_follows_the_threshold() -> None:
    """F = S: the lowest forecast of the fitting records that reach the threshold, so that none of 50 is lost."""
    scores = torch.linspace(1, 0, 100)
    fitted = fitted_rule(scores, torch.ones(100).long())
    foretold = replace(fitted, forecasts=scores.double(), settings=RuleSettings(may_lose=0.02))
    for at in (49, 99):
        assert foretold.forecast_min(float(scores[at])) == float(scores[at])
    assert fitted.forecast_min(0.5) is None


def test_a_cut_is_a_part_of_what_is_certified() -> None:
    """Of the fresh records, those under the cut are not let through, whatever their score, and count as lost."""
    forecast = ScoreForecast(torch.tensor([1.0, 0.0]), torch.tensor(0.0))
    fitted = fitted_rule(torch.linspace(1, 0, 100), torch.ones(100).long())
    fitted = replace(
        fitted,
        rule=replace(fitted.rule, forecast=forecast),
        forecasts=torch.zeros(100, dtype=torch.float64),
        settings=RuleSettings(may_lose=0.02),
    )
    prompts = torch.zeros(200, 2)
    prompts[:20, 0] = -0.1  # near enough for the gate
    found = certify_rule(fitted, replace(rows([1.0] * 200, [1] * 200), prompts=prompts), WANTED)
    made = found.certificate
    assert made is not None
    assert (made.answered, made.right, made.score_min, made.forecast_min) == (180, 180, 0.0, 0.0)
    assert found.withheld == tuple(range(20))
    assert found.unbegun == Unbegun(prompts=20, lost=20, of=200)
    assert "not begun  20 answers" in summary(found)
    assert found.to_json()["unbegun"] == {"prompts": 20, "lost": 20, "of": 200}


def test_what_is_not_begun_is_not_predicted_to_be_answered() -> None:
    """The test begins where the answers that are begun make it likely to pass: here they are the wrong ones."""
    scores, y = ladder(100, 0.5)
    fitted = fitted_rule(scores, y)
    order = thresholds(fitted)
    assert start(fitted, order, 200, WANTED) > 0
    backwards = replace(fitted, forecasts=-scores.double(), settings=RuleSettings(may_lose=0.5))
    assert start(backwards, order, 200, WANTED) != start(fitted, order, 200, WANTED)
