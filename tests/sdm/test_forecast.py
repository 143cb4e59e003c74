"""The forecast of an answer's score: a linear function of the prompt's states, the same alone and in a batch."""

from __future__ import annotations

import math

import pytest
import torch

from candor.sdm.forecast import ScoreForecast


def test_by_hand() -> None:
    forecast = ScoreForecast(torch.tensor([1.0, -2.0]), torch.tensor(0.5))
    states = torch.tensor([[1.0, 1.0], [4.0, 0.25], [math.nan, 0.0], [0.0, math.inf], [0.0, 1e13]])
    assert forecast(states).tolist() == [-0.5, 4.0, -math.inf, -math.inf, -math.inf]


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    draw = torch.Generator().manual_seed(0)
    forecast = ScoreForecast(torch.randn(576, generator=draw), torch.tensor(0.1))
    states = torch.randn(33, 576, generator=draw)
    alone = torch.cat([forecast(row.unsqueeze(0)) for row in states])
    assert torch.equal(forecast(states), alone)
    exact = [
        math.fsum([*(row.double() * forecast.weight.double()).tolist(), float(forecast.bias)])
        for row in states
    ]
    assert alone.tolist() == torch.tensor(exact, dtype=torch.float64).float().tolist()


def test_its_state_restores_it() -> None:
    forecast = ScoreForecast(torch.tensor([1.0, -2.0]), torch.tensor(0.5))
    again = ScoreForecast.from_state(forecast.state())
    assert torch.equal(again.weight, forecast.weight)
    assert torch.equal(again.bias, forecast.bias)
    with pytest.raises(ValueError, match="missing"):
        ScoreForecast.from_state({"weight": forecast.weight})
    with pytest.raises(ValueError, match="shapes"):
        ScoreForecast.from_state({"weight": forecast.weight.unsqueeze(0), "bias": forecast.bias})
    with pytest.raises(ValueError, match="prompt states must be"):
        forecast(torch.zeros(1, 3))
