"""What is chosen of a two-gate rule before it is fitted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

VIEWS = {
    "evidence": ("evidence",),
    "last": ("last", "evidence"),
    "all": ("mean", "last", "evidence"),
    "prompt": ("prompt", "evidence"),
}
"""The prompt's states show that an instruction was changed by a word, once such records are fitted on; the
answer's states hardly do."""
SUM_WITH_LAYER = "sum with the layer's"
SCORES = (*VIEWS, "sum", "margin", "logit", SUM_WITH_LAYER, "stack")
"""Names of all candidates; which of them there are depends on the representation."""


@dataclass(frozen=True)
class RuleSettings:
    """eps: share of prompts of the calibrated kind that the gate may refuse, with confidence 1 - delta over draws of
    the reference. components: largest k of `sdm.gate`. folds: of the cross-validation. score: the name of a candidate
    to use whatever its AURC. may_lose: share of the answers let through that may be lost because they are not begun
    (`calibration.forecast`), with confidence 1 - delta; None: all are begun.

    Raises ValueError out of range.
    """

    eps: float = 0.02
    delta: float = 0.05
    components: int = 64
    folds: int = 5
    seed: int = 0
    score: str | None = None
    may_lose: float | None = None

    def __post_init__(self) -> None:
        if self.score not in (None, *SCORES):
            raise ValueError(f"no score is named {self.score!r}; there are {', '.join(SCORES)}")
        if not (0 < self.eps < 1 and 0 < self.delta < 0.5 and self.components >= 1 and self.folds >= 2):
            raise ValueError(
                "expected eps, the share that the gate may refuse, in (0, 1), delta in (0, 0.5), components >= 1 and "
                f"folds >= 2; got {self.eps}, {self.delta}, {self.components}, {self.folds}"
            )

        if self.may_lose is not None and not 0 < self.may_lose < 1:
            raise ValueError(f"the share that may be lost must be in (0, 1), got {self.may_lose}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
