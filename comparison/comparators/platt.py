"""Maps a score to the probability that the answer is right: P(y = 1 | s) = 1 / (1 + exp(-(a s + b))) (Platt, 1999).

It is fitted on calibration prompts by scikit-learn. It gives a score that only ranks a verdict and thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from candor.comparison.comparators.base import MethodVerdicts, by_classes


def judge(
    known: Sequence[float], labels: Sequence[int], scores: Sequence[float], alphas: Sequence[float]
) -> MethodVerdicts:
    """Verdicts on `scores`, from `known` calibration scores with their labels. If these have one class only, the
    verdict is always that class."""
    if len(set(labels)) == 1:
        ones = np.full(len(scores), float(labels[0]))
    else:
        model = LogisticRegression(C=1e6).fit(np.array(known)[:, None], np.array(labels))
        ones = model.predict_proba(np.array(scores)[:, None])[:, 1]
    return by_classes(torch.from_numpy(np.stack([1 - ones, ones], axis=1)), alphas)
