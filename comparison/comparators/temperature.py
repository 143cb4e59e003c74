"""Temperature scaling: softmax(z' / T), T > 0 by likelihood on the calibration half (Guo et al., 1706.04599)."""

from __future__ import annotations

from math import exp

from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from candor.comparison.comparators.base import Fitting, MethodVerdicts, Rows, Scorer, by_classes


def fit(fitting: Fitting) -> Scorer:
    z_prime, y = fitting.calibration_rows.z_prime.double(), fitting.calibration_labels

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(z_prime / exp(log_temperature), y))

    temperature = exp(minimize_scalar(loss, bounds=(-6, 6), method="bounded").x)

    def score(rows: Rows) -> MethodVerdicts:
        return by_classes((rows.z_prime.double() / temperature).softmax(1), fitting.alphas)

    return score
