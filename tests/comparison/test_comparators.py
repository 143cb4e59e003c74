"""Every comparator on one small task that some rows make easy and some hopeless; each one's own formula by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from candor.calibration.evaluate import auroc
from candor.calibration.generate import Labelled
from candor.calibration.layer import LayerSettings, train_layer
from candor.calibration.ranking import answer_order
from candor.calibration.rule import fit_rule, rows_of
from candor.calibration.rule_settings import RuleSettings
from candor.comparison.comparators import (
    COMPARATORS,
    adue,
    mahalanobis,
    p_norm,
    prediction_sets,
    temperature,
    vbll_layer,
)
from candor.comparison.comparators.base import (
    Fitting,
    Rows,
    Scorer,
    by_classes,
    by_probability,
    linear_head,
    selective_threshold,
)
from candor.policy.certificate import RuleCertificate, RuleTerms
from candor.policy.judging import TwoGates
from candor.sdm.score import sdm_figures

ALPHAS = (0.8, 0.9)
LAYER = LayerSettings(exemplar_dim=4, epochs=15, learning_rate=1e-2)
PROBABILITY = ("softmax", "temperature", "logistic", "vbll", "adue", "sdm_alpha")
"""Admitted where the probability is at least alpha."""


def task(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """h (n, 5): the label is the sign of the first entry, but for noise near 0; the rest says nothing."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, 5, generator=generator)
    h[:, 0] *= 2
    y = (h[:, 0] + 0.5 * torch.randn(n, generator=generator) > 0).long()
    return h, y


def labelled(h: Tensor, y: Tensor, prefix: str) -> list[Labelled]:
    prompts = torch.randn(len(y), 6, generator=torch.Generator().manual_seed(5))
    return [
        Labelled(
            f"{prefix}{i}", f"{prefix}{i}", (), "response", 1 if label else 0, row, prompt_states=prompts[i]
        )
        for i, (row, label) in enumerate(zip(h, y.tolist(), strict=True))
    ]


