"""From an engine's hidden state to a reading: batched, off the event loop, within a time limit.

h of every answer that finished meanwhile is measured at once, `measure((n, D))`; the cheap part, admission
at alpha, is done once for each alpha asked for.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch

from candor.app.answering.batching import MicroBatcher
from candor.app.policy import Reading
from candor.engine.base import HiddenSummary, Representation
from candor.sdm.estimator import Estimate, SDMEstimator

Cause = Literal["not_captured", "incomplete", "non_finite", "timeout", "error"]

LARGEST_BATCH = 64
"""Rows measured at once; bounds the memory of the distances, rows x support."""


class ScoringFailed(Exception):
    """An answer could not be scored; it must be called unavailable."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause


@dataclass(frozen=True)
class Neighbour:
    """A support exemplar near an answer. row: in the support. distance: L2 between their h'."""

    row: int
    distance: float


@dataclass(frozen=True)
class Score:
    """neighbours: nearest first."""

    reading: Reading
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class _Query:
    h: torch.Tensor  # (D,)
    alpha: float
    exemplars: int


class Scorer:
    """Scores answers with one estimator."""

    def __init__(self, estimator: SDMEstimator, representation: Representation, timeout_s: float) -> None:
        self._estimator = estimator
        self._representation = representation
        self._timeout_s = timeout_s
        self._batcher = MicroBatcher(self._score_batch, LARGEST_BATCH)

    async def warm_up(self) -> None:
        """Scores nothing in particular, so that what is made at the first comparison, for a large support in seconds,
        is there before the first answer."""
        nothing = torch.zeros(self._estimator.adaptor.input_dim)
        for alpha in self._estimator.regions:
            await self._batcher.submit(_Query(nothing, alpha, exemplars=1))

    async def score(self, hidden: HiddenSummary | None, alpha: float, exemplars: int = 0) -> Score:
        """The score of one answer at a calibrated alpha, with its `exemplars` nearest neighbours.

        Raises ScoringFailed, whatever the reason.
        """
        if hidden is None:
            raise ScoringFailed("not_captured", "the engine gave no hidden state")
        if not hidden.complete:
            raise ScoringFailed("incomplete", "the engine did not count every position")
        try:
            query = _Query(self._vector(hidden), alpha, exemplars)
            score = await asyncio.wait_for(self._batcher.submit(query), self._timeout_s)
        except TimeoutError as error:
            raise ScoringFailed("timeout", f"no score within {self._timeout_s} s") from error
        except Exception as error:
            raise ScoringFailed("error", f"{type(error).__name__}: {error}") from error
        if score is None:
            raise ScoringFailed("non_finite", "the hidden state, or what was made of it, is no finite number")
        return score

    def close(self) -> None:
        self._batcher.close()

    def _vector(self, hidden: HiddenSummary) -> torch.Tensor:
        h = hidden.vector(self._representation)
        expected = (self._estimator.adaptor.input_dim,)
        if h.shape != expected:  # checked alone: in a batch it would spoil the others' scores
            raise ValueError(f"expected h of shape {expected}, got {tuple(h.shape)}")
        return h

    def _score_batch(self, queries: list[_Query]) -> list[Score | None]:
        """None for a state that is not finite: that is no reading of the answer, but a fault of the machine."""
        with torch.inference_mode():
            h = torch.stack([query.h for query in queries])  # (n, D)
            measurement = self._estimator.measure(h)
            rows_of: dict[float, list[int]] = defaultdict(list)
            for row, query in enumerate(queries):
                rows_of[query.alpha].append(row)
            readings: dict[int, Reading] = {}
            for alpha, rows in rows_of.items():
                estimate = self._estimator.judge(measurement, alpha)
                threshold = self._estimator.regions[alpha].q_prime_min
                readings |= {row: read(estimate, row, threshold) for row in rows}
            return [
                Score(readings[row], self._neighbours(query)) if finite else None
                for row, (query, finite) in enumerate(zip(queries, measurement.finite.tolist(), strict=True))
            ]

    def _neighbours(self, query: _Query) -> tuple[Neighbour, ...]:
        if not query.exemplars:
            return ()
        count = min(query.exemplars, len(self._estimator.support))
        squared, rows = self._estimator.nearest(query.h.unsqueeze(0), count)  # (1, count) each
        return tuple(
            Neighbour(row, math.sqrt(distance))
            for distance, row in zip(squared[0].tolist(), rows[0].tolist(), strict=True)
        )


def read(estimate: Estimate, row: int, similarity_threshold: float) -> Reading:
    """One row of an estimate as plain numbers."""
    prediction = int(estimate.y_hat[row])
    z_prime = estimate.z_prime[row]
    others = torch.cat([z_prime[:prediction], z_prime[prediction + 1 :]])
    return Reading(
        prediction=prediction,
        probability=float(estimate.sdm[row, prediction]),
        probability_lower=float(estimate.sdm_lower[row, prediction]),
        probability_upper=float(estimate.sdm_upper[row, prediction]),
        similarity=int(estimate.q[row]),
        rescaled_similarity=float(estimate.q_prime[row]),
        rescaled_similarity_lower=float(estimate.q_prime_lower[row]),
        distance_quantile=float(estimate.d[row]),
        magnitude=float(z_prime[prediction] - others.max()),
        effective_sample_size=tuple(int(size) for size in estimate.effective_sample_size[row]),
        is_ood=bool(estimate.is_ood[row]),
        admitted=bool(estimate.admitted[row]),
        admitted_lower=bool(estimate.admitted_lower[row]),
        similarity_threshold=similarity_threshold,
    )
