"""Figures against counts made by hand, and the path that answers without usable states take."""

from __future__ import annotations

from dataclasses import replace
from math import isnan

import pytest
import torch

from candor.calibration.evaluate import RegionFigures, auroc, evaluate, region_figures
from candor.calibration.generate import Labelled
from candor.calibration.intervals import Share, clopper_pearson
from candor.calibration.report import table
from candor.calibration.served import ServedRows
from candor.sdm.adaptor import ExemplarAdaptor
from candor.sdm.estimator import SDMEstimator

ALPHAS = (0.9, 0.95)

TRAIN = torch.linspace(-3, 3, 400).unsqueeze(1)
RIGHT, ALSO_RIGHT, LEFT = TRAIN[340], TRAIN[330], TRAIN[60]
"""Support rows at 2.1, 2.0 and -2.1: at distance 0 of the support, far from the other class."""


def answers(h: torch.Tensor, labels: list[int]) -> list[Labelled]:
    return [
        Labelled(str(i), str(i), (), "response", 1 if label else 0, row)
        for i, (row, label) in enumerate(zip(h, labels, strict=True))
    ]


def line_estimator(alphas: tuple[float, ...] = ALPHAS) -> SDMEstimator:
    """h in R: y = 1 right of 0, 0 left of it; the adaptor is h' = h, z' = (-h, h)."""
    adaptor = ExemplarAdaptor(torch.zeros(1), torch.ones(1), 1, 2)
    with torch.no_grad():
        adaptor.exemplar.weight.copy_(torch.ones(1, 1))
        adaptor.exemplar.bias.zero_()
        adaptor.head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        adaptor.head.bias.zero_()
    calibration = torch.linspace(-2.9, 2.9, 300).unsqueeze(1)
    halves = [(h, (h[:, 0] > 0).long()) for h in (TRAIN, calibration)]
    return SDMEstimator.fit(adaptor, halves[0], halves[1], alphas)


def reading(admitted: torch.Tensor, y_hat: torch.Tensor, y: torch.Tensor) -> RegionFigures:
    """Of answers with one attempt each, of 1, 2, ... tokens."""
    n = len(y)
    none = torch.zeros(n)
    tokens = torch.arange(1, n + 1)
    return region_figures(ServedRows(y, y_hat, admitted, none, none, torch.ones(n), tokens))


def test_a_reading_counts() -> None:
    #                         answered  answered  admitted  not       answered  admitted
    admitted = torch.tensor([True, True, True, False, True, True])
    y_hat = torch.tensor([1, 1, 0, 1, 1, 0])
    y = torch.tensor([1, 0, 0, 1, 1, 1])
    found = reading(admitted, y_hat, y)
    assert (found.admitted.hits, found.admitted.of) == (5, 6)
    assert (found.answered.hits, found.answered.of) == (3, 6)
    assert (found.accuracy_answered.hits, found.accuracy_answered.of) == (2, 3)
    assert (found.accuracy_admitted.hits, found.accuracy_admitted.of) == (3, 5)
    assert [(share.hits, share.of) for share in found.class_accuracy] == [(1, 2), (2, 3)]
    assert (found.accuracy_answered.low, found.accuracy_answered.high) == clopper_pearson(2, 3)
    assert [(share.hits, share.of) for share in found.answered_of_class] == [(1, 2), (2, 4)]
    assert found.tokens == 3.5


def test_a_reading_of_nothing_admitted_has_no_accuracy() -> None:
    found = reading(torch.zeros(4, dtype=torch.bool), torch.ones(4), torch.ones(4))
    assert found.admitted.value == 0.0
    assert found.accuracy_answered == found.accuracy_admitted == Share(0, 0, None, None, None)


@pytest.mark.parametrize(
    ("scores", "y", "expected"),
    [
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75),  # pairs won: 0.35 > 0.1, 0.8 > both; lost: 0.35 < 0.4
        ([1.0, 2.0, 3.0], [0, 1, 1], 1.0),
        ([3.0, 2.0, 1.0], [0, 1, 1], 0.0),
        ([0.5, 0.5, 0.5], [0, 1, 1], 0.5),
        ([0.5, 0.5, 0.7], [0, 1, 1], 0.75),  # one tie, one won
    ],
)
def test_auroc_by_counting_pairs(scores: list[float], y: list[int], expected: float) -> None:
    assert auroc(torch.tensor(scores), torch.tensor(y)) == expected


