"""Standing of a certificate: the processes against naive formulas, their laws, and how they are looked at."""

from __future__ import annotations

from math import log, log10, prod

import numpy as np
import pytest

from candor.policy.monitor import Audit, Standing, alarm_bets, log_evidence, renewal_bets, standing

A = 0.95
P = [A - gap for gap in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)]


def audits(labels: list[bool | None], pi: float = 1.0) -> list[Audit]:
    return [Audit(pi, pi, label) for label in labels]


def drawn(accuracy: float, number: int, seed: int) -> list[Audit]:
    return audits([bool(x) for x in np.random.default_rng(seed).random(number) < accuracy])


def test_fully_audited_the_alarm_is_the_mixture_of_likelihood_ratios() -> None:
    x = [True] * 30 + [False, True, False, False] + [True] * 10
    found = log_evidence(A - np.array(x, dtype=float), alarm_bets(A), changes=False)
    right, wrong = 0, 0
    for n, one in enumerate(x):
        right, wrong = right + one, wrong + (not one)
        naive = np.mean([(p / A) ** right * ((1 - p) / (1 - A)) ** wrong for p in P])
        assert found[n] == pytest.approx(log(naive), abs=1e-9)


def test_the_renewal_is_the_same_with_p_above() -> None:
    above = [A + (1 - A) * share for share in (0.1, 0.2, 0.4, 0.6, 0.8, 0.9)]
    x = [True] * 50 + [False] + [True] * 20
    found = log_evidence(np.array(x, dtype=float) - A, renewal_bets(A), changes=False)[-1]
    assert found == pytest.approx(log(np.mean([(p / A) ** 70 * (1 - p) / (1 - A) for p in above])), abs=1e-9)


def test_the_prior_over_changes_by_hand() -> None:
    """M_n = sum_s v_s (mixture from s on) + what is left of the prior."""
    x = [True, False, True, True, False]
    gains = A - np.array(x, dtype=float)
    found = np.exp(log_evidence(gains, alarm_bets(A)))
    left = [1 / np.log2(s + 1) for s in range(1, 8)]
    for n in range(1, 6):
        expected = left[n]
        for s in range(1, n + 1):
            begun = np.mean([prod(1 + bet * gain for gain in gains[s - 1 : n]) for bet in alarm_bets(A)])
            expected += (left[s - 1] - left[s]) * begun
        assert found[n - 1] == pytest.approx(expected)


@pytest.mark.parametrize("p", [0.95, 0.5])
@pytest.mark.parametrize("changes", [True, False])
def test_both_processes_are_martingales_at_the_edge(p: float, changes: bool) -> None:
    """The mean over the next label, right with probability a, is the value before."""
    rng = np.random.default_rng(0)
    for bets, sign in ((alarm_bets(p), 1), (renewal_bets(p), -1)):
        for _ in range(20):
            pi = rng.uniform(0.1, 1, size=30)
            weights = 0.1 / pi
            x = (rng.random(30) < p).astype(float)
            gains = sign * weights * (p - x)
            before = np.exp(log_evidence(gains, bets, changes=changes)[-1])
            last = 0.1 / rng.uniform(0.1, 1)
            after = [
                np.exp(log_evidence(np.append(gains, sign * last * (p - right)), bets, changes=changes)[-1])
                for right in (1.0, 0.0)
            ]
            assert p * after[0] + (1 - p) * after[1] == pytest.approx(before)


def test_few_in_five_hundred_false_alarms_at_the_edge() -> None:
    """Looked at after each of 1,000 labels. 25 are allowed on average; 41 is the mean and three deviations more."""
    alarms = sum(standing(drawn(A, 1000, seed), A, 0.05).name == "suspended" for seed in range(500))
    assert alarms <= 41


def test_an_accuracy_that_fell_is_found_and_one_that_holds_is_shown() -> None:
    assert standing(drawn(0.85, 300, 0), A, 0.05).name == "suspended"
    assert standing(drawn(0.99, 400, 0), A, 0.05).name == "renewed"
    assert standing(drawn(0.96, 100, 0), A, 0.05).name == "upheld"


def test_no_audits() -> None:
    assert standing([], A, 0.05) == Standing("upheld", 0.0, 0.0, pytest.approx(log10(20)), 0, 0, 0, 0)


