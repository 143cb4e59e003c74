"""How answers were drawn for calibration, and which of them were complete.

Every sampling parameter is a field of `Sampling`. A field that the policy does not name must have its default value,
so a parameter added later departs from the policy without a change here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from candor.engine.base import Sampling
from candor.policy.conversation import Conversations


@dataclass(frozen=True)
class Policy:
    """How answers are drawn. A request that departs from it is answered, but never called calibrated.

    temperature in [0, 2], top_p in (0, 1], top_k >= 0 (0: all), max_tokens >= 1.
    resample: maximum answers written for one prompt until one lies in the region and is judged right; 1: the
    first is served. A value above 1 needs a temperature above 0.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 128
    resample: int = 1
    conversations: Conversations = field(default_factory=Conversations)

    def __post_init__(self) -> None:
        if not (
            0 <= self.temperature <= 2 and 0 < self.top_p <= 1 and self.top_k >= 0 and self.max_tokens >= 1
        ):
            raise ValueError(
                "temperature must be in [0, 2], top_p in (0, 1], top_k >= 0, max_tokens >= 1; "
                f"got {self.temperature}, {self.top_p}, {self.top_k}, {self.max_tokens}"
            )
        if self.resample < 1 or (self.resample > 1 and self.temperature == 0):
            raise ValueError(
                "resample must be at least 1, and above 1 it needs a temperature above 0, or every try is the same; "
                f"got resample {self.resample}, temperature {self.temperature}"
            )

    def sampling(self, **wishes: Any) -> Sampling:
        """Returns the policy's sampling with these fields of `Sampling` replaced; None keeps the policy's value."""
        drawn = Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            grammar=self.conversations.grammar,
        )
        return replace(drawn, **{name: wish for name, wish in wishes.items() if wish is not None})

    def draws(self, sampling: Sampling) -> bool:
        """Returns whether answers drawn with `sampling` come from the calibrated distribution.

        A seed picks a draw and does not change the distribution. Log-probabilities only report it. Length and stop
        strings count only if they cut an answer (`completed`). At temperature 0, top_p and top_k have no effect.
        """
        kept = replace(sampling, seed=None, logprobs=None, stop=(), max_tokens=self.max_tokens)
        if sampling.temperature == 0:
            kept = replace(kept, top_p=self.top_p, top_k=self.top_k)
        return kept == self.sampling()

    def completed(self, tokens: int, *, ended: bool) -> bool:
        """Returns whether calibration could have seen an answer of so many tokens. ended: it ended on its own."""
        return ended and tokens <= self.max_tokens

    def given(self, response: str, response_ids: Sequence[int], tag: str) -> str | None:
        """Returns why the served model could not have written a given response; None if it could."""
        if tag in response:
            return f"it holds the tag {tag}, where an answer of the model ends"
        if not self.completed(len(response_ids), ended=True):
            return f"it has {len(response_ids)} tokens, and answers have at most {self.max_tokens}"
        return None
