"""The high-reliability region: thresholds found once on calibration points, and the admission rule.

    q'    = min(q, (2 + q)^SDM(z')_y_hat)
    Algorithm 1 (2509.12760, section 4.2): over the calibration points with q' > 0, the smallest
    q'_min among their q' such that, for every class c, the (1 - alpha) quantile psi_c of SDM(z')_c
    over the points of true class c with q' >= q'_min is at least alpha.
    admitted iff q'_min is finite, the point is in distribution, q' >= q'_min, and the set
    {c : SDM(z')_c >= psi_c} is exactly {y_hat}.

alpha in (1/2, 1] is the target accuracy. Decided here, see `Conventions`: the quantile's index is exact,
a class needs ceil(1 / (1 - alpha)) points (none suffice at alpha = 1), a region that isn't found has
q'_min = psi = inf and admits nothing. No finite-sample correction: candidates and thresholds come from
the same points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from candor.sdm.conventions import DEFAULT, Conventions


def q_prime(q: Tensor, sdm_top: Tensor) -> Tensor:
    """Rescaled similarity: q (n,) int, SDM of the predicted class (n,) -> (n,) float32 in [0, q].

    At least 1 where q >= 1, so floor(q') = 0 exactly where q = 0.
    """
    q = q.double()
    return torch.minimum(q, (2 + q) ** sdm_top.double()).float()


@dataclass(frozen=True, eq=False)
class Region:
    """alpha; q_prime_min in [1, inf]; psi: (C,) float32 class thresholds, each in [alpha, 1] if found
    (alpha rounded to float32)."""

    alpha: float
    q_prime_min: float
    psi: Tensor

    @property
    def found(self) -> bool:
        return math.isfinite(self.q_prime_min)

    def admit(self, sdm: Tensor, y_hat: Tensor, q_prime: Tensor, is_ood: Tensor) -> Tensor:
        """(n, C), (n,), (n,), (n,) bool -> (n,) bool."""
        above = sdm >= self.psi  # (n, C)
        only_top = (above.sum(dim=1) == 1) & above.gather(1, y_hat.unsqueeze(1)).squeeze(1)
        return only_top & (q_prime >= self.q_prime_min) & ~is_ood & self.found


def quantile_index(n: Tensor, alpha: float, conventions: Conventions = DEFAULT) -> Tensor:
    """0-based index of the (1 - alpha) quantile among n ascending values: floor((1 - alpha) n), < n."""
    if conventions.quantile_index == "double":
        index = ((1 - alpha) * n.double()).long()
    else:
        tail = 1 - Fraction(str(alpha))
        index = n * tail.numerator // tail.denominator
    return torch.minimum(index, n - 1)


def minimum_points(alpha: float, conventions: Conventions = DEFAULT) -> float:
    """Points that every class must have above q'_min: ceil(1 / (1 - alpha)), inf at alpha = 1.

    With fewer, the quantile's index is 0 and the threshold is that of the single lowest point.
    """
    if not conventions.minimum_per_class:
        return 1
    tail = 1 - Fraction(str(alpha))
    return math.ceil(1 / tail) if tail else math.inf


def find_region(
    sdm: Tensor,
    q_prime: Tensor,
    labels: Tensor,
    alpha: float,
    conventions: Conventions = DEFAULT,
) -> Region:
    """Algorithm 1 over calibration points: sdm (n, C), q' (n,), true labels (n,) in 0..C-1.

    O(n (C + log n)): psi_c >= alpha iff at most `quantile_index` of the class's remaining points lie
    under alpha, so two running counts per class, in descending q', decide every candidate at once.
    Scores are float32, so alpha is rounded to float32 too: a score of 0.9 reaches alpha = 0.9.
    """
    if not 0.5 < alpha <= 1:
        raise ValueError(f"alpha must be in (0.5, 1], got {alpha}: it is the target accuracy, such as 0.95")
    num_classes = sdm.shape[1]
    kept = q_prime > 0
    labels, q_prime = labels[kept], q_prime[kept]
    own = sdm[kept].gather(1, labels.unsqueeze(1)).squeeze(1).float()  # SDM of the true class
    order = q_prime.argsort(descending=True)
    member = torch.nn.functional.one_hot(labels[order], num_classes)  # (n, C)
    under = member * (own[order] < torch.tensor(alpha, dtype=torch.float32)).unsqueeze(1)
    n, n_under = (
        member.cumsum(0),
        under.cumsum(0),
    )  # over the points with q' at least this one's
    passed = (n >= minimum_points(alpha, conventions)) & (n_under <= quantile_index(n, alpha, conventions))
    # Equal q' enter together, so a candidate is judged at the last of them.
    candidate = q_prime[order]
    last = torch.ones_like(candidate, dtype=torch.bool)
    last[:-1] = candidate[1:] != candidate[:-1]
    found = (passed.all(dim=1) & last).nonzero()
    if len(found) == 0:
        return Region(alpha, math.inf, torch.full((num_classes,), conventions.missing_psi))
    q_prime_min = float(candidate[found[-1]])
    psi = []
    for c in range(num_classes):
        values = own[(labels == c) & (q_prime >= q_prime_min)].sort().values
        psi.append(values[quantile_index(torch.tensor(len(values)), alpha, conventions)])
    return Region(alpha, q_prime_min, torch.stack(psi))
