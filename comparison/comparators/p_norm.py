"""Max-logit p-norm: the largest logit of z' / |z'|_p (Cattelan and Silva, 2305.15508).

p from 1 to 10, or the softmax's maximum, is chosen by the lowest AURC on the calibration half, as are thresholds. The
logits are not centred: two centred logits are (-a, a), whose normalised maximum is the same for every row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from candor.calibration.ranking import ranking
from candor.comparison.comparators.base import (
    Fitting,
    MethodVerdicts,
    Rows,
    Scorer,
    by_thresholds,
    selective_threshold,
)

NORMS = (None, *range(1, 11))
"""None: the softmax's maximum, the paper's fallback where no norm helps."""


def fit(fitting: Fitting) -> Scorer:
    seen = fitting.calibration_rows
    right = seen.y_hat == fitting.calibration_labels
    once = torch.ones(1, len(right), dtype=torch.float64)
    norm = min(NORMS, key=lambda p: float(ranking(once, confidence(seen.z_prime, p), right)["aurc"]))
    known = confidence(seen.z_prime, norm)
    thresholds = {alpha: selective_threshold(known, right, alpha) for alpha in fitting.alphas}

    def score(rows: Rows) -> MethodVerdicts:
        return by_thresholds(rows.y_hat, confidence(rows.z_prime, norm), thresholds)

    return score


def confidence(z_prime: Tensor, p: int | None) -> Tensor:
    """(n, C) -> (n,) float64; a row of zeros has 0."""
    z = z_prime.double()
    if p is None:
        return z.softmax(1).amax(1)
    size: Tensor = torch.linalg.vector_norm(z, p, dim=1)
    return z.amax(1) / size.clamp(min=1e-30)
