"""The estimator as a whole: one arithmetic, nothing but numbers, state, updates."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from candor.sdm.adaptor import ExemplarAdaptor, fit_standardisation
from candor.sdm.conventions import RECORDED
from candor.sdm.distance import ClasswiseECDF
from candor.sdm.estimator import SDMEstimator
from candor.sdm.outputs import Calibration, Estimate
from candor.sdm.region import Region
from candor.sdm.support import Support

ALPHAS = (0.9, 0.95)
DIM = 24


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two classes that overlap a little."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n,), generator=generator)
    h = torch.randn(n, DIM, generator=generator)
    h[:, 0] += 5.0 * (labels * 2 - 1)
    return h, labels


def adaptor_for(h: Tensor) -> ExemplarAdaptor:
    """A head that reads the first dimension: accurate without training."""
    adaptor = ExemplarAdaptor(*fit_standardisation(h), 12, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        adaptor.exemplar.weight[0] = 0
        adaptor.exemplar.weight[0, 0] = 2.0
        adaptor.head.weight.zero_()
        adaptor.head.weight[:, 0] = torch.tensor([-1.0, 1.0])
        adaptor.head.bias.zero_()
        adaptor.exemplar.bias.zero_()
    return adaptor


@pytest.fixture(scope="module")
def estimator() -> SDMEstimator:
    train, calibration = rows(600, 1), rows(700, 2)
    return SDMEstimator.fit(adaptor_for(train[0]), train, calibration, ALPHAS)


def test_it_admits_points_like_those_it_knows(estimator: SDMEstimator) -> None:
    h, labels = rows(400, 3)
    got = estimator.estimate(h, 0.9)
    assert estimator.regions[0.9].found
    assert got.admitted.float().mean() > 0.3
    assert (got.y_hat == labels)[got.admitted].float().mean() > 0.95
    assert (got.admitted | ~got.admitted_lower).all()  # the lower verdict is the stricter one here


def test_what_it_never_saw_is_out_of_distribution(estimator: SDMEstimator) -> None:
    got = estimator.estimate(torch.full((3, DIM), 40.0), 0.9)
    assert got.is_ood.all()
    assert not got.admitted.any()
    assert not got.d.any()


def test_a_calibration_row_scored_again_gets_its_own_values_back(estimator: SDMEstimator) -> None:
    h, _ = rows(700, 2)
    for start, size in ((0, 1), (17, 1), (0, 64), (301, 99), (0, 700)):
        part = slice(start, start + size)
        _, scores, rescaled = estimator.activate(estimator.measure(h[part]))
        assert torch.equal(scores, estimator.calibration.sdm[part])
        assert torch.equal(rescaled, estimator.calibration.q_prime[part])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 17, 64, 127])
def test_every_output_of_a_row_is_the_same_in_any_batch(estimator: SDMEstimator, size: int) -> None:
    h, _ = rows(200, 4)
    whole = estimator.estimate(h, 0.95)
    for start in (0, 200 - size):
        part = estimator.estimate(h[start : start + size], 0.95)
        for field in fields(Estimate):
            expected = getattr(whole, field.name)[start : start + size]
            assert torch.equal(getattr(part, field.name), expected), field.name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_not_finite_is_out_of_distribution_and_harms_no_one(
    estimator: SDMEstimator, value: float
) -> None:
    # An exemplar where such a row's h' = 0 lies, lest it be far from all by luck.
    zero = torch.zeros(1, dtype=torch.int64)
    estimator = estimator.updated(zero, zero, torch.zeros(1, 12))
    h, _ = rows(5, 5)
    clean = estimator.estimate(h, 0.9)
    h[2, 7] = value
    seen = estimator.measure(h)
    got = estimator.judge(seen, 0.9)
    assert seen.finite.tolist() == [True, True, False, True, True]
    assert (seen.q[2], seen.nearest[2], seen.d_nearest[2]) == (0, -1, float("inf"))
    assert got.is_ood[2]
    assert got.d[2] == 0
    assert not got.admitted[2]
    assert not got.admitted_lower[2]
    others = [0, 1, 3, 4]
    for field in fields(Estimate):
        values = getattr(got, field.name)
        assert not torch.isnan(values.double()).any(), field.name
        assert torch.equal(values[others], getattr(clean, field.name)[others]), field.name
    distances, indices = estimator.nearest(h, 3)
    assert indices[2].tolist() == [-1, -1, -1]
    assert torch.isinf(distances[2]).all()


def test_d_zero_is_out_of_distribution_by_default_alone(estimator: SDMEstimator) -> None:
    train, calibration = rows(600, 1), rows(700, 2)
    recorded = SDMEstimator.fit(estimator.adaptor, train, calibration, ALPHAS, RECORDED)
    # Beyond all calibration distances along the first axis: q > 0, d = 0.
    h = torch.zeros(1, DIM)
    h[0, 0] = 60.0
    ours, theirs = estimator.estimate(h, 0.9), recorded.estimate(h, 0.9)
    assert ours.q.item() > 0
    assert (ours.d.item(), theirs.d.item()) == (0.0, 0.0)
    assert (ours.is_ood.item(), theirs.is_ood.item()) == (True, False)
    assert torch.allclose(ours.sdm, torch.full((1, 2), 0.5))


def test_q_has_the_cap_of_the_conventions(estimator: SDMEstimator) -> None:
    h, _ = rows(50, 3)
    q = estimator.measure(h).q
    assert q.max() > 3
    capped = replace(estimator, conventions=replace(estimator.conventions, max_q=3))
    assert torch.equal(capped.measure(h).q, q.clamp(max=3))


def test_a_class_that_calibration_lacks_gives_no_region() -> None:
    train, (h, labels) = rows(300, 6), rows(300, 7)
    ones = labels == 1
    estimator = SDMEstimator.fit(adaptor_for(train[0]), train, (h[ones], labels[ones]), [0.9])
    got = estimator.estimate(h, 0.9)
    assert not estimator.regions[0.9].found
    assert not got.admitted.any()
    assert got.d.any()  # distance is still known from the other class


def test_duplicates_of_a_support_row_are_at_distance_zero(estimator: SDMEstimator) -> None:
    h, _ = rows(600, 1)
    got = estimator.measure(h[10:20])
    assert not got.d_nearest.any()
    assert got.nearest.tolist() == list(range(10, 20))


def test_state_round_trip_keeps_every_bit(estimator: SDMEstimator) -> None:
    infinite = estimator.with_regions([0.9, 0.999])
    assert not infinite.regions[0.999].found
    restored = SDMEstimator.from_state({name: tensor.clone() for name, tensor in infinite.state().items()})
    h, _ = rows(50, 8)
    for alpha in (0.9, 0.999):
        first, again = infinite.estimate(h, alpha), restored.estimate(h, alpha)
        for field in fields(Estimate):
            assert torch.equal(getattr(first, field.name), getattr(again, field.name)), field.name
    assert all(torch.equal(value, restored.state()[name]) for name, value in infinite.state().items())
    assert torch.equal(restored.with_regions([0.95]).regions[0.95].psi, estimator.regions[0.95].psi)


def test_state_names_what_is_missing(estimator: SDMEstimator) -> None:
    state = estimator.with_regions([]).state()
    assert state["regions.psi"].shape == (0, 2)
    state["surplus"] = state.pop("ecdf.values")
    with pytest.raises(ValueError, match=r"missing \['ecdf.values'\], unexpected \['surplus'\]"):
        SDMEstimator.from_state(state)


def test_an_unknown_alpha_names_those_that_are_known(estimator: SDMEstimator) -> None:
    with pytest.raises(ValueError, match=r"no region at alpha = 0.8; this estimator has \[0.9, 0.95\]"):
        estimator.estimate(torch.zeros(1, DIM), 0.8)


def test_h_of_another_width_is_refused(estimator: SDMEstimator) -> None:
    with pytest.raises(ValueError, match=r"h must be \(n, 24\), got \(1, 23\)"):
        estimator.measure(torch.zeros(1, 23))


def test_no_rows_give_no_rows(estimator: SDMEstimator) -> None:
    assert estimator.estimate(torch.empty(0, DIM), 0.9).sdm.shape == (0, 2)


def test_update_of_the_support(estimator: SDMEstimator) -> None:
    h, _ = rows(30, 9)
    seen = estimator.measure(h)
    updated = estimator.updated(torch.full((30,), -1), seen.y_hat, seen.h_prime)
    after = updated.measure(h)
    assert not after.q.any()  # each row now meets itself first, unlabelled
    assert not after.d_nearest.any()
    assert torch.equal(estimator.measure(h).q, seen.q)
    confirmed = estimator.updated(seen.y_hat, seen.y_hat, seen.h_prime).measure(h)
    assert (confirmed.q >= seen.q + 1).all()


def test_training_rows_must_be_finite_and_labels_in_range() -> None:
    (h, labels), calibration = rows(20, 10), rows(20, 11)
    adaptor = adaptor_for(h)
    h[3, 0] = float("nan")
    with pytest.raises(ValueError, match=r"training rows \[3\] aren't finite"):
        SDMEstimator.fit(adaptor, (h, labels), calibration)
    with pytest.raises(ValueError, match=r"must be in 0\.\.1, got \[0, 1, 2\]"):
        SDMEstimator.fit(adaptor, calibration, (calibration[0], torch.arange(20) % 3))


def test_exemplars_come_nearest_first(estimator: SDMEstimator) -> None:
    h, _ = rows(6, 12)
    distances, indices = estimator.nearest(h, 4)
    seen = estimator.measure(h)
    assert torch.equal(indices[:, 0], seen.nearest)
    assert torch.equal(distances[:, 0], seen.d_nearest)
    assert (distances.diff(dim=1) >= 0).all()


@pytest.mark.parametrize(
    ("below", "epsilon", "sdm_lower", "admitted"),
    [
        # ln(2 / 0.1) = 2.995732; eps_c = sqrt(2.995732 / (2 n_c)); SDM(z')_1 at d_lower = 1 / (1 + 8^(-2 d_lower)).
        ((6, 600), 0.4996442, 0.8890349, False),  # d_lower = 0.5003557
        ((600, 6), 0.4996442, 0.8890349, False),
        ((600, 600), 0.0499644, 0.9811292, True),  # d_lower = 0.9500356
    ],
)
def test_the_class_with_the_fewest_points_decides_how_wide_the_band_is(
    below: tuple[int, int], epsilon: float, sdm_lower: float, admitted: bool
) -> None:
    """h' = h and z' = (-h, h). Six exemplars at 1 before the first other at -1: at h = 1, q = 6 and d = 1."""
    adaptor = ExemplarAdaptor(torch.zeros(1), torch.ones(1), 1, 2)
    with torch.no_grad():
        for values, parameter in (
            ([[1.0]], adaptor.exemplar.weight),
            ([0.0], adaptor.exemplar.bias),
            ([[-1.0], [1.0]], adaptor.head.weight),
            ([0.0, 0.0], adaptor.head.bias),
        ):
            parameter.copy_(torch.tensor(values))
    labels = torch.tensor([1] * 6 + [0])
    # Below q' = 6 lie all of a class's points but one, which the cap at N_c - 1 leaves out anyway.
    of_class = torch.tensor([0] * (below[0] + 1) + [1] * (below[1] + 1))
    n = len(of_class)
    estimator = SDMEstimator(
        adaptor,
        Support(torch.tensor([[1.0]] * 6 + [[-1.0]]), labels, labels),
        ClasswiseECDF.from_classes([torch.ones(1), torch.ones(1)]),
        Calibration(torch.full((n, 2), 0.5), torch.ones(n), of_class),
        {0.9: Region(0.9, 6.0, torch.tensor([0.9, 0.9]))},
    )
    got = estimator.estimate(torch.ones(1, 1), 0.9)
    assert (got.q.item(), got.d.item(), got.q_prime.item()) == (6, 1.0, 6.0)
    assert got.effective_sample_size.tolist() == [list(below)]
    assert got.epsilon.item() == pytest.approx(epsilon, abs=1e-7)
    assert got.d_lower.item() == pytest.approx(1 - epsilon, abs=1e-7)
    assert got.sdm_lower[0, 1].item() == pytest.approx(sdm_lower, abs=1e-6)
    assert got.admitted.item()
    assert got.admitted_lower.item() is admitted
