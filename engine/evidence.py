"""The generation's evidence: what the answer's own token probabilities say of it, in the same pass.

For answer tokens t = 1..T let s_t = -log p(t) be the surprisal under the model (temperature 1) and
m_t = log p(t) - max_{v != t} log p(v) the margin. The features:

    ln(mean s + e), ln(sum s + e), ln(max s + e), mean m, min m, ln T,      e = 1e-4.

Logarithms, because the sure answers crowd near s = 0, and they are the ones to be told apart. A small model's final
state alone says little of correctness; these few numbers say more (docs/log.md), and generation has paid
for them already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from candor.engine.base import TokenLogprob

TOP = 2
"""Alternatives needed per token, so that the best other token is among them."""

FLOOR = 1e-4
"""e: surprisals below it are bfloat16's noise."""


def features(names: Sequence[str], surprisals: Sequence[float], margins: Sequence[float]) -> torch.Tensor:
    """The named ones, float32 (E,), of an answer's tokens. An answer without tokens has 0 for each."""
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
    """The same from log-probabilities, with at least `TOP` alternatives for each token."""
    if not names:
        return torch.zeros(0)
    return features(names, [-token.logprob for token in tokens], [_margin(token) for token in tokens])


def _margin(token: TokenLogprob) -> float:
    """How far the token leads the best other one; negative where another was likelier."""
    return token.logprob - max(logprob for i, _, logprob in token.top if i != token.token_id)
