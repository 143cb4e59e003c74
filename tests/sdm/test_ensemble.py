"""Votes, unanimity, and whose values are shown."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from candor.sdm.ensemble import combine
from candor.sdm.outputs import Estimate


def vote(y_hat: int, top: float, *, admitted: bool = True, is_ood: bool = False) -> Estimate:
    """One row of three classes; q' tells the model apart."""
    scores = torch.full((1, 3), (1 - top) / 2)
    scores[0, y_hat] = top
    values = {field.name: torch.zeros(1) for field in fields(Estimate)}
    values |= {
        "y_hat": torch.tensor([y_hat]),
        "sdm": scores,
        "sdm_lower": scores.flip(1) if y_hat == 1 else scores,
        "q_prime": torch.tensor([100 * top]),
        "q_prime_lower": torch.tensor([50 * top]),
        "is_ood": torch.tensor([is_ood]),
        "admitted": torch.tensor([admitted]),
        "admitted_lower": torch.tensor([admitted]),
    }
    return Estimate(**values)


def test_the_most_doubtful_voter_for_the_winning_class_speaks() -> None:
    got = combine([vote(2, 0.9), vote(1, 0.5), vote(2, 0.8), vote(2, 0.95)])
    assert (got.y_hat.item(), got.speaker.item(), got.q_prime.item()) == (2, 2, pytest.approx(80.0))
    assert got.sdm[0, 2].item() == pytest.approx(0.8)
    assert got.q_prime_lower.item() == pytest.approx(40.0)
    assert not got.admitted.any()  # one model disagrees


def test_all_must_agree_and_all_admit() -> None:
    assert combine([vote(0, 0.9), vote(0, 0.8)]).admitted.item()
    assert not combine([vote(0, 0.9), vote(0, 0.8, admitted=False)]).admitted.item()
    assert not combine([vote(0, 0.9), vote(1, 0.9)]).admitted.item()


def test_one_model_suffices_for_out_of_distribution() -> None:
    assert combine([vote(0, 0.9), vote(0, 0.8, is_ood=True)]).is_ood.item()
    assert not combine([vote(0, 0.9), vote(0, 0.8)]).is_ood.item()


def test_ties_go_to_the_lowest_class_and_the_first_model() -> None:
    got = combine([vote(2, 0.9), vote(1, 0.7)])
    assert (got.y_hat.item(), got.tied.item(), got.speaker.item()) == (1, True, 1)
    same = combine([vote(2, 0.9), vote(2, 0.9)])
    assert (same.speaker.item(), same.tied.item()) == (0, False)


def test_nobody_is_no_ensemble() -> None:
    with pytest.raises(ValueError, match="at least one"):
        combine([])
