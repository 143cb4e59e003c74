"""Fitting a rule: the regression by an independent one, the gate's cut by its law, cross-validation, the choice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from candor.calibration.errors import CalibrationError
from candor.calibration.gates import rank_cut, refusal_bound
from candor.calibration.logistic import fit_logistic
from candor.calibration.rule import RuleRows, fit_rule
from candor.calibration.rule_settings import RuleSettings

PARTS = (("mean", 5), ("last", 5), ("evidence", 2))


def world(n: int, seed: int, *, useful: str = "evidence", layer: bool = True) -> tuple[RuleRows, Tensor]:
    """Rows whose label hangs on the first column of one part; the layer's margin is a blurred copy of it."""
    draw = torch.Generator().manual_seed(seed)
    h = torch.randn(n, 12, generator=draw)
    at = {"mean": 0, "last": 5, "evidence": 10}[useful]
    y = (2.5 * h[:, at] + torch.randn(n, generator=draw) > 0).long()
    figures = torch.empty(n, 0)
    if layer:
        figures = torch.randn(n, 4, generator=draw)
        figures[:, 0] += h[:, at]
    half = torch.arange(n) % 2 == 1
    return RuleRows(torch.randn(n, 6, generator=draw), h, figures, y, [str(i) for i in range(n)]), half


@pytest.mark.parametrize(("n", "width"), [(200, 4), (60, 150)])
def test_logistic_regression_is_sklearns(n: int, width: int) -> None:
    draw = torch.Generator().manual_seed(n)
    x = torch.randn(n, width, generator=draw, dtype=torch.float64)
    y = (x[:, 0] + torch.randn(n, generator=draw) > 0.3).long()
    for reach, (w, b) in zip((0.5, 4.0), fit_logistic(x, y, (0.5, 4.0)), strict=True):
        penalty = float(x.square().sum(1).mean()) / reach**2
        other = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())
        torch.testing.assert_close(w, torch.tensor(other.coef_[0]), atol=1e-6, rtol=0)
        assert float(b) == pytest.approx(float(other.intercept_[0]), abs=1e-6)


def test_logistic_regression_ends_where_a_line_parts_the_classes() -> None:
    x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]).repeat(50, 1)
    y = (x[:, 0] > 0).long()
    ((w, _),) = fit_logistic(x, y, (100.0,))
    assert 0 < float(w) < 1_000


def test_logistic_regression_needs_both_classes() -> None:
    with pytest.raises(ValueError, match="both classes"):
        fit_logistic(torch.zeros(3, 1), torch.ones(3), (1.0,))


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 3_000),
    eps=st.sampled_from([0.005, 0.02, 0.05, 0.2]),
    delta=st.sampled_from([0.01, 0.05, 0.2]),
)
def test_the_cut_is_the_largest_whose_beta_quantile_keeps_eps(m: int, eps: float, delta: float) -> None:
    cut = rank_cut(m, eps, delta)
    quantiles = stats.beta(torch.arange(1, m + 1).numpy(), m + 1 - torch.arange(1, m + 1).numpy()).ppf(
        1 - delta
    )
    assert cut == max(1, int((quantiles <= eps).sum()))
    assert refusal_bound(m, cut, delta) == pytest.approx(float(quantiles[cut - 1]), abs=1e-9)


def test_the_cut_by_hand() -> None:
    """149 references: the farthest of all, 1 - 0.98^149 = 0.951; one fewer does not show 0.02."""
    assert (rank_cut(149, 0.02, 0.05), refusal_bound(149, 1, 0.05) <= 0.02) == (1, True)
    assert (rank_cut(148, 0.02, 0.05), refusal_bound(148, 1, 0.05) <= 0.02) == (1, False)


