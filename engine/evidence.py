"""Evidence: features of the answer's token probabilities, taken in the pass that generates it.

For answer tokens t = 1..T let s_t = -log p(t) be the surprisal under the model (temperature 1) and
m_t = log p(t) - max_{v != t} log p(v) the margin. The features are

    ln(mean s + e), ln(sum s + e), ln(max s + e), mean m, min m, ln T,      e = 1e-4.

The logarithm separates confident answers, whose s is close to 0. A small model's final state alone says little
about correctness; these features say more (docs/log.md), and generation computes the probabilities anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from candor.engine.base import TokenLogprob

TOP = 2
"""Alternatives needed per token, so that they include the best other token."""

FLOOR = 1e-4
"""e: surprisals below it are bfloat16 rounding noise."""


def features(names: Sequence[str], surprisals: Sequence[float], margins: Sequence[float]) -> torch.Tensor:
    """Returns the named features of an answer's tokens, float32 (E,). They are 0 for an answer without tokens."""
    if not names or not surprisals:
        return torch.zeros(len(names))
    count = len(surprisals)
    values = {
        "log_mean_surprisal": math.log(sum(surprisals) / count + FLOOR),
        "log_sum_surprisal": math.log(sum(surprisals) + FLOOR),
        "log_max_surprisal": math.log(max(surprisals) + FLOOR),
        "mean_margin": sum(margins) / count,
        "min_margin": min(margins),
        "log_length": math.log(count),
    }
    return torch.tensor([values[name] for name in names], dtype=torch.float32)


def from_logprobs(names: Sequence[str], tokens: Sequence[TokenLogprob]) -> torch.Tensor:
    """Returns `features` from log-probabilities, with at least `TOP` alternatives for each token."""
    if not names:
        return torch.zeros(0)
    return features(names, [-token.logprob for token in tokens], [_margin(token) for token in tokens])


def of_options(names: Sequence[str], logprobs: Sequence[float]) -> torch.Tensor:
    """Returns `features` of an answer of one token, the likeliest of some options, were it one of them in any case.

    logprobs: of at least two options.
    """
    best, second, *_ = sorted(logprobs, reverse=True)
    total = best + math.log(sum(math.exp(one - best) for one in logprobs))
    return features(names, [total - best], [best - second])


def _margin(token: TokenLogprob) -> float:
    """Log-probability of the token minus the best other one's; negative if another was likelier."""
    return token.logprob - max(logprob for i, _, logprob in token.top if i != token.token_id)
