"""Label smoothing by the model's uncertainty on a prompt (uncertainty-aware learning, arXiv 2406.04854).

    u = share of k sampled answers that the verifier calls wrong,
    e = 0.1 u / mean(u), clipped to [0, 0.3].

The paper's constants are not public: 0.1 and 0.3 are ours. Label smoothing can hurt selective
classification (2403.14715), so its effect is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from candor.finetune.data import Pair

SLOPE, MOST = 0.1, 0.3


def failure_rates(pairs: Sequence[Pair], samples: Sequence[Sequence[str]]) -> Tensor:
    """u: (n,) in [0, 1], of each pair's sampled answers."""
    return torch.tensor(
        [
            sum(not pair.is_right(answer) for answer in answers) / len(answers)
            for pair, answers in zip(pairs, samples, strict=True)
        ]
    )


def smoothing(u: Tensor) -> Tensor:
    """e: (n,) in [0, 0.3]; 0 for all pairs if no sampled answer was wrong."""
    mean = u.mean()
    return (SLOPE * u / mean).clamp(0, MOST) if mean > 0 else torch.zeros_like(u)
