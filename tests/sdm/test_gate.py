"""The prompts' gate against a naive reference, by hand, at its extremes, and by the laws that its users rely on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from candor.sdm.gate import PromptGate

WIDTHS = (3, 4)


def states(n: int, seed: int, width: int = sum(WIDTHS), shift: float = 0.0) -> Tensor:
    """Correlated, with a common offset, the second block twenty times as wide as the first."""
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(7)) * 0.3 + torch.eye(width)
    drawn = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) @ mixing + 2 + shift
    drawn[:, WIDTHS[0] :] *= 20
    return drawn


def fitted(cut: int = 1, k: int = 3) -> PromptGate:
    return PromptGate.fit(states(60, 0), states(40, 1), WIDTHS, k, cut)


def naive_distances(fit: Tensor, query: Tensor, k: int) -> np.ndarray:
    """With the covariance matrix and its eigenvectors, in numpy and float64."""
    a, b = fit.double().numpy(), query.double().numpy()
    blocks = np.split(np.arange(a.shape[1]), np.cumsum(WIDTHS)[:-1])
    scale = np.concatenate([np.full(len(block), a[:, block].std(ddof=1)) for block in blocks])
    mean = a.mean(0)
    values, vectors = np.linalg.eigh(np.cov(((a - mean) / scale).T))
    values, vectors = values[::-1], vectors[:, ::-1]
    x = (b - mean) / scale
    along = x @ vectors
    return (along[:, :k] ** 2 / values[:k]).sum(1) + (along[:, k:] ** 2).sum(1) / values[k:].mean()


def by_hand(reference: list[float], cut: int) -> PromptGate:
    """In the plane, mean 0, one component along the first axis with deviation 2, residual variance 4."""
    return PromptGate(
        mean=torch.zeros(2),
        scale=torch.tensor([1.0, 1.0]),
        whitening=torch.tensor([[0.5, 0.0]]),
        deviations=torch.tensor([2.0], dtype=torch.float64),
        residual_variance=torch.tensor(4.0, dtype=torch.float64),
        reference=torch.tensor(reference, dtype=torch.float64),
        rank_cut=torch.tensor(cut),
    )


def test_distance_p_value_and_verdict_by_hand() -> None:
    gate = by_hand([0.5, 1.0, 2.0, 9.0], cut=1)
    query = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 4.0], [8.0, 0.0]])
    distance = gate.distance(query)
    assert distance.tolist() == [1.0, 1.0, 5.0, 16.0]  # (2/2)^2; 2^2/4; 1 + 16/4; (8/2)^2
    # 1 + those of the reference at least as far, over 5: three are at least 1 (itself included), one 5, none 16
    assert gate.p_value(distance).tolist() == [4 / 5, 4 / 5, 2 / 5, 1 / 5]
    assert gate.known(distance).tolist() == [True, True, True, False]
    assert by_hand([0.5, 1.0, 2.0, 9.0], cut=2).known(distance).tolist() == [True, True, False, False]


def test_a_cut_of_zero_knows_every_finite_prompt() -> None:
    gate = by_hand([0.5], cut=0)
    query = torch.tensor([[1e6, 0.0], [torch.nan, 0.0], [torch.inf, 0.0], [1e20, 0.0]])
    assert gate.known(gate.distance(query)).tolist() == [True, False, False, False]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_distances_are_those_of_the_covariance_matrix(k: int) -> None:
    query = states(30, 2)
    expected = naive_distances(states(60, 0), query, k)
    np.testing.assert_allclose(fitted(k=k).distance(query).numpy(), expected, rtol=1e-5)


def test_reference_distances_are_those_of_the_reference_records() -> None:
    gate = fitted()
    assert gate.reference.equal(gate.distance(states(40, 1)).sort().values)
    assert gate.reference.shape == (40,)


def test_what_lies_outside_the_components_is_seen() -> None:
    """Inside, a stranger may look ordinary; only the residual tells."""
    flat = states(60, 0)
    flat[:, -1] = flat[:, -1].mean() + 0.01 * flat[:, 0]
    gate = PromptGate.fit(flat, flat[:40], WIDTHS, 6, 1)
    stranger = flat.mean(0, keepdim=True)
    stranger[0, -1] += 20
    assert float(gate.distance(stranger)) > 10 * float(gate.reference.max())


def test_each_row_has_the_same_distance_alone_and_in_any_batch() -> None:
    width = 600
    draw = torch.Generator().manual_seed(3)
    fit, query = (torch.randn(n, width, generator=draw) * 5 + 1 for n in (120, 33))
    gate = PromptGate.fit(fit, fit[:20], (width // 2, width // 2), 30, 1)
    together = gate.distance(query)
    assert torch.cat([gate.distance(row.unsqueeze(0)) for row in query]).equal(together)
    assert gate.distance(query.flip(0)).flip(0).equal(together)


def test_its_own_reference_row_counts_itself() -> None:
    """A record scored again is at its own distance to the bit, so the farthest has p = 2 / (m + 1), not 1 / (m +
    1)."""
    gate = fitted()
    again = gate.p_value(gate.distance(states(40, 1)))
    assert float(again.min()) == 2 / 41


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), factor=st.sampled_from([1.0, 2.0, 10.0]))
def test_farther_from_the_centre_is_never_better_known(seed: int, factor: float) -> None:
    gate = fitted()
    direction = torch.randn(1, sum(WIDTHS), generator=torch.Generator().manual_seed(seed)) * gate.scale
    near, far = (gate.distance(gate.mean + size * direction) for size in (factor, 1.5 * factor))
    assert far > near
    assert gate.p_value(far) <= gate.p_value(near)


def test_p_is_uniform_for_prompts_drawn_as_the_reference_was() -> None:
    """Over 400 references of 19, P(p <= j / 20) = j / 20 for each j."""
    gate = fitted()
    ranks = []
    for seed in range(400):
        drawn = states(20, 1_000 + seed)
        again = gate.with_reference(drawn[:19], 1)
        ranks.append(round(float(again.p_value(again.distance(drawn[19:]))) * 20))
    counts = torch.bincount(torch.tensor(ranks), minlength=21)[1:].double()
    assert counts.sum() == 400
    assert float(((counts - 20) ** 2 / 20).sum()) < 43.8  # chi-squared with 19 degrees of freedom, 0.1 %


def test_rate_refused_follows_its_beta_law() -> None:
    """With l of m cut off, the rate over references is Beta(l, m + 1 - l): mean l / (m + 1)."""
    gate = fitted()
    fresh = gate.distance(states(4_000, 5))
    rates = []
    for seed in range(200):
        again = gate.with_reference(states(99, 3_000 + seed), 5)
        rates.append(float((~again.known(fresh)).double().mean()))
    drawn = torch.tensor(rates)
    assert float(drawn.mean()) == pytest.approx(5 / 100, abs=0.006)
    assert float(drawn.std()) == pytest.approx((0.05 * 0.95 / 101) ** 0.5, rel=0.25)


def test_state_restores_to_the_bit_and_names_what_is_wrong() -> None:
    gate = fitted(cut=2)
    state = gate.state()
    again = PromptGate.from_state(state)
    query = states(9, 8, shift=0.5)
    assert again.distance(query).equal(gate.distance(query))
    assert again.known(again.distance(query)).equal(gate.known(gate.distance(query)))
    with pytest.raises(ValueError, match=r"missing \['scale'\], unexpected \['size'\]"):
        PromptGate.from_state({("size" if name == "scale" else name): value for name, value in state.items()})
    with pytest.raises(ValueError, match="mean"):
        PromptGate.from_state(state | {"mean": torch.zeros(3)})


def test_what_cannot_be_fitted_is_refused_with_a_reason() -> None:
    with pytest.raises(ValueError, match="at least 4 prompts"):
        PromptGate.fit(states(3, 0), states(5, 1), WIDTHS, 3, 1)
    with pytest.raises(ValueError, match="all alike"):
        PromptGate.fit(torch.ones(20, 7), states(5, 1), WIDTHS, 3, 1)
    with pytest.raises(ValueError, match=r"rank_cut must be in 0\.\.5"):
        PromptGate.fit(states(20, 0), states(5, 1), WIDTHS, 3, 6)
    with pytest.raises(ValueError, match=r"must be \(n, 7\)"):
        fitted().distance(torch.zeros(2, 6))
