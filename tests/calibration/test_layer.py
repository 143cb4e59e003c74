"""Training one layer, and rounds: what is learned, what is kept, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from candor.calibration.epochs import Half, LayerSettings, run_epochs, score_halves
from candor.calibration.layer import split_halves, train_layer
from candor.sdm.activation import sdm_loss
from candor.sdm.adaptor import ExemplarAdaptor
from candor.sdm.conventions import DEFAULT, RECORDED

QUICK = LayerSettings(exemplar_dim=16, epochs=25, learning_rate=2e-3)


def rows(n: int, seed: int, dim: int = 12, gap: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n,), generator=generator)
    h = torch.randn(n, dim, generator=generator)
    h[:, 3] += gap * (2 * labels - 1)
    return h, labels


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_learns_keeps_the_best_epoch_and_finds_a_region() -> None:
    seen: list[tuple[int, float]] = []
    trained = train_layer(
        *rows(300, 1),
        *rows(300, 2),
        num_classes=2,
        generator=generator(),
        alphas=(0.9,),
        settings=QUICK,
        progress=lambda epoch, loss: seen.append((epoch, loss)),
    )
    h, labels = rows(500, 3)
    estimate = trained.estimator.estimate(h, 0.9)
    assert (estimate.y_hat == labels).float().mean() > 0.95
    assert trained.estimator.regions[0.9].found
    assert (estimate.y_hat == labels)[estimate.admitted].float().mean() >= 0.9
    assert estimate.admitted.float().mean() > 0.2
    assert [epoch for epoch, _ in seen] == list(range(1, 26))
    assert tuple(loss for _, loss in seen) == trained.losses
    assert trained.loss == min(trained.losses) < trained.losses[0]


def test_the_kept_weights_are_those_of_the_best_epoch() -> None:
    # A learning rate at which the loss goes up and down, so that the last epoch isn't the best.
    settings = LayerSettings(exemplar_dim=8, epochs=12, learning_rate=0.3)
    (h_train, y_train), (h_cal, y_cal) = rows(200, 4, gap=0.7), rows(200, 5, gap=0.7)
    trained = train_layer(
        h_train, y_train, h_cal, y_cal, num_classes=2, generator=generator(1), settings=settings
    )
    assert trained.best_epoch < 12
    adaptor = trained.estimator.adaptor
    halves = Half(adaptor.standardise(h_train), y_train), Half(adaptor.standardise(h_cal), y_cal)
    _, calibration = score_halves(adaptor, *halves, DEFAULT)
    assert float(calibration.class_loss.mean()) == pytest.approx(trained.loss, rel=1e-3)


def test_the_same_seed_trains_the_same_layer() -> None:
    first, again, other = (
        train_layer(*rows(100, 6), *rows(100, 7), num_classes=2, generator=generator(seed), settings=QUICK)
        for seed in (3, 3, 4)
    )
    assert first.losses == again.losses
    assert all(
        torch.equal(value, again.estimator.state()[name]) for name, value in first.estimator.state().items()
    )
    assert first.losses != other.losses


def test_the_first_epoch_is_the_softmax_s() -> None:
    h, labels = rows(64, 8)
    adaptor = ExemplarAdaptor(torch.zeros(12), torch.ones(12), 6, 2, generator(5))
    plain = ExemplarAdaptor(torch.zeros(12), torch.ones(12), 6, 2, generator(5))
    half = Half(adaptor.standardise(h), labels)
    order = torch.arange(64)
    next(run_epochs(adaptor, half, half, [order], LayerSettings(batch_size=20, learning_rate=0.01)))
    optimiser = torch.optim.Adam(plain.parameters(), lr=0.01)
    for batch in torch.split(order, 20):  # the last has 4 rows
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(plain(half.x[batch])[1], labels[batch]).backward()
        optimiser.step()
    for got, expected in zip(adaptor.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


def test_later_epochs_train_with_what_the_epoch_before_left() -> None:
    h, labels = rows(40, 9)
    adaptor, start = (ExemplarAdaptor(torch.zeros(12), torch.ones(12), 6, 2, generator(6)) for _ in range(2))
    half = Half(adaptor.standardise(h), labels)
    order = torch.arange(40)
    epochs = run_epochs(adaptor, half, half, [order, order], LayerSettings(batch_size=40, learning_rate=0.01))
    first = next(epochs)
    parameters = list(adaptor.parameters())
    loss = sdm_loss(adaptor(half.x)[1], first.train.q.float(), first.train.d, labels).mean()
    slopes = torch.autograd.grad(loss, parameters)
    softmax_slopes = torch.autograd.grad(
        torch.nn.functional.cross_entropy(start(half.x)[1], labels), list(start.parameters())
    )
    # Adam's second step, from its definition.
    expected = []
    for weights, slope, earlier in zip(parameters, slopes, softmax_slopes, strict=True):
        mean = (0.9 * 0.1 * earlier + 0.1 * slope) / (1 - 0.9**2)
        square = (0.999 * 0.001 * earlier**2 + 0.001 * slope**2) / (1 - 0.999**2)
        expected.append(weights.detach() - 0.01 * mean / (square.sqrt() + 1e-8))
    next(epochs)
    for got, wanted in zip(adaptor.parameters(), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)
    assert first.train.q.float().std() > 0  # q tells rows apart, so the check above is one


def test_rare_points_do_not_freeze_training() -> None:
    # Three mispredicted points of a second class, by themselves far off: each meets another first, so all have
    # q = 0 and the class's eCDF is empty. As recorded, that takes every row's gradient away.
    (h, _), labels = rows(200, 10), torch.zeros(200).long()
    labels[:3] = 1
    h[:3] += 50
    adaptor = ExemplarAdaptor(torch.zeros(12), torch.ones(12), 6, 2, generator(7))
    with torch.no_grad():
        adaptor.head.weight.zero_()
        adaptor.head.bias.copy_(torch.tensor([5.0, -5.0]))
    half = Half(h, labels)
    by_default, _ = score_halves(adaptor, half, half, DEFAULT)
    recorded, _ = score_halves(adaptor, half, half, RECORDED)
    assert not by_default.q[:3].any()
    assert by_default.q[3:].any()
    assert not recorded.d.any()
    assert by_default.d[3:].mean() > 0.4


@pytest.mark.parametrize("sizes", [(50, 50), (51, 7), (30, 9, 2), (3, 3)])
def test_halves_are_stratified_and_seeded(sizes: tuple[int, ...]) -> None:
    labels = torch.cat([torch.full((size,), c) for c, size in enumerate(sizes)])
    train, cal = split_halves(labels, generator(9))
    assert len(train) == len(labels) // 2
    assert sorted([*train.tolist(), *cal.tolist()]) == list(range(len(labels)))
    for c, size in enumerate(sizes):
        assert abs(int((labels[train] == c).sum()) - size / 2) <= 0.5
    again, _ = split_halves(labels, generator(9))
    other, _ = split_halves(labels, generator(10))
    assert torch.equal(train, again)
    assert not torch.equal(train, other)


def test_recorded_halves_are_a_plain_shuffle() -> None:
    train, cal = split_halves(torch.zeros(7).long(), generator(), RECORDED)
    assert (len(train), len(cal)) == (3, 4)
    assert torch.equal(torch.cat([train, cal]), torch.randperm(7, generator=generator()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda h, y: (h.index_fill(0, torch.tensor([4]), math.nan), y),
            r"states of rows \[4\] aren't finite",
        ),
        (
            lambda h, y: (h, y.index_fill(0, torch.tensor([2]), 2)),
            r"labels must be in 0\.\.1; rows \[2\] aren't",
        ),
        (lambda h, y: (h, torch.zeros_like(y)), r"no rows of class \[1\]"),
        (lambda h, y: (h, y[:-1]), r"expected h \(n, D\) and labels \(n,\)"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(spoil: object, message: str) -> None:
    assert callable(spoil)
    with pytest.raises(ValueError, match=f"calibration half: .*{message}"):
        train_layer(
            *rows(20, 13), *spoil(*rows(20, 14)), num_classes=2, generator=generator(), settings=QUICK
        )


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LayerSettings(epochs=0)
    with pytest.raises(ValueError, match="learning_rate above 0"):
        LayerSettings(learning_rate=0.0)


def test_divergence_is_reported() -> None:
    wild = LayerSettings(exemplar_dim=4, epochs=3, learning_rate=1e30)
    with pytest.raises(ValueError, match="finite"):
        train_layer(*rows(60, 16), *rows(60, 17), num_classes=2, generator=generator(), settings=wild)
