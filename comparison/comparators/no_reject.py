"""No-reject: the adaptor's verdict is always taken. Any way of abstaining must improve on this."""

from __future__ import annotations

import torch

from candor.comparison.comparators.base import Fitting, MethodVerdicts, Rows, Scorer


def fit(fitting: Fitting) -> Scorer:
    def score(rows: Rows) -> MethodVerdicts:
        everyone = torch.ones(len(rows.y_hat), dtype=torch.bool)
        return MethodVerdicts(
            rows.y_hat, everyone.double(), None, {alpha: everyone.clone() for alpha in fitting.alphas}
        )

    return score