def test_auroc_against_every_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (80,), generator=generator).float()
    y = torch.randint(0, 2, (80,), generator=generator)
    pairs = (scores[y == 1].unsqueeze(1) - scores[y == 0].unsqueeze(0)).sign()
    assert auroc(scores, y) == pytest.approx(float((pairs + 1).mean() / 2))
    assert isnan(auroc(scores, torch.ones(80)))


def test_all_figures_of_a_set_worked_out_by_hand() -> None:
    # Two points deep in their class, one labelled against its side, one far beyond everything seen.
    h = torch.stack([RIGHT, LEFT, ALSO_RIGHT, torch.tensor([1e6])])
    figures = evaluate(line_estimator(), answers(h, [1, 0, 0, 1]), ALPHAS)
    assert figures.records == 4
    assert (figures.correct.hits, figures.correct.of) == (2, 4)
    assert (figures.verdict.hits, figures.verdict.of) == (3, 4)
    assert (figures.ood.hits, figures.ood.of) == (1, 4)
    for alpha in ALPHAS:
        plain = figures.plain[alpha]
        assert (plain.admitted.hits, plain.answered.hits) == (3, 2)
        assert (plain.accuracy_answered.hits, plain.accuracy_answered.of) == (1, 2)
        assert (plain.accuracy_admitted.hits, plain.accuracy_admitted.of) == (2, 3)
        assert [(s.hits, s.of) for s in plain.class_accuracy] == [(1, 2), (1, 1)]
        lower = figures.lower[alpha]
        assert lower.admitted.hits <= plain.admitted.hits
        assert lower.admitted.of == 4


def test_the_lower_estimator_never_admits_more() -> None:
    h = torch.linspace(-4, 4, 200).unsqueeze(1)
    figures = evaluate(line_estimator(), answers(h, [int(x > 0) for x in h[:, 0]]), ALPHAS)
    for alpha in ALPHAS:
        assert 0 < figures.lower[alpha].admitted.hits <= figures.plain[alpha].admitted.hits < 200
    assert figures.auroc is not None
    value, low, high = figures.auroc
    assert low <= value <= high


def test_an_answer_that_cannot_be_scored_counts_as_not_admitted() -> None:
    whole = answers(torch.stack([RIGHT, LEFT, RIGHT, RIGHT]), [1, 0, 1, 1])
    truncated = replace(whole[2], fault="truncated")
    lost = replace(whole[3], h=torch.empty(0), fault="incomplete")
    figures = evaluate(line_estimator(), [*whole[:2], truncated, lost], ALPHAS)
    assert figures.faults == {"truncated": 1, "incomplete": 1}
    assert (figures.plain[0.9].admitted.hits, figures.plain[0.9].admitted.of) == (2, 4)
    assert (figures.correct.hits, figures.correct.of) == (3, 4)
    assert figures.verdict.of == figures.ood.of == 2


def test_a_set_without_any_usable_states() -> None:
    lost = [replace(a, h=torch.empty(0), fault="incomplete") for a in answers(torch.ones(3, 1), [1, 0, 1])]
    figures = evaluate(line_estimator(), lost, ALPHAS)
    assert figures.lower[0.9].admitted.hits == 0
    assert figures.auroc is None
    assert figures.ood == Share(0, 0, None, None, None)


def test_no_answers_or_no_alpha() -> None:
    with pytest.raises(ValueError, match="got 0 and 2"):
        evaluate(line_estimator(), [], ALPHAS)
    with pytest.raises(ValueError, match="got 1 and 0"):
        evaluate(line_estimator(), answers(torch.ones(1, 1), [1]), ())


def test_json_and_table_say_the_same_figures() -> None:
    figures = evaluate(line_estimator(), answers(torch.stack([RIGHT, LEFT]), [1, 0]), ALPHAS)
    fields = figures.to_json()
    assert fields["plain"]["0.9"]["answered"] == {
        "hits": 1,
        "of": 2,
        "value": 0.5,
        "low": pytest.approx(0.0126, abs=1e-4),  # 1 - sqrt(0.975)
        "high": pytest.approx(0.9874, abs=1e-4),
    }
    assert fields["auroc"]["value"] == 1.0
    text = table({"test": figures, "other": replace(figures, auroc=None, faults={"truncated": 2})})
    assert "test: 2 records\n" in text
    assert "other: 2 records, of which not scorable: 2 truncated" in text
    assert text.count("AUROC") == 1
    assert "0.9    plain      100.0 [15.8, 100.0]   50.0 [1.3, 98.7]" in text
    assert max(map(len, text.splitlines())) <= 160
