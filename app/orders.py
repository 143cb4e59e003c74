"""What is to be generated and judged: a request, resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.base import Sampling


@dataclass(frozen=True)
class Replacement:
    """What a client gets in place of a withheld answer."""

    text: str
    as_refusal: bool


@dataclass(frozen=True)
class Options:
    """A request's reliability options, resolved. replacement: None where nothing is withheld."""

    mode: Literal["annotate", "abstain", "off"]
    alpha: float
    buffered: bool
    exemplars: int
    replacement: Replacement | None


@dataclass(frozen=True)
class Job:
    """One choice: what the engine is given."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True)
class Order:
    """jobs: one per choice, in index order. prompt_tokens: each prompt counted once.

    calibrated: whether the request keeps to the policy, as far as that is known before the answer.
    """

    jobs: tuple[Job, ...]
    prompt_tokens: int
    calibrated: bool
    options: Options


@dataclass(frozen=True)
class PairOrder:
    """A given prompt and response to score."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    calibrated: bool
    alpha: float
    exemplars: int
