"""The quality of a confidence, in the metrics that papers report, each with its bootstrap interval.

A method gives every row a confidence; rows are let through from the highest down. With R_k right and E_k
wrong among the k most confident of n rows (E = E_n, err = E / n),

    AURC      (1/n) sum_k E_k / k                              Geifman and El-Yaniv, 1705.08500
    AURC*     the same with every wrong row last
    E-AURC    AURC - AURC*                                     Geifman et al., 1805.08206
    AUGRC     area under k/n -> E_k / n, trapezoids            Traub et al., 2407.01032
    PRR       (err - AURC) / (err - AURC*)                     Malinin and Gales, 2002.07650; as LM-Polygraph counts
    ROC AUC   P(a right row is more confident than a wrong one), ties one half
    coverage at 5 % risk     the largest k/n with E_k <= 0.05 k that a threshold can reach
    top-label ECE            sum over verdicts and 15 bins of the probability p of |sum of p - right| / n
    Brier                    mean of (p - right)^2             (half of the two-class sum of squares)
    RMS calibration error    root of the mean over rows of (mean p - P(right))^2 of the row's bin, 15 bins of equally
                             many; chance is subtracted        Kumar et al., 1909.10155

Rows of equal confidence count as the mean over all their orders, so that a constant confidence has AURC = err.
The answers' view is the same with "right" = y = 1 and rows ordered by the confidence that y = 1 (`answer_order`).

The bootstrap draws how often each row counts, w (r, n), and every figure is a function of w. Rows are
sorted once for all redraws. Two calls with one n and seed see the same redraws, so differences between
methods are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from candor.calibration.intervals import CONFIDENCE, clopper_pearson

REDRAWS = 1000
RISK = 0.05
BINS = 15
_CHUNK = 2**23  # weights held at once

Figures = dict[str, Tensor]
"""Figures by name, each (r,) float64 over redraws; nan where undefined for a redraw."""


@dataclass(frozen=True)
class Figure:
    """A value and its percentile bootstrap interval; None where undefined.

    hits, of, exact: counts and Clopper-Pearson interval, for shares only. Where nothing was wrong the bootstrap
    interval has no width, so read the exact one.
    """

    value: float | None
    low: float | None
    high: float | None
    hits: int | None = None
    of: int | None = None
    exact: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None or name == "value"}


def ranking(weights: Tensor, confidence: Tensor, right: Tensor) -> Figures:
    """AURC, E-AURC, AUGRC, PRR, ROC AUC and coverage at 5 % risk.

    weights: (r, n) float64, whole numbers that sum to n in each row. confidence: (n,). right: (n,) bool.
    """
    n = weights.shape[1]
    groups = torch.unique(-confidence, return_inverse=True)[1]  # 0: the most confident
    columns = weights.T.contiguous()  # rows are summed into groups many times faster than columns
    zeros = columns.new_zeros(int(groups.max()) + 1, len(weights))
    size = zeros.index_add(0, groups, columns)  # (G, r)
    wrong = zeros.index_add(0, groups, columns * ~right.unsqueeze(1))
    rows, errors = size.cumsum(0), wrong.cumsum(0)  # k and E_k at the end of each group
    rows_before, errors_before = rows - size, errors - wrong
    total = errors[-1]
    harmonic = torch.cat([weights.new_zeros(1), (1 / torch.arange(1, n + 1, dtype=weights.dtype)).cumsum(0)])

    # Within a group E_k = errors_before + rate (k - rows_before), summed over k in closed form.
    rate = torch.where(size > 0, wrong / size.clamp(min=1), 0.0)
    steps = harmonic[rows.long()] - harmonic[rows_before.long()]
    aurc = (rate * size + (errors_before - rate * rows_before) * steps).sum(0) / n
    best = (total - (n - total) * (harmonic[n] - harmonic[(n - total).long()])) / n
    error_rate = total / n
    wins = ((size - wrong) * (total - errors + wrong / 2)).sum(0)
    within_risk = errors <= RISK * rows + 1e-9
    return {
        "aurc": aurc,
        "e_aurc": aurc - best,
        "augrc": (size * (errors_before + errors) / 2).sum(0) / n**2,
        "prr": (error_rate - aurc) / _or_nan(error_rate - best),
        "roc_auc": wins / _or_nan(total * (n - total)),
        "coverage_at_risk": (rows * within_risk).amax(0) / n,
    }


def probabilistic(weights: Tensor, probability: Tensor, y_hat: Tensor, right: Tensor) -> Figures:
    """Top-label ECE and Brier score of the probability that the verdict is right.

    weights: (r, n). probability: (n,) in [0, 1]. y_hat: (n,) verdicts, binned apart. right: (n,) bool.
    """
    off = probability.to(weights) - right.to(weights)
    bins = y_hat * BINS + (probability * BINS).long().clamp(max=BINS - 1)
    sums = weights.new_zeros(len(weights), int(bins.max()) + 1).index_add(1, bins, weights * off)
    total = weights.sum(1)
    return {"top_label_ece": sums.abs().sum(1) / total, "brier": (weights * off**2).sum(1) / total}


def rms_calibration(probability: Tensor, right: Tensor, seed: int) -> tuple[float, float, float]:
    """RMS calibration error of the probability of `right`, and its bootstrap interval: (value, low, high) in [0, 1].

    probability: (n,) in [0, 1]. right: (n,) bool. Between bins' figures, some differ by chance though every
    probability is exact: ECE counts that. A mean's squared distance exceeds the truth's by the mean's variance, which
    is subtracted here. The interval is the pivotal one: in the redraws' world the truth is the sample itself.
    """
    n = len(right)
    order = probability.argsort(stable=True)
    off = (probability.double() - right.double())[order]
    bins = torch.arange(n) * min(BINS, n) // n

    def squares(weights: Tensor) -> Figures:
        def of_bins(rows: Tensor) -> Tensor:
            return rows.new_zeros(len(rows), BINS).index_add(1, bins, rows)

        size, mean, second = of_bins(weights), of_bins(weights * off), of_bins(weights * off**2)
        mean, second = mean / size.clamp(min=1), second / size.clamp(min=1)
        chance = (second - mean**2) / (size - 1).clamp(min=1)
        plain = (size * mean**2).sum(1) / n
        return {"plain": plain, "fair": plain - (size * chance).sum(1) / n}

    found = redrawn(squares, n, seed)
    value = float(found["fair"][0])
    low, high = interval(found["fair"][1:] - found["plain"][0])
    assert low is not None  # nothing is undefined
    assert high is not None
    rms, least, most = (max(0.0, one) ** 0.5 for one in (value, value - high, value - low))
    return rms, least, most


def admission(admitted: Tensor, y_hat: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The shares counted at one alpha: by name, (hits, among), each (n,) bool.

    admitted: share of all rows. answered: admitted with verdict 1, what a client in abstain mode sees.
    marginal, class_c (true class c) and predicted_c (verdict c): accuracy of the verdict among the admitted.
    """
    right = y_hat == y
    among = {
        "marginal": admitted,
        **{f"class_{c}": admitted & (y == c) for c in (0, 1)},
        **{f"predicted_{c}": admitted & (y_hat == c) for c in (0, 1)},
    }
    everyone = torch.ones_like(admitted)
    return {
        "admitted": (admitted, everyone),
        "answered": (admitted & (y_hat == 1), everyone),
        **{name: (right & rows, rows) for name, rows in among.items()},
    }


