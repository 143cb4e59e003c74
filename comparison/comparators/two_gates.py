"""The bundle's two gates, as served: admitted where the prompt is known and the score reaches what is certified.

Ranked by the probability that the answer is right, so by the score alone: the first gate is no matter of degree.
"""

from __future__ import annotations

import torch

from candor.comparison.comparators.base import Fitting, MethodVerdicts, Rows, Scorer
from candor.sdm.score import sdm_figures


def fit(fitting: Fitting) -> Scorer:
    """Raises ValueError for a bundle without two gates."""
    gates = fitting.gates
    if gates is None:
        raise ValueError("the bundle has no two gates to compare")

    def score(rows: Rows) -> MethodVerdicts:
        d, _, _ = fitting.estimator.activate(rows.measurement)
        judged = gates.rule.judge(rows.prompts, rows.h, sdm_figures(rows.measurement, d))
        nothing = torch.zeros_like(judged.known)
        admitted = {
            alpha: nothing
            if (made := gates.terms.at(alpha)) is None
            else made.covers(judged.known, judged.score, judged.forecast)
            for alpha in fitting.alphas
        }
        p = judged.probability.double()
        follows = torch.stack([p >= 0.5, *admitted.values()]).any(dim=0)
        return MethodVerdicts(
            follows.long(), torch.maximum(p, 1 - p), torch.where(follows, p, 1 - p), admitted
        )

    return score