def test_a_fall_after_thousands_of_good_labels_is_found_soon() -> None:
    good = drawn(0.98, 3000, 1)
    found = standing(good + drawn(0.85, 600, 2), A, 0.05)
    assert found.name == "suspended"
    assert 3000 < found.since < 3400
    gains = A - np.array([one.correct for one in good + drawn(0.85, 600, 2)], dtype=float)
    assert (log_evidence(gains, alarm_bets(A), changes=False) < log(20)).all()  # the plain mixture does not


def test_suspended_stays_until_the_accuracy_is_shown_anew() -> None:
    fell = drawn(0.7, 60, 0)
    suspended = standing(fell, A, 0.05)
    assert suspended.name == "suspended"
    assert suspended.alarm >= suspended.threshold
    good = drawn(0.96, 60, 3)
    later = standing(fell + good, A, 0.05)
    assert (later.name, later.since, later.alarm) == ("suspended", suspended.since, suspended.alarm)
    renewed = standing(fell + drawn(0.995, 500, 4), A, 0.05)
    assert renewed.name == "renewed"
    assert renewed.since > suspended.since
    again = standing(fell + drawn(0.995, 500, 4) + drawn(0.7, 100, 5), A, 0.05)
    assert again.name == "suspended"
    assert again.since > 560


def test_what_is_not_labelled_counts_against_what_is_to_be_shown() -> None:
    """Whatever order labels come in, and whatever is skipped: never more evidence than with all labels."""
    rng = np.random.default_rng(7)
    for seed in range(20):
        whole = drawn(0.9, 200, seed)
        parts = [
            [one if keep else one._replace(correct=None) for one, keep in zip(whole, kept, strict=True)]
            for kept in (
                rng.random(200) < 0.5,
                np.array([not one.correct for one in whole]),  # a reviewer who labels the wrong ones alone
                np.array([bool(one.correct) for one in whole]),
            )
        ]
        gain = lambda some, missing, sign: np.array(  # noqa: E731
            [sign * (A - (missing if one.correct is None else one.correct)) for one in some]
        )
        for part in parts:
            for missing, sign, bets in ((1.0, 1, alarm_bets(A)), (0.0, -1, renewal_bets(A))):
                with_all = log_evidence(gain(whole, missing, sign), bets)
                assert (log_evidence(gain(part, missing, sign), bets) <= with_all + 1e-12).all()


def test_a_backlog_at_the_end_hides_nothing() -> None:
    fell = drawn(0.7, 60, 0)
    alone = standing(fell, A, 0.05)
    waiting = standing(fell + audits([None] * 500), A, 0.05)
    assert (waiting.name, waiting.since, waiting.open) == ("suspended", alone.since, 500)
    few = drawn(0.9, 30, 1)
    one, other = standing(few, A, 0.05), standing(few + audits([None] * 9), A, 0.05)
    assert (one.alarm, one.renewal) == (other.alarm, other.renewal)


def test_a_rare_draw_weighs_more() -> None:
    """Drawn with half the probability, an answer stands for twice as many."""
    rare = [Audit(0.2, 0.1, True), Audit(0.1, 0.1, False)]
    found = standing(rare, A, 0.05).alarm
    gains = np.array([0.5 * (A - 1), A])
    assert found == pytest.approx(log_evidence(gains, alarm_bets(A))[-1] / log(10))


@pytest.mark.parametrize("accuracy", [0.001, 0.1, 0.3, 0.999])
def test_every_accuracy_has_bets(accuracy: float) -> None:
    for sign, bets in ((1, alarm_bets(accuracy)), (-1, renewal_bets(accuracy))):
        for x in (0.0, 1.0):
            assert (1 + bets * sign * (accuracy - x) > 0).all()


@pytest.mark.parametrize(
    ("audit", "accuracy", "delta"),
    [
        ((0.1, 0.2, True), 0.9, 0.05),
        ((0, 0, True), 0.9, 0.05),
        ((1, 1, True), 1.0, 0.05),
        ((1, 1, True), 0.9, 0),
    ],
)
def test_out_of_range(audit: tuple[float, float, bool], accuracy: float, delta: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        standing([Audit(*audit)], accuracy, delta)
