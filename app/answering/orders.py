"""What is to be generated and judged: a request, resolved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from candor.app.edge.schemas.openai import INT64
from candor.engine.base import Sampling

_APART = 2**32
"""Between the seeds of one choice's attempts, so that they meet no other choice's."""


@dataclass(frozen=True)
class Replacement:
    """What a client gets in place of a withheld answer."""

    text: str
    as_refusal: bool


@dataclass(frozen=True)
class Options:
    """A request's reliability options, resolved. replacement: None where nothing is withheld.

    certified: whether answers that no certificate covers are abstained from.
    """

    mode: Literal["annotate", "abstain", "off"]
    alpha: float
    certified: bool
    buffered: bool
    exemplars: int
    replacement: Replacement | None


@dataclass(frozen=True)
class Job:
    """One choice: what the engine is given."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling

    def attempt(self, number: int) -> Job:
        """The same, drawn anew: attempts from 0 on differ, and repeat where the first is seeded."""
        seed = self.sampling.seed
        if seed is None or number == 0:
            return self
        moved = (seed + number * _APART + INT64) % (2 * INT64) - INT64
        return replace(self, sampling=replace(self.sampling, seed=moved))


@dataclass(frozen=True)
class Order:
    """jobs: one per choice, in index order. prompt_tokens: each prompt counted once.

    calibrated: whether the request keeps to the policy, as far as that is known before the answer.
    attempts: most answers written for one choice, until one is reliable; 1 outside the policy.
    """

    jobs: tuple[Job, ...]
    prompt_tokens: int
    calibrated: bool
    options: Options
    attempts: int = 1

    @property
    def tokens(self) -> int:
        """The most it may come to: each answer at its longest, beside its prompt."""
        return sum(len(job.prompt_ids) + job.sampling.max_tokens for job in self.jobs)


@dataclass(frozen=True)
class PairOrder:
    """A given prompt and response to score."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    calibrated: bool
    alpha: float
    certified: bool
    exemplars: int

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)