@pytest.mark.parametrize(("useful", "holding"), [("last", {"last", "all"}), ("mean", {"all"})])
def test_the_score_chosen_holds_what_labels_hang_on(useful: str, holding: set[str]) -> None:
    rows, half = world(600, 3, useful=useful)
    fitted = fit_rule(rows, half, PARTS, (3, 3), RuleSettings())
    fresh, _ = world(2_000, 4, useful=useful)
    score = fitted.rule.judge(fresh.prompts, fresh.h, fresh.figures).score
    assert float(((score > 0) == (fresh.y == 1)).double().mean()) > 0.85
    views = {"evidence", "last", "all"}
    assert max(fitted.aurc[name] for name in holding) < min(fitted.aurc[name] for name in views - holding)
    assert fitted.chosen not in views - holding


def test_a_changed_instruction_is_learnt_from_a_few_records_of_it() -> None:
    """One record in ten has another instruction, which its prompt states alone show, and is always wrong; its h is
    as sure as any."""

    def drawn(n: int, seed: int) -> tuple[RuleRows, Tensor]:
        rows, _ = world(n, seed)
        changed = torch.arange(n) % 10 == 3
        prompts = rows.prompts.clone()
        prompts[changed, 0] += 6
        y = torch.where(changed, 0, rows.y)
        return RuleRows(prompts, rows.h, rows.figures, y, rows.digests), changed

    rows, _ = drawn(600, 20)
    fitted = fit_rule(rows, torch.arange(600) % 2 == 1, PARTS, (3, 3), RuleSettings())
    fresh, changed = drawn(4_000, 21)
    score = fitted.rule.judge(fresh.prompts, fresh.h, fresh.figures).score
    through = score >= score[fresh.y == 1].median()
    assert float(through[changed].double().mean()) < 0.05
    assert float(fresh.y[through].double().mean()) > 0.95


def test_cross_validated_scores_do_not_know_their_own_labels() -> None:
    """Of labels that hang on nothing, with more columns than rows, fitted scores would say all; these say nothing."""
    draw = torch.Generator().manual_seed(5)
    n = 120
    rows = RuleRows(
        torch.randn(n, 6, generator=draw),
        torch.randn(n, 400, generator=draw),
        torch.empty(n, 0),
        torch.randint(2, (n,), generator=draw),
        [str(i) for i in range(n)],
    )
    fitted = fit_rule(rows, torch.arange(n) % 2 == 1, (("last", 400),), (3, 3), RuleSettings())
    right, wrong = fitted.scores[fitted.y == 1], fitted.scores[fitted.y == 0]
    wins = float((right.unsqueeze(1) > wrong.unsqueeze(0)).double().mean())
    assert 0.35 < wins < 0.65


def test_twins_of_a_prompt_stand_in_one_fold() -> None:
    """Each prompt twice with one h and one label that hangs on nothing: were twins parted, scores would know
    labels."""
    draw = torch.Generator().manual_seed(6)
    n = 100
    h = torch.randn(n, 300, generator=draw).repeat(2, 1)
    y = torch.randint(2, (n,), generator=draw).repeat(2)
    rows = RuleRows(
        torch.randn(2 * n, 6, generator=draw), h, torch.empty(2 * n, 0), y, [str(i % n) for i in range(2 * n)]
    )
    fitted = fit_rule(rows, torch.arange(2 * n) % 2 == 1, (("last", 300),), (3, 3), RuleSettings())
    right, wrong = fitted.scores[fitted.y == 1], fitted.scores[fitted.y == 0]
    assert 0.3 < float((right.unsqueeze(1) > wrong.unsqueeze(0)).double().mean()) < 0.7


def test_same_rows_give_the_same_rule() -> None:
    rows, half = world(300, 7)
    first, second = (fit_rule(rows, half, PARTS, (3, 3), RuleSettings()) for _ in range(2))
    assert first.chosen == second.chosen
    for name, value in first.rule.state().items():
        assert value.equal(second.rule.state()[name]), name


