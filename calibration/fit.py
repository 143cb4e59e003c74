"""Fits an estimator to labelled answers. The parts of the data are used as follows.

    fitting part    J times anew: training half      weights, support
                                  calibration half   best epoch and round, distances, Algorithm 1
    held-out part   not used here: it only reports (`calibration.evaluate`)

Halves are split by prompt and label (`calibration.splits`), so that no prompt is in both. A round is a new
split and new weights. The lowest balanced calibration loss over all epochs of all rounds wins, the later one
on ties (arXiv 2509.12760, section 3; `calibration.layer`). As many rounds as there are cores run in parallel. Layers
are fitted on each prompt's first attempt; where the policy resamples, regions come from running the policy
(`calibration.served`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import inf
from threading import Event, Lock
from typing import Any

import torch

from candor.calibration.errors import CalibrationError, DataError
from candor.calibration.generate import Labelled, count_faults, scorable
from candor.calibration.layer import LayerSettings, TrainedLayer, train_layer
from candor.calibration.served import Attempts, regions_of_policy
from candor.calibration.splits import draw, split
from candor.engine.base import Representation
from candor.sdm.adaptor import Block
from candor.sdm.conventions import DEFAULT
from candor.sdm.estimator import SDMEstimator
from candor.sdm.region import minimum_points

NUM_CLASSES = 2


@dataclass(frozen=True)
class FitSettings:
    """alphas: target accuracies, each in (0.5, 1). rounds: J. exemplar_dim: M. passed_over: how many invalid
    neighbours do not end q (`sdm.similarity`). The rest is as in the papers.

    Raises ValueError for values outside their range.
    """

    alphas: tuple[float, ...]
    rounds: int = 10
    epochs: int = 200
    exemplar_dim: int = 1000
    learning_rate: float = 1e-5
    seed: int = 0
    passed_over: int = 0

    def __post_init__(self) -> None:
        if not self.alphas or not all(0.5 < alpha < 1 for alpha in self.alphas):
            raise ValueError(
                f"alpha is the target accuracy, between 0.5 and 1, e.g. 0.95; got {list(self.alphas)} "
                "(at 1 no number of records gives a region)"
            )
        if self.passed_over < 0:
            raise ValueError(f"passed_over must be at least 0, got {self.passed_over}")
        if min(self.rounds, self.epochs, self.exemplar_dim) < 1 or not 0 < self.learning_rate < inf:
            raise ValueError(
                "rounds, epochs and exemplar_dim must be at least 1 and the learning rate positive; got "
                f"{self.rounds}, {self.epochs}, {self.exemplar_dim}, {self.learning_rate}"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"alphas": list(self.alphas)}


@dataclass(frozen=True)
class ChosenEpoch:
    """The epoch that was kept: round from 0, epoch from 1, and every round's lowest balanced loss."""

    round: int
    epoch: int
    losses: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {"best_round": self.round, "best_epoch": self.epoch, "losses": list(self.losses)}


@dataclass(frozen=True, eq=False)
class Fitted:
    """training, calibration: the halves of the winning round; training is in the support's order."""

    estimator: SDMEstimator
    training: list[Labelled]
    calibration: list[Labelled]
    chosen: ChosenEpoch

    @property
    def answers(self) -> list[Labelled]:
        return self.training + self.calibration


def standardisation_blocks(representation: Representation, hidden_size: int) -> tuple[Block, ...]:
    """How h is standardised: by the papers' two scalars over all of it, or by block where h holds evidence.

    Two scalars over a thousand state entries would make a few evidence features negligible.
    """
    sizes = representation.block_sizes(hidden_size)
    if not representation.evidence:
        return ((sum(sizes), "scalar"),)
    return tuple(
        (size, "feature" if part == "evidence" else "scalar")
        for part, size in zip(representation.order, sizes, strict=True)
    )


