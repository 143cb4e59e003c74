"""Softmax: a row is admitted where softmax(z')_y_hat >= alpha (Hendrycks and Gimpel, 1610.02136)."""

from __future__ import annotations

from candor.comparison.comparators.base import Fitting, MethodVerdicts, Rows, Scorer, by_classes


def fit(fitting: Fitting) -> Scorer:
    def score(rows: Rows) -> MethodVerdicts:
        return by_classes(rows.z_prime.double().softmax(1), fitting.alphas)

    return score