def test_a_few_wrong_labels_do_not_end_it() -> None:
    rows, half = world(600, 8)
    y = rows.y.clone()
    y[::50] = 1 - y[::50]  # one in fifty
    fresh, _ = world(4_000, 9)
    agreed = []
    for labels in (rows.y, y):
        fitted = fit_rule(
            RuleRows(rows.prompts, rows.h, rows.figures, labels, rows.digests),
            half,
            PARTS,
            (3, 3),
            RuleSettings(),
        )
        score = fitted.rule.judge(fresh.prompts, fresh.h, fresh.figures).score
        top = score.argsort(descending=True)[: len(fresh) // 3]
        agreed.append(float(fresh.y[top].double().mean()))
    assert agreed[1] > agreed[0] - 0.01
    assert agreed[1] > 0.97


def test_probabilities_are_calibrated_on_fresh_records() -> None:
    rows, half = world(1_000, 10)
    fitted = fit_rule(rows, half, PARTS, (3, 3), RuleSettings())
    fresh, _ = world(20_000, 11)
    p = fitted.rule.judge(fresh.prompts, fresh.h, fresh.figures).probability.double()
    bins = (p * 15).long().clamp(max=14)
    off = torch.zeros(15, dtype=torch.float64).index_add(0, bins, p - fresh.y.double())
    assert float(off.abs().sum()) / len(fresh) <= 0.03


def test_the_gates_reference_is_the_calibration_half() -> None:
    rows, half = world(400, 12)
    fitted = fit_rule(rows, half, PARTS, (3, 3), RuleSettings(eps=0.05))
    gate = fitted.rule.gate
    assert gate.reference.equal(gate.distance(rows.prompts[half]).sort().values)
    assert int(gate.rank_cut) == rank_cut(200, 0.05, 0.05)
    assert fitted.refusal_bound == refusal_bound(200, int(gate.rank_cut), 0.05)


def test_a_prompt_counts_once_in_the_gates_reference() -> None:
    """Five answers to a prompt are one draw of it."""
    rows, half = world(400, 12)
    five = [torch.arange(400).repeat_interleave(5), half.repeat_interleave(5)]
    many, halves = rows[five[0]], five[1]
    alone = fit_rule(rows, half, PARTS, (3, 3), RuleSettings(eps=0.05, score="evidence"))
    repeated = fit_rule(many, halves, PARTS, (3, 3), RuleSettings(eps=0.05, score="evidence"))
    assert repeated.rule.gate.reference.equal(alone.rule.gate.reference)
    assert repeated.refusal_bound == alone.refusal_bound


def test_a_probe_is_fitted_beside_the_gate_which_keeps_its_cut() -> None:
    rows, half = world(600, 14)
    strangers = torch.randn(60, 6, generator=torch.Generator().manual_seed(15))
    strangers[:, 0] += 2.5  # inside the gate's reach
    without = fit_rule(rows, half, PARTS, (3, 3), RuleSettings(score="evidence"))
    fitted = fit_rule(rows, half, PARTS, (3, 3), RuleSettings(score="evidence"), strangers[:40])
    assert fitted.rule.gate.rank_cut == without.rule.gate.rank_cut
    assert fitted.rule.probe is not None
    assert int(fitted.rule.probe.rank_cut) == 1
    assert fitted.refusal_bound > without.refusal_bound
    passing = [int(one.rule.know(strangers[40:]).known.sum()) for one in (without, fitted)]
    assert passing[1] < passing[0]
    fresh, _ = world(4_000, 16)
    refused = float((~fitted.rule.know(fresh.prompts).known).double().mean())
    assert refused <= fitted.refusal_bound
    with pytest.raises(CalibrationError, match="at least 5 declared strangers"):
        fit_rule(rows, half, PARTS, (3, 3), RuleSettings(score="evidence"), strangers[:4])


def test_without_wrong_answers_it_says_what_to_add() -> None:
    rows, half = world(60, 13)
    sure = RuleRows(rows.prompts, rows.h, rows.figures, torch.ones(60, dtype=torch.int64), rows.digests)
    with pytest.raises(CalibrationError, match="rarer kind"):
        fit_rule(sure, half, PARTS, (3, 3), RuleSettings())


def test_settings_and_rows_out_of_range() -> None:
    with pytest.raises(ValueError, match="no score is named 'best'; there are evidence"):
        RuleSettings(score="best")
    with pytest.raises(ValueError, match="expected eps"):
        RuleSettings(eps=0)
    with pytest.raises(ValueError, match="as many"):
        RuleRows(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 0), torch.zeros(3), ["a", "b"])