def answer_order(confidence: Tensor, y_hat: Tensor) -> Tensor:
    """(n,): rises with the confidence that the *answer* is right, from certain 0 to certain 1."""
    positive = confidence - confidence.min() + 1
    return torch.where(y_hat == 1, positive, -positive)


def redrawn(function: Callable[[Tensor], Figures], n: int, seed: int) -> Figures:
    """`function(weights)` over the sample itself (entry 0) and `REDRAWS` redraws of its n rows."""
    parts = [function(weights) for weights in _weights(n, seed)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def summarise(values: Tensor) -> Figure:
    """values: (1 + redraws,), the sample's own figure first; redraws with undefined values are left out."""
    low, high = interval(values[1:])
    return Figure(_plain(values[0]), low, high)


def interval(values: Tensor) -> tuple[float | None, float | None]:
    """The central `CONFIDENCE` interval of the defined redraws."""
    values = values[~values.isnan()]
    if len(values) == 0:
        return None, None
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return low, high


def shares(counted: Mapping[str, tuple[Tensor, Tensor]], seed: int) -> dict[str, Figure]:
    """Each (hits, among) of `admission` as a share with both intervals."""

    def ratios(weights: Tensor) -> Figures:
        return {
            name: (weights @ hits.to(weights)) / _or_nan(weights @ among.to(weights))
            for name, (hits, among) in counted.items()
        }

    n = len(next(iter(counted.values()))[0])
    figures = {}
    for name, values in redrawn(ratios, n, seed).items():
        hits, of = (int(rows.sum()) for rows in counted[name])
        summary = summarise(values)
        exact = clopper_pearson(hits, of) if of else None
        figures[name] = Figure(summary.value, summary.low, summary.high, hits, of, exact)
    return figures


def _weights(n: int, seed: int) -> Iterator[Tensor]:
    yield torch.ones(1, n, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _CHUNK // n)
    for start in range(0, REDRAWS, at_once):
        rows = torch.randint(n, (min(at_once, REDRAWS - start), n), generator=generator)
        zeros = torch.zeros(rows.shape, dtype=torch.float64)
        yield zeros.scatter_add_(1, rows, torch.ones_like(zeros))


def _or_nan(divisor: Tensor) -> Tensor:
    return torch.where(divisor > 1e-12, divisor, torch.nan)


def _plain(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)
