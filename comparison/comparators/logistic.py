"""Logistic regression on x, by scikit-learn: the usual first baseline.

The penalty is chosen by the likelihood on the calibration half among C = 1e-5, ..., 1e1.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor

from candor.comparison.comparators.base import Fitting, MethodVerdicts, Rows, Scorer, by_classes

PENALTIES = tuple(10.0**power for power in range(-5, 2))


def fit(fitting: Fitting) -> Scorer:
    x, y = fitting.train_rows.x.double().numpy(), fitting.train_labels.numpy()
    seen, seen_y = fitting.calibration_rows.x, fitting.calibration_labels.numpy()
    models = [LogisticRegression(C=c, max_iter=2000).fit(x, y) for c in PENALTIES]
    best = min(models, key=lambda model: log_loss(seen_y, _probabilities(model, seen)))

    def score(rows: Rows) -> MethodVerdicts:
        return by_classes(torch.from_numpy(_probabilities(best, rows.x)), fitting.alphas)

    return score


def _probabilities(model: LogisticRegression, x: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    probabilities: np.ndarray[tuple[int, int], np.dtype[np.float64]] = model.predict_proba(x.double().numpy())
    return probabilities
