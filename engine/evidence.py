"""The generation's evidence: what the answer's own token probabilities say of it, in the same pass.

For answer tokens t = 1..T with log-probability l_t under the model (temperature 1) and margin
m_t = l_t - max_{v != token t} log p(v): mean, sum and least l_t, mean and least m_t, and ln T.
A small model's final state alone says little of correctness; these few numbers say more
(docs/log.md), and they cost nothing that generation has not paid already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from engine.base import TokenLogprob

TOP = 2
"""Alternatives needed per token, so that the best other token is among them."""


def from_logprobs(names: Sequence[str], tokens: Sequence[TokenLogprob]) -> torch.Tensor:
    """The named features, float32 (E,). An answer without tokens has 0 for each."""
    if not names or not tokens:
        return torch.zeros(len(names))
    logprobs = [token.logprob for token in tokens]
    margins = [_margin(token) for token in tokens]
    values = {
        "mean_logprob": sum(logprobs) / len(tokens),
        "sum_logprob": sum(logprobs),
        "min_logprob": min(logprobs),
        "mean_margin": sum(margins) / len(tokens),
        "min_margin": min(margins),
        "length": math.log(len(tokens)),
    }
    return torch.tensor([values[name] for name in names], dtype=torch.float32)


def _margin(token: TokenLogprob) -> float:
    """How far the token leads the best other one; negative where another was likelier."""
    return token.logprob - max(logprob for i, _, logprob in token.top if i != token.token_id)
