"""What goes into the store, what comes back, and what can fail.

Inside, a record is a plain dict of a table's columns, so that the spool can hold it as a line of JSON.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:  # commands that read the store need no torch
    import torch

    from candor.engine.base import HiddenSummary, PromptStates, Representation
    from candor.policy.certificate import RuleKind
    from candor.policy.decision import RegionName, Verdict

Row = dict[str, Any]


class StoreError(Exception):
    """The store cannot be used; the message says what to do."""


class StoreUnavailable(Exception):
    """The store cannot be read now."""


class NoSuchAnswer(Exception):
    """A label refers to an answer, or an index, that the store does not have."""


class LabelNotKept(Exception):
    """A label could not be stored, and was not acknowledged."""


class Draw(NamedTuple):
    """Whether an answer is to be audited. probability: with which it was drawn, fixed before its label is known.
    least: the least that it could have been, known before the answer."""

    probability: float
    least: float
    drawn: bool


NEVER = Draw(0.0, 0.0, False)


@dataclass(frozen=True, eq=False)
class Content:
    """Texts and states of an answer. conversation: turns, or a plain prompt; as JSON has it, where a request says it
    otherwise. hidden, prompt: None if not known."""

    conversation: Any
    answer: str
    hidden: HiddenSummary | None
    prompt: PromptStates | None
    representation: Representation

    def states(self) -> Row:
        """Returns h and the prompt's states as float32 bytes; None for what is missing or not whole."""
        hidden, prompt = self.hidden, self.prompt
        return {
            "h": _bytes(hidden.vector(self.representation)) if hidden and hidden.complete else None,
            "prompt_states": _bytes(prompt.vector()) if prompt and prompt.complete else None,
        }


@dataclass(frozen=True, eq=False)
class GivenVerdict:
    """A verdict that was sent. id: of the response. index: of the choice. bundle: digest of the judging bundle.

    kind: an answer of ours; one that was withheld and that another model answered, so that a client's thumb is not on
    ours; or a pair that the client brought, which is no sample of anything. time: Unix, s.
    """

    id: str
    index: int
    verdict: Verdict
    bundle: str
    model: str = ""
    rule: RuleKind = "sdm"
    caller: str = "anyone"
    kind: Literal["answer", "escalated", "pair"] = "answer"
    content: Content | None = None
    time: float = field(default_factory=time.time)

    def row(self, draw: Draw) -> Row:
        """Returns its row of the table `verdicts`."""
        verdict = self.verdict
        certificate, figures, gates = verdict.certificate, verdict.figures, verdict.rule
        return {
            "id": self.id,
            "choice": self.index,
            "time": self.time,
            "kind": self.kind,
            "model": self.model,
            "bundle": self.bundle,
            "rule": self.rule,
            "estimator": getattr(certificate, "estimator", None),
            "alpha": verdict.alpha,
            "region": verdict.region,
            "reason": verdict.reason,
            "abstained": verdict.abstained,
            "calibrated": verdict.calibrated,
            "covered": certificate is not None,
            "accuracy": certificate and certificate.accuracy,
            "confidence": certificate and certificate.confidence,
            "probability": verdict.probability,
            "score": gates and gates.score,
            "prompt_p_value": gates and gates.prompt_p_value,
            "prediction": figures and figures.prediction,
            "sdm_probability": figures and figures.probability,
            "similarity": figures and figures.similarity,
            "rescaled_similarity": figures and figures.rescaled_similarity,
            "distance_quantile": figures and figures.distance_quantile,
            "caller": self.caller,
            "audit_probability": draw.probability,
            "audit_least": draw.least,
            "drawn": draw.drawn,
        }


@dataclass(frozen=True)
class Feedback:
    """A client's thumb. correct: whether the answer follows its instruction. caller: name of the key that sent it."""

    id: str
    index: int
    correct: bool
    comment: str | None
    caller: str
    time: float = field(default_factory=time.time)

    def row(self) -> Row:
        return {
            "id": self.id,
            "choice": self.index,
            "time": self.time,
            "correct": self.correct,
            "comment": self.comment,
            "caller": self.caller,
        }


@dataclass(frozen=True)
class Label:
    """What a reviewer said of an answer. correct: None if he cannot tell. answer: what he would answer himself."""

    id: str
    index: int
    correct: bool | None
    reviewer: str
    comment: str | None = None
    answer: str | None = None
    time: float = field(default_factory=time.time)

    def row(self) -> Row:
        return {
            "id": self.id,
            "choice": self.index,
            "reviewer": self.reviewer,
            "time": self.time,
            "correct": self.correct,
            "comment": self.comment,
            "answer": self.answer,
        }


@dataclass(frozen=True)
class Dispute:
    """A shadowing bundle decides otherwise on an answer. bundle: its digest. Whoever reviews looks at such first."""

    id: str
    index: int
    bundle: str

    def row(self) -> Row:
        return {"id": self.id, "choice": self.index, "disputed_by": self.bundle}


Outcome = Literal["recorded", "unchanged", "replaced"]


class LabelledVerdict(NamedTuple):
    """What a label's receipt says of the verdict that it refers to."""

    region: RegionName
    bundle: str
    abstained: bool
    covered: bool


@dataclass(frozen=True)
class Receipt:
    """The outcome of a label: it is new, unchanged, or replaces an earlier one of the same kind (and reviewer)."""

    judged: LabelledVerdict
    outcome: Outcome


def plain(row: Row) -> Row:
    """Returns the row with its texts as every database takes them: no NUL, no half surrogate."""
    return {
        name: value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
        if isinstance(value, str)
        else value
        for name, value in row.items()
    }


def _bytes(states: torch.Tensor) -> bytes:
    return states.detach().float().cpu().numpy().astype("<f4").tobytes()
