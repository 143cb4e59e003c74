"""Mahalanobis distance to the nearer class mean (Lee et al., 1807.03888).

    confidence = - min_c (x - mu_c)^T S^-1 (x - mu_c)

mu_c and one shared covariance S come from the training half. A half often has fewer rows than h has entries, so S is
Ledoit and Wolf's shrunk estimate (scikit-learn), which can be inverted. The verdict stays the adaptor's.
Each alpha's threshold is chosen on the calibration half.
"""

from __future__ import annotations

import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor

from candor.comparison.comparators.base import (
    Fitting,
    MethodVerdicts,
    Rows,
    Scorer,
    by_thresholds,
    selective_threshold,
)


def fit(fitting: Fitting) -> Scorer:
    x, y = fitting.train_rows.x.double(), fitting.train_labels
    means = torch.stack([x[y == c].mean(0) for c in range(int(y.max()) + 1)])  # (C, D)
    shrunk = LedoitWolf(assume_centered=True, store_precision=False).fit((x - means[y]).numpy())
    factor = torch.linalg.cholesky(torch.from_numpy(shrunk.covariance_))

    def confidence(x: Tensor) -> Tensor:
        away = x.double().unsqueeze(1) - means  # (n, C, D)
        white: Tensor = torch.linalg.solve_triangular(factor, away.flatten(0, 1).T, upper=False)
        return white.square().sum(0).view(len(x), -1).amin(1).neg()

    seen = fitting.calibration_rows
    right = seen.y_hat == fitting.calibration_labels
    known = confidence(seen.x)
    thresholds = {alpha: selective_threshold(known, right, alpha) for alpha in fitting.alphas}

    def score(rows: Rows) -> MethodVerdicts:
        return by_thresholds(rows.y_hat, confidence(rows.x), thresholds)

    return score
