"""Standardisation by block, the two linear maps, and what counts as finite."""

from __future__ import annotations

import pytest
import torch

from candor.sdm.adaptor import ExemplarAdaptor, FrozenAdaptor, fit_standardisation


def make_adaptor(seed: int = 0, dim: int = 5) -> ExemplarAdaptor:
    generator = torch.Generator().manual_seed(seed)
    return ExemplarAdaptor(torch.zeros(dim), torch.ones(dim), 7, 3, generator)


def test_one_block_has_two_scalars_over_all_entries() -> None:
    h = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    mean, scale = fit_standardisation(h)
    assert mean.tolist() == [3.0, 3.0]
    assert scale.tolist() == pytest.approx([(14 / 3) ** 0.5] * 2)  # squares 4 + 1 + 0 + 9 over n - 1 = 3


def test_feature_blocks_are_standardised_each_by_itself() -> None:
    h = torch.tensor([[1.0, 2.0, 10.0], [3.0, 6.0, 10.0]])
    mean, scale = fit_standardisation(h, [(1, "scalar"), (2, "feature")])
    assert mean.tolist() == [2.0, 4.0, 10.0]
    assert scale.tolist() == pytest.approx([2**0.5, 8**0.5, 1.0])  # a constant feature keeps scale 1


def test_blocks_must_cover_h() -> None:
    with pytest.raises(ValueError, match="cover 3 of h's 2 dimensions"):
        fit_standardisation(torch.zeros(2, 2), [(3, "scalar")])
    with pytest.raises(ValueError, match="at least 2 rows"):
        fit_standardisation(torch.zeros(1, 2))


def test_initial_weights_follow_the_generator_and_pytorch_s_range() -> None:
    first, again, other = make_adaptor(1), make_adaptor(1), make_adaptor(2)
    assert torch.equal(first.exemplar.weight, again.exemplar.weight)
    assert not torch.equal(first.exemplar.weight, other.exemplar.weight)
    assert float(first.exemplar.weight.detach().abs().max()) <= 5**-0.5
    assert float(first.head.weight.detach().abs().max()) <= 7**-0.5


def test_frozen_and_trainable_map_agree() -> None:
    adaptor = make_adaptor()
    h = torch.randn(11, 5, generator=torch.Generator().manual_seed(4))
    h_prime, z_prime, y_hat, finite = FrozenAdaptor(adaptor)(h)
    expected_h, expected_z = adaptor(adaptor.standardise(h))
    assert torch.allclose(h_prime, expected_h, atol=1e-6)
    assert torch.allclose(z_prime, expected_z, atol=1e-6)
    assert torch.equal(y_hat, z_prime.argmax(dim=1))
    assert finite.all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_row_that_is_not_finite_is_flagged_and_zeroed(value: float) -> None:
    h = torch.ones(3, 5)
    h[1, 2] = value
    h_prime, z_prime, _, finite = FrozenAdaptor(make_adaptor())(h)
    assert finite.tolist() == [True, False, True]
    assert not h_prime[1].any()
    assert not z_prime[1].any()


def test_a_narrow_feature_block_has_as_much_say_as_a_wide_one() -> None:
    h = torch.randn(500, 34, generator=torch.Generator().manual_seed(0)) * 3 + 1
    h[:, 32:] *= torch.tensor([100.0, 0.01])
    mean, scale = fit_standardisation(h, [(32, "scalar"), (2, "feature")])
    x = (h - mean) / scale
    assert x[:, :32].var(0).sum().item() == pytest.approx(32, rel=0.05)  # 0.05: five standard errors
    assert x[:, 32:].var(0).tolist() == pytest.approx([16.0, 16.0])
