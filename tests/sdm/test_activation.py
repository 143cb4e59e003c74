"""The activation: known values, its laws, extremes, and the loss's gradient."""

from __future__ import annotations

import math

import pytest
import torch

from candor.sdm.activation import (
    SOFTMAX_Q,
    balanced_loss,
    log_base_sdm,
    log_sdm,
    sdm,
    sdm_loss,
    sdm_loss_gradient,
)


def example(n: int = 40, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, classes, generator=generator) * 3
    return z, torch.randint(0, 500, (n,), generator=generator), torch.rand(n, generator=generator)


def test_by_hand() -> None:
    # q = 2, d = 1/2: the base is 4 and the exponent 1/2, so weights are 2^z.
    z, q, d = torch.tensor([[3.0, 1.0]]), torch.tensor([2]), torch.tensor([0.5])
    assert sdm(z, q, d).tolist()[0] == pytest.approx([0.8, 0.2])
    assert log_base_sdm(z, q, d).tolist()[0] == pytest.approx([math.log(0.8, 4), math.log(0.2, 4)])
    assert sdm_loss(z, q.float(), d, torch.tensor([1])).item() == pytest.approx(-math.log(0.2, 4))


def test_logarithms_are_those_of_double_precision() -> None:
    # q = 5, d = 1: the base is 7, so ln SDM(z')_0 = -ln(1 + 7^-1).
    got = log_sdm(torch.tensor([[1.0, 0.0]]), torch.tensor([5]), torch.ones(1))
    assert got[0, 0].item() == pytest.approx(-math.log(8 / 7), abs=1e-14)


def test_it_is_the_softmax_at_base_e_and_full_distance() -> None:
    z, _, _ = example()
    got = sdm(z, torch.full((40,), SOFTMAX_Q), torch.ones(40))
    assert torch.allclose(got, torch.softmax(z, dim=1), atol=1e-6)


def test_it_is_uniform_at_distance_zero() -> None:
    z, q, _ = example()
    assert torch.allclose(sdm(z, q, torch.zeros(40)), torch.full((40, 3), 1 / 3))


def test_the_largest_logit_stays_largest_and_rows_sum_to_one() -> None:
    z, q, d = example()
    got = sdm(z, q, d.clamp(min=0.01))
    assert torch.equal(got.argmax(dim=1), z.argmax(dim=1))
    assert torch.allclose(got.sum(dim=1), torch.ones(40))


def test_the_top_rises_with_similarity_and_with_distance_quantile() -> None:
    z = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    by_q = sdm(z, torch.tensor([0, 1, 10, 100, 1000]), torch.ones(5))[:, 0]
    by_d = sdm(z, torch.full((5,), 10), torch.linspace(0, 1, 5))[:, 0]
    assert (by_q.diff() > 0).all()
    assert (by_d.diff() > 0).all()


@pytest.mark.parametrize(("z", "q"), [(3e38, 10**9), (-3e38, 10**9), (0.0, 0), (1e-38, 10**15)])
def test_extremes_stay_finite(z: float, q: int) -> None:
    logits = torch.tensor([[z, 0.0, -z]])
    assert torch.isfinite(log_sdm(logits, torch.tensor([q]), torch.ones(1))).all()
    scores = sdm(logits, torch.tensor([q]), torch.ones(1))
    assert torch.isfinite(scores).all()
    assert float(scores.sum()) == pytest.approx(1.0)


def test_gradient_of_the_mean_loss() -> None:
    z, q, d = example()
    labels = torch.arange(40) % 3
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sdm_loss(leaf, q.float(), d, labels).mean(), leaf)
    onehot = torch.nn.functional.one_hot(labels, 3)
    expected = d.unsqueeze(1) * (sdm(z, q, d) - onehot) / 40
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_loss_at_distance_zero_has_no_gradient_and_its_known_value() -> None:
    leaf = torch.tensor([[5.0, -1.0, 0.0, 2.0]], requires_grad=True)
    loss = sdm_loss(leaf, torch.tensor([14.0]), torch.zeros(1), torch.tensor([1]))
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert loss.item() == pytest.approx(math.log(4, 16))
    assert not gradient.any()


def test_balanced_loss_weighs_classes_alike_and_absent_ones_nought() -> None:
    losses, labels = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0, 0, 0, 2])
    assert balanced_loss(losses, labels, 3).tolist() == [2.0, 0.0, 10.0]


@pytest.mark.parametrize("classes", [2, 5])
def test_the_closed_gradient_is_autograd_s(classes: int) -> None:
    z, q, d = example(classes=classes)
    z.requires_grad_()
    labels = torch.arange(40) % classes
    sdm_loss(z, q.float(), d, labels).mean().backward()
    assert torch.allclose(sdm_loss_gradient(z.detach(), q.float(), d, labels), z.grad, atol=1e-7)
