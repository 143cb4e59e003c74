"""Confidence intervals: exact binomial ones for shares, and the bootstrap where no exact one exists.

Clopper and Pearson (1934): with k hits in n draws, the interval holds every p that the tests do not reject,

    low : P(X >= k | p) = tail        high : P(X <= k | p) = tail,        tail = (1 - confidence) / 2,

so it covers the true share with at least the stated confidence, however small n is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import log, log1p, nan

import torch

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """k of n, with its exact interval; value, low and high are None where n = 0."""

    hits: int
    of: int
    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def count(cls, hits: torch.Tensor) -> Share:
        """The share of True in a boolean vector."""
        return cls.from_counts(int(hits.sum()), hits.numel())

    @classmethod
    def from_counts(cls, hits: int, of: int) -> Share:
        if of == 0:
            return cls(hits, of, None, None, None)
        low, high = clopper_pearson(hits, of)
        return cls(hits, of, hits / of, low, high)

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)


def clopper_pearson(hits: int, of: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Two-sided exact interval for a binomial probability, to 1e-12. Needs 0 <= hits <= of, of > 0."""
    if not 0 <= hits <= of or of == 0:
        raise ValueError(f"expected 0 <= hits <= of and of > 0, got {hits} of {of}")
    tail = (1 - confidence) / 2
    # P(X <= hits) falls with p; P(X >= hits) = 1 - P(X <= hits - 1) rises.
    low = 0.0 if hits == 0 else _solve(lambda p: 1 - binomial_cdf(hits - 1, of, p) - tail)
    high = 1.0 if hits == of else _solve(lambda p: tail - binomial_cdf(hits, of, p))
    return low, high


def lower_bound(hits: int, of: int, delta: float) -> float:
    """One-sided bound: the true probability is at least this with confidence 1 - delta, delta in (0, 0.5)."""
    low, _ = clopper_pearson(hits, of, confidence=1 - 2 * delta)
    return low


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) for X ~ Binomial(n, p), 0 < p < 1."""
    return 1 - float(binomial_tails(n, p)[k + 1])


def binomial_tails(n: int, p: float) -> torch.Tensor:
    """P(X >= k) for k = 0, ..., n + 1, the last is 0: (n + 2,) float64. Uses logarithms so that no term overflows."""
    i, log_choose = _log_choose(n)
    terms = (log_choose + i * log(p) + (n - i) * log1p(-p)).exp()
    return torch.nn.functional.pad(terms.flip(0).cumsum(0).flip(0).clamp(max=1), (0, 1))


@lru_cache(maxsize=16)
def _log_choose(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k = 0, ..., n and ln(n choose k), both (n + 1,) float64. Cached, since a bound needs many p at one n."""
    k = torch.arange(n + 1, dtype=torch.float64)
    return k, torch.lgamma(torch.tensor(n + 1, dtype=torch.float64)) - torch.lgamma(k + 1) - torch.lgamma(
        n - k + 1
    )


def bootstrap(statistic: Callable[[torch.Tensor], float], n: int, seed: int) -> tuple[float, float]:
    """Percentile interval (at `CONFIDENCE`) of `statistic(indices)` over 1,000 redraws of n records.

    `statistic` may return nan for a redraw in which it is undefined; such redraws are left out.
    Returns (nan, nan) where none is left.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(1000)]
    values = torch.tensor(draws, dtype=torch.float64)
    values = values[~values.isnan()]
    if len(values) == 0:
        return nan, nan
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _solve(rising: Callable[[float], float]) -> float:
    """Root in (0, 1) of a rising function, by bisection."""
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
