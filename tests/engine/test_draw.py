"""How the reference engine draws a token from logits."""

from __future__ import annotations

import pytest
import torch

from candor.engine.base import Sampling
from candor.engine.transformers_engine import _Draw

LOGITS = torch.tensor([0.0, 3.0, 2.9, -1.0])


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 5e-324, 1e-6])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    """S9: divided by 1e-320 the logits were infinite, and nothing could be drawn from them."""
    assert _Draw(Sampling(temperature=temperature, seed=0))(LOGITS, []) == 1


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 2.0])
def test_any_other_temperature_draws(temperature: float) -> None:
    assert _Draw(Sampling(temperature=temperature, seed=0))(LOGITS, []) in range(4)
