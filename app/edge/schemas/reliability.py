"""The `reliability` object: the options in a request and the results in a response."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from candor.app.edge.schemas.bounds import FewFields
from candor.app.edge.schemas.bundle import ShownCertificate
from candor.policy.cascade import CascadeCertificate
from candor.policy.decision import Reason, RegionName, RuleFigures


class ReliabilityOptions(FewFields):
    """Unlike in OpenAI's objects, an unknown field is refused: a mistyped `alpha` must not go unnoticed."""

    mode: Literal["annotate", "abstain", "off"] = Field(
        default="annotate",
        description="`annotate` says what is known of an answer, `abstain` also withholds one that is not "
        "reliable, `off` leaves it unchecked.",
    )
    alpha: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Accuracy asked for; one that the bundle was calibrated at.",
    )
    certified: bool | None = Field(
        default=None,
        description="Abstain also from answers that no certificate covers. By default what the server was told; "
        "`false` does not undo that.",
    )
    on_abstain: Literal["refusal", "content", "fallback", "escalate"] | None = Field(
        default=None,
        description="Where the text that replaces a withheld answer stands: `refusal` beside an empty "
        "content, `content` in its place; `fallback` puts the text there that the operator set for this; "
        "`escalate` the answer of the other model that the operator set, or else the refusal. "
        "By default where the operator put it.",
    )
    stream: Literal["optimistic", "buffered"] | None = Field(
        default=None,
        description="`optimistic` sends tokens as they come and decides at the end, `buffered` holds them "
        "until the decision. By default `buffered` in mode `abstain`, else `optimistic`.",
    )
    exemplars: int = Field(
        default=0, ge=0, description="How many of the nearest calibration exemplars to show."
    )
    bundle: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="Digest of the bundle that is to judge. It is a 409 where another answers; so is the header "
        "`x-sdm-bundle`.",
    )


class ShownExemplar(BaseModel):
    """distance: L2 distance between the adaptor's vectors h' of answer and exemplar, >= 0."""

    id: str
    label: int
    prediction: int
    distance: float
    prompt: str
    response: str


class ShownEscalation(BaseModel):
    """Another model gave this answer. The result's other fields speak of the withheld one.

    certified: what was certified of both models together; null: nothing is promised of this answer.
    prompt_tokens, completion_tokens: what it cost there, as that model counts; null where it does not say.
    """

    model: str
    certified: CascadeCertificate | None
    prompt_tokens: int | None
    completion_tokens: int | None


class ReliabilityResult(BaseModel):
    """Everything measured is null where region is `unavailable`, or the prompt was refused before it was answered.

    explanation: a sentence for people.
    probability: that the answer is right, where two gates judge (`rule`); else activation.
    prediction: the SDM layer's class, 1 = follows its instruction.
    activation, probability_lower, probability_upper: SDM(z') of that class, and its band.
    similarity: q. rescaled_similarity: q'. distance_quantile: d.
    magnitude: how far the predicted class's z' is above the others', >= 0.
    effective_sample_size: calibration points behind the estimate, per class.
    rule: both gates' figures, null where the papers' region judges.
    calibrated: whether the request kept to the policy that was calibrated.
    certificate: what was certified of answers like this one, null where nothing was.
    attempts: answers written until this one, where the policy resamples.
    escalated: who gave the answer in place of the withheld one; null where nobody did.
    """

    index: int
    region: RegionName
    abstained: bool
    reason: Reason | None
    explanation: str
    prediction: int | None
    alpha: float
    probability: float | None
    activation: float | None
    probability_lower: float | None
    probability_upper: float | None
    similarity: int | None
    rescaled_similarity: float | None
    distance_quantile: float | None
    magnitude: float | None
    effective_sample_size: list[int] | None
    rule: RuleFigures | None
    calibrated: bool
    certificate: ShownCertificate | None
    attempts: int
    escalated: ShownEscalation | None
    exemplars: list[ShownExemplar]


class ReliabilityObject(BaseModel):
    """One result for each choice, in the order of their index."""

    schema_version: Literal[1] = 1
    results: list[ReliabilityResult]
