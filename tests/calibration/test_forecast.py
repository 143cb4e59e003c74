"""What foretells scores: ridge regression held to scikit-learn's, cross-validated, and a cut that keeps its word."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from candor.calibration import forecast as module
from candor.calibration.forecast import fit_forecast, forecast_min
from candor.calibration.rule_settings import RuleSettings
from candor.calibration.splits import split


def folds(n: int) -> list[Tensor]:
    return split(list(range(n)), [0] * n, (0.2,) * 5, 0)


def world(n: int, seed: int, width: int = 12) -> tuple[Tensor, Tensor]:
    """Prompts that foretell half of the score's variance."""
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.randn(n, 2 * width, generator=draw)
    return prompts, prompts[:, 0] + torch.randn(n, generator=draw)


@pytest.mark.parametrize("n", [20, 200])
def test_ridge_regression_is_sklearns(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PENALTIES", (3.0,))
    prompts, scores = world(n, 1)
    made, _ = fit_forecast(prompts, scores, (12, 12), folds(n))
    scale = torch.cat([part.std().expand(12) for part in prompts.double().split(12, dim=1)])
    x = (prompts.double() - prompts.double().mean(0)) / scale
    penalty = 3.0 * float(x.square().sum(1).mean())
    plain = Ridge(alpha=penalty).fit(x.numpy(), scores.double().numpy())
    assert made(prompts).numpy() == pytest.approx(plain.predict(x.numpy()), abs=1e-5)


def test_cross_validated_forecasts_do_not_know_their_own_scores() -> None:
    prompts, _ = world(100, 2, width=150)
    noise = torch.randn(100, generator=torch.Generator().manual_seed(3))
    _, out_of_fold = fit_forecast(prompts, noise, (150, 150), folds(100))
    assert abs(float(torch.corrcoef(torch.stack([out_of_fold, noise.double()]))[0, 1])) < 0.3
    prompts, scores = world(400, 4)
    _, out_of_fold = fit_forecast(prompts, scores, (12, 12), folds(400))
    assert float(torch.corrcoef(torch.stack([out_of_fold, scores.double()]))[0, 1]) > 0.6


def test_the_cut_by_hand() -> None:
    """Of 100 that reach: at 0.02 not one may be below (0.98^100 > 0.05 for one), at 0.1 the fifth is the cut."""
    forecasts = torch.arange(200, dtype=torch.float64)
    reaching = forecasts >= 100
    assert forecast_min(forecasts, reaching, 0.02, 0.05) == 100
    assert forecast_min(forecasts, reaching, 0.1, 0.05) == 104


def test_no_more_is_lost_than_was_said() -> None:
    """With 150 records that reach the threshold, more than the share is lost in at most delta of the draws: of 100
    draws 5 on average, and more than 12 with probability 0.001."""
    too_many = 0
    fresh_prompts, fresh_scores = world(20_000, 10_000)
    for seed in range(100):
        prompts, scores = world(300, seed)
        made, out_of_fold = fit_forecast(prompts, scores, (12, 12), folds(300))
        cut = forecast_min(out_of_fold, scores >= 0, 0.05, 0.05)
        reached = made(fresh_prompts[fresh_scores >= 0]).double()
        too_many += float((reached < cut).double().mean()) > 0.05
    assert too_many <= 12


def test_a_share_out_of_range() -> None:
    with pytest.raises(ValueError, match="may be lost"):
        RuleSettings(may_lose=1.0)