@pytest.fixture(scope="module", autouse=True)
def fewer_epochs() -> Iterator[None]:
    """The library's layer takes the longest, and learns this task soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vbll_layer, "EPOCHS", 15)
        patch.setattr(vbll_layer, "LEARNING_RATE", 1e-2)
        yield


@pytest.fixture(scope="module")
def fitting() -> Fitting:
    train, calibration = task(160, 0), task(160, 1)
    layer = train_layer(
        *train,
        *calibration,
        num_classes=2,
        generator=torch.Generator().manual_seed(0),
        alphas=ALPHAS,
        settings=LAYER,
    )
    halves = labelled(*train, "t"), labelled(*calibration, "c")
    rows = rows_of(layer.estimator, [*halves[0], *halves[1]])
    in_calibration = torch.arange(len(rows)) >= len(halves[0])
    rule = fit_rule(rows, in_calibration, (("last", 5),), (3, 3), RuleSettings()).rule
    certificates = tuple(
        RuleCertificate(alpha, alpha, 0.95, least, 300, 100, 99, 150, 0.95)
        for alpha, least in zip(ALPHAS, (0.5, 2.0), strict=True)
    )
    gates = TwoGates(rule, RuleTerms("last", 0.02, 0.02, 0.95, 1.0, 0, certificates))
    return Fitting(layer.estimator, *halves, LAYER, ALPHAS, seed=0, ensemble=2, gates=gates)


@pytest.fixture(scope="module")
def test_rows(fitting: Fitting) -> tuple[Rows, Tensor]:
    h, y = task(300, 2)
    return Rows.of(fitting.estimator, labelled(h, y, "f")), y


@pytest.fixture(scope="module")
def scorers(fitting: Fitting) -> dict[str, Scorer]:
    return {name: comparator.fit(fitting) for name, comparator in COMPARATORS.items()}


@pytest.mark.parametrize("name", COMPARATORS)
def test_every_comparator_judges_rows_and_says_which_are_sure(
    name: str, fitting: Fitting, test_rows: tuple[Rows, Tensor], scorers: dict[str, Scorer]
) -> None:
    rows, y = test_rows
    found = scorers[name](rows)
    assert found.y_hat.shape == found.confidence.shape == y.shape
    assert found.y_hat.dtype == torch.int64
    assert found.confidence.dtype == torch.float64
    assert found.confidence.isfinite().all()
    assert set(found.admitted) == set(ALPHAS)
    if found.probability is not None:
        assert ((found.probability >= 0) & (found.probability <= 1)).all()
    if name in PROBABILITY:
        for alpha, admitted in found.admitted.items():
            assert admitted.equal(found.probability >= alpha)
    assert (found.admitted[0.9] <= found.admitted[0.8]).all() or name in ("aps", "raps")
    # The task's best possible order has 0.96; a random one 0.5, give or take 0.03. Energies and distances
    # rank rows by more than the verdict.
    assert auroc(answer_order(found.confidence, found.y_hat), y) > 0.8
    again = COMPARATORS[name].fit(fitting)(rows)
    assert again.y_hat.equal(found.y_hat)
    assert again.confidence.equal(found.confidence)
    assert all(again.admitted[alpha].equal(found.admitted[alpha]) for alpha in ALPHAS)


@pytest.mark.parametrize("name", sorted(set(COMPARATORS) - {"aps", "raps"}))
def test_a_row_is_judged_alike_alone_and_among_others(
    name: str, test_rows: tuple[Rows, Tensor], scorers: dict[str, Scorer]
) -> None:
    rows, _ = test_rows
    seventh = torch.tensor([7])
    among, alone = scorers[name](rows)[seventh], scorers[name](rows[seventh])
    assert among.y_hat.equal(alone.y_hat)
    assert float(among.confidence[0]) == pytest.approx(float(alone.confidence[0]), rel=1e-5)


def test_no_reject_admits_everything(fitting: Fitting, test_rows: tuple[Rows, Tensor]) -> None:
    found = COMPARATORS["no_reject"].fit(fitting)(test_rows[0])
    assert all(admitted.all() for admitted in found.admitted.values())


def test_the_ways_of_reading_the_layer_are_the_estimators_own(
    fitting: Fitting, test_rows: tuple[Rows, Tensor]
) -> None:
    rows, _ = test_rows
    for alpha in ALPHAS:
        estimate = fitting.estimator.judge(rows.measurement, alpha)
        found = {
            name: COMPARATORS[name].fit(fitting)(rows).admitted[alpha] for name in ("sdm_hr", "sdm_hr_lower")
        }
        assert found["sdm_hr"].equal(estimate.admitted)
        assert found["sdm_hr_lower"].equal(estimate.admitted_lower)
        assert found["sdm_hr"].any()


def test_a_probability_of_alpha_is_admitted() -> None:
    found = by_probability(torch.zeros(3).long(), torch.tensor([0.9, 0.89, 1.0], dtype=torch.float64), (0.9,))
    assert found.admitted[0.9].tolist() == [True, False, True]
    top = by_classes(torch.tensor([[0.3, 0.7], [0.5, 0.5]]), (0.6,))
    assert top.y_hat.tolist() == [1, 0]
    assert top.admitted[0.6].tolist() == [True, False]


def test_the_selective_threshold_by_hand() -> None:
    # 20 rows from the surest down; the 11th and the last are wrong, so above rank k accuracy is 10/11 at k = 11, ...
    right = torch.ones(20, dtype=torch.bool)
    right[[10, 19]] = False
    confidence = torch.arange(20.0, 0, -1)
    assert selective_threshold(confidence, right, 0.9) == 1.0  # 18 of 20
    assert (
        selective_threshold(confidence, right, 0.95) == math.inf
    )  # 20 rows are needed, 18 of them are right
    right[19] = True
    assert selective_threshold(confidence, right, 0.95) == 1.0  # 19 of 20
    assert selective_threshold(torch.ones(20), right, 0.96) == math.inf
    tied = torch.tensor([3.0] * 10 + [2.0] * 10)
    right[:] = True
    right[15:] = False
    assert selective_threshold(tied, right, 0.9) == 3.0  # 13 of 14 would do, but those tied enter together


def test_a_temperature_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, generator=generator) * 2
    y = (torch.rand(4000, generator=generator) < logits.sigmoid()).long()
    z_prime = 3 * torch.stack([torch.zeros(4000), logits], 1)  # three times as sure as is true
    fitting: Any = SimpleNamespace(
        calibration_rows=SimpleNamespace(z_prime=z_prime), calibration_labels=y, alphas=(0.9,)
    )
    found = temperature.fit(fitting)(SimpleNamespace(z_prime=torch.tensor([[0.0, 6.0]])))  # type: ignore[arg-type]
    # softmax of 6 / T; T = 3 up to a standard error of about 4 % at this size.
    temperature_found = 6 / math.log(float(found.confidence[0]) / (1 - float(found.confidence[0])))
    assert temperature_found == pytest.approx(3, rel=0.15)


def test_the_conformal_quantile_by_hand() -> None:
    values = torch.arange(1.0, 10)  # nine values: ranks ceil(10 alpha)
    assert prediction_sets.conformal_quantile(values, 0.9) == 9
    assert prediction_sets.conformal_quantile(values, 0.5) == 5
    assert prediction_sets.conformal_quantile(values, 0.91) == math.inf


def test_aps_scores_by_hand() -> None:
    p = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
    u = torch.rand(2, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64).flatten().tolist()
    found = prediction_sets.scores(p, 0.1, torch.Generator().manual_seed(5))
    assert found[0].tolist() == pytest.approx([u[0] * 0.7, 0.7 + u[0] * 0.3 + 0.1])
    assert found[1].tolist() == pytest.approx([0.8 + u[1] * 0.2 + 0.1, u[1] * 0.8])


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_prediction_sets_hold_the_label_as_often_as_promised(penalty: float) -> None:
    generator = torch.Generator().manual_seed(6)
    p = torch.rand(8000, generator=generator, dtype=torch.float64)
    y = (torch.rand(8000, generator=generator) < p**2).long()  # not what p says: coverage does not need it
    both = torch.stack([1 - p, p], 1)
    own = prediction_sets.scores(both, penalty, generator).gather(1, y.unsqueeze(1)).squeeze(1)
    tau = prediction_sets.conformal_quantile(own[:4000], 0.9)
    # Two samples of 4000: standard error sqrt(2 * 0.09 / 4000) = 0.0067; four of them.
    assert float((own[4000:] <= tau).double().mean()) == pytest.approx(0.9, abs=0.027)


def test_mahalanobis_in_a_known_covariance() -> None:
    generator = torch.Generator().manual_seed(7)
    y = torch.arange(20_000) % 2
    x = torch.randn(20_000, 2, generator=generator) * torch.tensor([1.0, 3.0])
    x[:, 0] += 10 * y  # means (0, 0) and (10, 0), covariance diag(1, 9)
    rows = SimpleNamespace(x=x, y_hat=y)
    fitting: Any = SimpleNamespace(
        train_rows=rows, train_labels=y, calibration_rows=rows, calibration_labels=y, alphas=(0.9,)
    )
    points = torch.tensor([[0.0, 0.0], [10.0, 6.0], [5.0, 0.0]])
    found = mahalanobis.fit(fitting)(SimpleNamespace(x=points, y_hat=torch.tensor([0, 1, 0])))  # type: ignore[arg-type]
    assert found.confidence.tolist() == pytest.approx([0, -4, -25], rel=0.05, abs=0.01)


def test_p_norms_by_hand() -> None:
    z = torch.tensor([[3.0, 4.0], [-1.0, -2.0], [0.0, 0.0]])
    assert p_norm.confidence(z, 1).tolist() == pytest.approx([4 / 7, -1 / 3, 0])
    assert p_norm.confidence(z, 2).tolist() == pytest.approx([4 / 5, -1 / 5**0.5, 0])
    assert p_norm.confidence(z, None)[0] == pytest.approx(1 / (1 + math.exp(-1)))


def test_adues_uncertainty_by_hand() -> None:
    found = adue.uncertainty(torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 60.0]], dtype=torch.float64))
    # Even: SM = (1/100) ln(2 e^50). At 0.88 against 0.12 the smooth maximum is 0.88 itself. Sure: clipped.
    assert float(found[0]) == pytest.approx(2 * (0.5 - math.log(2) / 100))
    assert float(found[1]) == pytest.approx(2 / (1 + math.exp(2)), rel=1e-6)
    assert float(found[2]) == pytest.approx(1e-8)


def test_adues_clip_has_no_gradient() -> None:
    logits = torch.tensor([[0.0, 60.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    adue.uncertainty(logits).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [0.0, 0.0]
    assert logits.grad[1].abs().min() > 0.1


def test_the_adaptor_is_one_linear_map(fitting: Fitting, test_rows: tuple[Rows, Tensor]) -> None:
    rows, _ = test_rows
    with torch.no_grad():
        assert torch.allclose(
            linear_head(fitting.estimator)(rows.x.double()).float(), rows.z_prime, atol=1e-5
        )


def test_some_rows_are_the_same_rows(test_rows: tuple[Rows, Tensor]) -> None:
    rows, _ = test_rows
    part = rows[torch.tensor([3, 1])]
    assert part.x.equal(rows.x[[3, 1]])
    assert part.measurement.q.equal(rows.measurement.q[[3, 1]])
    assert part.z_prime.equal(rows.z_prime[[3, 1]])


def test_two_gates_admit_what_is_served(
    fitting: Fitting, test_rows: tuple[Rows, Tensor], scorers: dict[str, Scorer]
) -> None:
    rows, _ = test_rows
    stranger = Rows(rows.h[:2], rows.x[:2], rows[torch.arange(2)].measurement, torch.full((2, 6), 99.0))
    gates = fitting.gates
    assert gates is not None
    d, _, _ = fitting.estimator.activate(rows.measurement)
    judged = gates.rule.judge(rows.prompts, rows.h, sdm_figures(rows.measurement, d))
    found = scorers["two_gates"](rows)
    for alpha, least in zip(ALPHAS, (0.5, 2.0), strict=True):
        assert found.admitted[alpha].equal(judged.known & (judged.score >= least))
        assert 0 < int(found.admitted[alpha].sum()) < len(rows.h)
        assert (found.y_hat[found.admitted[alpha]] == 1).all()
    assert not any(admitted.any() for admitted in scorers["two_gates"](stranger).admitted.values())
