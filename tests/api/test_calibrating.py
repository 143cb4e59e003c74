"""`candor.calibrate` is the way of `candor calibrate` from the arrays on, and says what is wrong with them."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

import candor
from candor.calibration.certificate import Claim, certify
from candor.calibration.evaluate import evaluate
from candor.calibration.fit import FitSettings, fit, set_aside, set_aside_for_certification
from candor.calibration.generate import Labelled

ROWS, WIDTH = 500, 4
QUICK: dict[str, Any] = {"rounds": 2, "epochs": 5, "exemplar_dim": 8, "learning_rate": 0.05}


def drawn(seed: int = 0) -> tuple[numpy.ndarray, numpy.ndarray]:
    """States of two overlapping clouds, and labels."""
    random = numpy.random.default_rng(seed)
    labels = numpy.arange(ROWS) % 2
    return (random.normal(size=(ROWS, WIDTH)) + 3 * labels[:, None]).astype("float32"), labels


STATES, LABELS = drawn()


def test_it_is_the_internal_way() -> None:
    found = candor.calibrate(STATES, LABELS, alphas=(0.9, 0.8), certify=0.85, delta=0.1, seed=3, **QUICK)
    settings = FitSettings((0.8, 0.9), seed=3, **QUICK)
    answers = [
        Labelled(f"row {i}", f"row {i}", (), "", 1 if label else 0, torch.from_numpy(row))
        for i, (row, label) in enumerate(zip(STATES, LABELS, strict=True))
    ]
    rest, apart = set_aside_for_certification(answers, 0.2, 3)
    fitting, held_out = set_aside(rest, 0.2, 3)
    fitted = fit(fitting, ((WIDTH, "scalar"),), settings, lambda _: None)
    one, other = found.estimator.state(), fitted.estimator.state()
    assert all(one[name].equal(other[name]) for name in one)
    assert found.regions.keys() == {0.8, 0.9}
    assert (
        found.certificates
        == certify(fitted.estimator, fitted.calibration, apart, Claim(0.85, 0.1)).certificates
    )
    assert len(found.certificates) > 1
    assert found.evaluation == evaluate(fitted.estimator, held_out, (0.8, 0.9), 3)


def test_any_array_will_do() -> None:
    expected = candor.calibrate(STATES, LABELS, **QUICK).estimator.state()
    frozen = STATES.astype("float64")
    frozen.setflags(write=False)
    for states, labels in (
        (frozen, LABELS.astype(bool)),
        (torch.from_numpy(STATES), torch.from_numpy(LABELS).float()),
        (STATES.tolist(), LABELS.tolist()),
    ):
        found = candor.calibrate(states, labels, alphas=0.9, **QUICK).estimator.state()
        assert all(found[name].equal(expected[name]) for name in expected)


def test_new_answers_are_judged_by_it() -> None:
    found = candor.calibrate(STATES, LABELS, certify=0.8, **QUICK)
    states, labels = drawn(1)
    verdicts = candor.judge(found, states)
    shown = ~verdicts.abstained
    assert 30 < shown.sum() < ROWS / 2
    assert labels[shown].mean() >= 0.9
    assert verdicts.certificate == found.certificates[0]
    assert verdicts.certified[shown].any()


def test_rows_of_one_prompt_stay_together() -> None:
    prompts = [f"Question {i // 5}" for i in range(ROWS)]
    fitted = candor.calibrate(STATES, LABELS, prompts=prompts, **QUICK)._outcome.fitted
    training, calibration = ({one.prompt for one in half} for half in (fitted.training, fitted.calibration))
    assert not training & calibration
    assert len(training) + len(calibration) == 80
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    again = candor.calibrate(STATES, LABELS, prompts=conversations, **QUICK)._outcome.fitted
    assert again.training[0].prompt_digest == fitted.training[0].prompt_digest


def test_rows_that_are_not_finite_are_left_out_and_count_as_not_answered() -> None:
    broken = STATES.copy()
    broken[::10, 2] = numpy.nan
    found = candor.calibrate(broken, LABELS, **QUICK)
    assert all(one.h.isfinite().all() for one in found._outcome.fitted.answers)
    assert found.evaluation.records == 100
    assert 0 < found.evaluation.faults["non_finite"] < 30
    dropped = found._outcome.report["counts"]["dropped"]["by_fault"]["non_finite"]
    assert dropped + found.evaluation.faults["non_finite"] == 50


def test_printed_it_shows_its_figures() -> None:
    found = candor.calibrate(STATES, LABELS, alphas=(0.8, 0.99), certify=0.8, **QUICK)
    reading = found.evaluation.lower[0.8]
    first, region, missing, *certified = str(found).splitlines()
    assert first.startswith(f"held out: 80 answers, {found.evaluation.correct.value:.1%} [")
    assert region.startswith(f"alpha 0.8: answered {reading.answered.value:.1%} [")
    assert missing == "alpha 0.99: no region, nothing is answered"
    assert len(certified) == 3
    assert "certified on 100 records" in certified[0]
    assert len(str(candor.calibrate(STATES, LABELS, **QUICK)).splitlines()) == 2


def test_progress_is_told() -> None:
    told: list[int] = []
    candor.calibrate(STATES, LABELS, progress=told.append, **QUICK)
    assert sum(told) == 10


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (numpy.where(LABELS == 1, 2, 0), r"labels: 250 problems\n  row 1: 2\n"),
        (numpy.where(LABELS == 1, 0.5, 0), r"row 1: 0.5\n(.|\n)*A label is 1 \(follows\) or 0"),
        (numpy.where(LABELS == 1, numpy.nan, 0), "row 1: nan"),
        (LABELS * 0, "expected both right and wrong answers to fit on, got 0 prompts answered right"),
        (LABELS * 0 + 1, "and 0 answered wrong"),
        (numpy.arange(ROWS) < 15, "expected at least 20 prompts of each kind"),
    ],
)
def test_labels_that_nothing_can_be_calibrated_on(labels: Any, says: str) -> None:
    with pytest.raises(candor.CalibrationError, match=says):
        candor.calibrate(STATES, labels, **QUICK)


@pytest.mark.parametrize(
    ("states", "given", "says"),
    [
        (STATES[0], {}, r"states must be \(n, D\), one row an answer; got \(4,\)"),
        (
            STATES,
            {"labels": LABELS[1:]},
            r"labels must be \(500,\), one for each row of states; got \(499,\)",
        ),
        (STATES, {"labels": LABELS[:, None]}, r"got \(500, 1\)"),
        (STATES, {"labels": ["yes"] * ROWS}, "labels must be an array of numbers"),
        (STATES, {"prompts": "one for all"}, "prompts must be a list of 500"),
        (STATES, {"responses": ["a"]}, "responses must be a list of 500"),
        (STATES, {"prompts": ["a"] * 499 + [[]]}, 'prompts, row 499: "messages" must be a non-empty list'),
        (STATES, {"alphas": 0.5}, "between 0.5 and 1"),
        (STATES, {"certify": 1.0}, "accuracy to certify must be between 0 and 1"),
        (STATES, {"certify": 0.9, "certify_share": 0.0}, "share to certify on"),
        (STATES, {"rounds": 0}, "must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit(states: Any, given: dict[str, Any], says: str) -> None:
    labels = given.pop("labels", LABELS)
    with pytest.raises(ValueError, match=says):
        candor.calibrate(states, labels, **{**QUICK, **given})


def test_without_a_model_there_is_no_bundle(tmp_path: Any) -> None:
    with pytest.raises(candor.CalibrationError, match="give model, prompts and responses to calibrate"):
        candor.calibrate(STATES, LABELS, **QUICK).save(tmp_path / "bundle")
    assert not any(tmp_path.iterdir())
