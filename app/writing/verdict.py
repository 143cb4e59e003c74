"""The verdict on one answer, and how it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from candor.app.answering.scoring import Neighbour
from candor.app.edge.schemas.bundle import ShownCertificate
from candor.app.edge.schemas.reliability import Reliability, ReliabilityResult, ShownExemplar
from candor.app.policy import Decision, Reading
from candor.model_store.bundle import Exemplar

_MEASURED = (
    "prediction",
    "probability",
    "probability_lower",
    "probability_upper",
    "similarity",
    "rescaled_similarity",
    "distance_quantile",
    "magnitude",
    "effective_sample_size",
)
"""What a reading and a result have in common."""


@dataclass(frozen=True)
class Verdict:
    """reading: None iff the region is unavailable. exemplars: the nearest first, with where they lie.

    attempts: how many answers were written, of which this is the last.
    """

    decision: Decision
    reading: Reading | None
    calibrated: bool
    alpha: float
    exemplars: tuple[tuple[Exemplar, Neighbour], ...] = ()
    attempts: int = 1

    def shown(self, index: int) -> ReliabilityResult:
        """As a client sees it, for the choice of that index."""
        measured: dict[str, Any] = {name: getattr(self.reading, name, None) for name in _MEASURED}
        certificate = self.decision.certificate
        return ReliabilityResult(
            index=index,
            region=self.decision.region,
            abstained=self.decision.abstained,
            reason=self.decision.reason,
            alpha=self.alpha,
            **measured,
            calibrated=self.calibrated,
            certificate=None if certificate is None else ShownCertificate(**asdict(certificate)),
            attempts=self.attempts,
            exemplars=[
                ShownExemplar(
                    id=exemplar.id,
                    label=exemplar.label,
                    prediction=exemplar.prediction,
                    distance=neighbour.distance,
                    prompt=exemplar.prompt,
                    response=exemplar.response,
                )
                for exemplar, neighbour in self.exemplars
            ],
        )


def reliability(verdicts: list[tuple[int, Verdict]]) -> Reliability:
    """The top-level object for the choices of these indices."""
    return Reliability(results=[verdict.shown(index) for index, verdict in verdicts])
