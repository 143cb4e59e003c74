"""The certificates of a cascade: what a client gets where withheld prompts are put to another model, the upstream.

    answered    let through by the two gates at alpha, or withheld and then answered by the upstream
    shown       P(right | answered) >= lower_bound,  P(asked of the upstream) <= escalated_at_most

Each holds with probability at least `confidence` over draws of the certification records, by itself, for prompts
drawn one by one as those were. Accuracies of the two models apart do not tell the cascade's: the gates choose what
is withheld, and that is what the upstream finds hard or easy. `calibration.cascade` computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True)
class CascadeCertificate:
    """What was certified of the cascade at alpha, the accuracy at which the gates serve.

    records: prompts set aside. escalated: those of them that the gates withheld. answered: by either model. right:
    rightly. lower_bound: for P(right | answered); escalated_at_most: for the share withheld; both at `confidence`.

    Raises ValueError if counts and bounds do not agree.
    """

    alpha: float
    confidence: float
    records: int
    escalated: int
    escalated_at_most: float
    answered: int
    right: int
    lower_bound: float

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must be in [0.5, 1), got {self.confidence}")
        let_through = self.records - self.escalated
        if not (0 <= let_through <= self.answered <= self.records and 0 <= self.right <= self.answered):
            raise ValueError(
                "expected right <= answered <= records, and answered of at least those not escalated; got "
                f"{self.right}, {self.answered}, {self.records}, and {self.escalated} escalated"
            )
        if self.answered == 0:
            raise ValueError("nothing was answered, so nothing is certified")
        if not 0 <= self.lower_bound <= self.right / self.answered:
            raise ValueError(f"{self.right} of {self.answered} do not show {self.lower_bound}")
        if not self.escalated / self.records <= self.escalated_at_most <= 1:
            raise ValueError(f"{self.escalated} of {self.records} do not show {self.escalated_at_most}")


@dataclass(frozen=True)
class CascadeTerms:
    """A certified cascade. model: the upstream's, by the name that it is asked by. max_tokens: asked of it.

    prompt_tokens, completion_tokens: mean cost of one answer of the upstream's, by its own count; None where it does
    not say. certificates: at most one for each alpha.

    Raises ValueError for values out of range, and for two certificates at one alpha.
    """

    model: str
    max_tokens: int
    prompt_tokens: float | None
    completion_tokens: float | None
    certificates: tuple[CascadeCertificate, ...] = ()

    def __post_init__(self) -> None:
        if not self.model.strip() or self.max_tokens < 1:
            raise ValueError(
                f"expected a model and max_tokens of at least 1, got {self.model!r}, {self.max_tokens}"
            )
        for tokens in (self.prompt_tokens, self.completion_tokens):
            if tokens is not None and not (isfinite(tokens) and tokens >= 0):
                raise ValueError(f"tokens must be at least 0, got {tokens}")
        if len({one.alpha for one in self.certificates}) < len(self.certificates):
            raise ValueError("expected at most one certificate for each alpha")

    def covering(
        self, model: str, alpha: float, max_tokens: int, *, calibrated: bool
    ) -> CascadeCertificate | None:
        """Returns what is certified of an answer by this upstream; None if it is asked otherwise than was calibrated.

        calibrated: whether the request keeps to the policy.
        """
        if not calibrated or (model, max_tokens) != (self.model, self.max_tokens):
            return None
        return next((one for one in self.certificates if one.alpha == alpha), None)