def set_aside(answers: Sequence[Labelled], share: float, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """(fitting part, held-out part), stratified by label; no prompt is in both."""
    fitting, held_out = _deal(answers, (1 - share, share), seed)
    return fitting, held_out


def set_aside_for_certification(
    answers: Sequence[Labelled], share: float, seed: int
) -> tuple[list[Labelled], list[Labelled]]:
    """(rest, certification part); the certification prompts are drawn at random, whatever their labels."""
    rest, drawn = draw([answer.prompt_digest for answer in answers], share, seed)
    return [answers[i] for i in rest.tolist()], [answers[i] for i in drawn.tolist()]


def fit(
    answers: Sequence[Labelled],
    blocks: tuple[Block, ...],
    settings: FitSettings,
    progress: Callable[[int], object],
) -> Fitted:
    """Fits `settings.rounds` layers and returns the best, with regions at every alpha. It is deterministic.

    answers: the fitting part; those with a fault are left out. progress: called with 1 for each epoch done, from
    other threads, one at a time.
    Raises DataError where a class has too few prompts for a region at any alpha; CalibrationError where
    training diverges.
    """
    usable = scorable(answers)
    _require_enough(answers, usable, min(settings.alphas))
    layer_settings = LayerSettings(
        exemplar_dim=settings.exemplar_dim,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        blocks=blocks,
    )

    stopped, telling = Event(), Lock()

    def epoch_done(_epoch: int, _loss: float) -> None:
        if stopped.is_set():
            raise _Stopped
        with telling:
            progress(1)

    def round_(number: int, seed: int) -> tuple[TrainedLayer, list[Labelled], list[Labelled], int]:
        training, calibration = _deal(usable, (0.5, 0.5), seed)
        try:
            layer = train_layer(
                *_tensors(training),
                *_tensors(calibration),
                num_classes=NUM_CLASSES,
                generator=torch.Generator().manual_seed(seed),
                alphas=settings.alphas,
                settings=layer_settings,
                conventions=replace(DEFAULT, passed_over=settings.passed_over),
                progress=epoch_done,
            )
        except ValueError as error:
            raise CalibrationError(
                f"round {number} cannot be trained: {error}. Where values grew beyond bounds, "
                "lower --learning-rate; where a half lacks a class, add prompts of it."
            ) from error
        return layer, training, calibration, number

    cores = len(os.sched_getaffinity(0))
    with _one_thread_each(), ThreadPoolExecutor(min(settings.rounds, cores)) as pool:
        try:
            seeds = _seeds(settings.seed, settings.rounds)
            rounds = list(pool.map(round_, range(settings.rounds), seeds))
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    losses = tuple(one[0].loss for one in rounds)
    best = min(reversed(rounds), key=lambda one: one[0].loss)  # the later of equals
    layer, training, calibration, number = best
    estimator = layer.estimator
    if calibration[0].more:  # the layer is about single attempts, the region about what is served
        regions = regions_of_policy(estimator, Attempts.measure(estimator, calibration))
        estimator = replace(estimator, regions=regions)
    return Fitted(estimator, training, calibration, ChosenEpoch(number, layer.best_epoch, losses))


class _Stopped(Exception):
    """Ends a round whose result is no longer needed."""


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Sets one thread a round. Parallel rounds on one thread each are faster than rounds in turn on all threads, as
    a round's products are small; and sums do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _deal(answers: Sequence[Labelled], shares: tuple[float, float], seed: int) -> list[list[Labelled]]:
    parts = split(
        [answer.prompt_digest for answer in answers], [answer.label for answer in answers], shares, seed
    )
    return [[answers[index] for index in part.tolist()] for part in parts]


def _seeds(seed: int, count: int) -> list[int]:
    """Seeds of the rounds. They differ from each other and from those of a run with a neighbouring seed."""
    drawn: list[int] = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return drawn


def _tensors(answers: Sequence[Labelled]) -> tuple[torch.Tensor, torch.Tensor]:
    """h (n, D) and y (n,)."""
    return torch.stack([answer.h for answer in answers]), torch.tensor([answer.label for answer in answers])


def _require_enough(answers: Sequence[Labelled], usable: Sequence[Labelled], alpha: float) -> None:
    """Each class needs, in a calibration half, the points that Algorithm 1 requires at the lowest alpha."""
    # Counts prompts, not records: records of one prompt are in the same half and not independent.
    prompts = Counter(label for _, label in {(answer.prompt_digest, answer.label) for answer in usable})
    needed = 2 * minimum_points(alpha)
    if min(prompts[0], prompts[1]) >= needed:
        return
    faults = ", ".join(f"{count} {fault}" for fault, count in count_faults(answers).items()) or "none"
    found = f"{prompts[1]} prompts answered right and {prompts[0]} answered wrong (answers dropped: {faults})"
    if prompts[0] == 0 or prompts[1] == 0:
        raise DataError(
            f"expected both right and wrong answers to fit on, got {found}. "
            "Check references and verifiers; if they are as meant, add harder or easier records."
        )
    raise DataError(
        f"expected at least {needed} prompts of each kind to fit on, since a region at alpha = {alpha} takes half "
        f"as many; got {found}. Add records, above all of the rarer kind, or lower alpha."
    )
