"""Compares a bundle with other methods, on the same states, halves, alphas and test rows for all of them.

    halves      which fitted answers the bundle's layer was trained on, and which chose its thresholds
    score       each comparator is fitted on the halves, then judges every set
    figures     the same redraws of rows for all methods, so that differences are paired

Where the policy resamples, all of this is about each prompt's first attempt. Answers that cannot be scored are
admitted by no method and left out of every figure; their number is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from candor.calibration.data import earlier_prompt_digest
from candor.calibration.epochs import LayerSettings
from candor.calibration.errors import DataError
from candor.calibration.fit import standardisation_blocks
from candor.calibration.generate import Labelled, count_faults, scorable
from candor.calibration.ranking import (
    Figure,
    Figures,
    admission,
    answer_order,
    probabilistic,
    ranking,
    redrawn,
    shares,
    summarise,
)
from candor.comparison.comparators import COMPARATORS, REFERENCE, SAMPLERS
from candor.comparison.comparators.base import Fitting, MethodVerdicts, Rows
from candor.model_store.bundle import Bundle
from candor.model_store.manifest import Manifest

TITLES = {name: one.title for name, one in COMPARATORS.items()} | {
    name: one.title for name, one in SAMPLERS.items()
}


@dataclass(frozen=True, eq=False)
class MethodFigures:
    """One method's figures on one set.

    admitted: by alpha, the shares of `ranking.admission`. answers: ranking by confidence that the *answer* is right;
    risk is the share of wrong answers let through. verdicts: ranking by confidence in the *verdict*; risk is wrong
    verdicts; also ECE and Brier for methods with a probability. difference: AURC of both minus the reference's.
    """

    admitted: dict[float, dict[str, Figure]]
    answers: dict[str, Figure]
    verdicts: dict[str, Figure]
    difference: dict[str, Figure]

    def to_json(self) -> dict[str, Any]:
        def plain(figures: Mapping[str, Figure]) -> dict[str, Any]:
            return {name: figure.to_json() for name, figure in figures.items()}

        return {
            "admitted": {str(alpha): plain(figures) for alpha, figures in self.admitted.items()},
            "answers": plain(self.answers),
            "verdicts": plain(self.verdicts),
            "difference": plain(self.difference),
        }


@dataclass(frozen=True, eq=False)
class SetComparison:
    """One set of records: answers that can be scored, their labels y (n,), and verdicts and figures by method.

    faults: answers left out, by reason. cost: tokens read and written per record beyond the answer itself, for
    methods that ask the model again.
    """

    answers: Sequence[Labelled]
    rows: Rows
    y: Tensor
    faults: dict[str, int]
    verdicts: dict[str, MethodVerdicts]
    scores: dict[str, MethodFigures]
    cost: dict[str, dict[str, float]]

    @property
    def records(self) -> int:
        return len(self.answers) + sum(self.faults.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "faults": self.faults,
            "correct": float(self.y.double().mean()),
            "cost": self.cost,
            "methods": {name: scores.to_json() for name, scores in self.scores.items()},
        }


@dataclass(frozen=True, eq=False)
class Comparison:
    """sets: by name, all their records. sampled: a part of each, with the methods that ask the model again."""

    fitting: Fitting
    sets: dict[str, SetComparison]
    sampled: dict[str, SetComparison]

    def to_json(self) -> dict[str, Any]:
        return {
            "alphas": list(self.fitting.alphas),
            "seed": self.fitting.seed,
            "ensemble": self.fitting.ensemble,
            "training_half": len(self.fitting.training),
            "calibration_half": len(self.fitting.calibration),
            "reference": REFERENCE,
            "sets": {name: one.to_json() for name, one in self.sets.items()},
            "sampled": {name: one.to_json() for name, one in self.sampled.items()},
        }


def halves(bundle: Bundle, answers: Sequence[Labelled], seed: int, ensemble: int) -> Fitting:
    """The halves of the bundle's layer among the answers of the file that it was calibrated on.

    Raises DataError where the answers are not those: another file, or a new run with other answers.
    """
    # Bundles older than certificates name only all prompts that were fitted on.
    second = set(bundle.report.get("calibration_prompts", bundle.report["fitted_prompts"]))
    known = {answer.id: answer for answer in scorable(answers)}
    exemplars = {one.id: None for one in bundle.exemplars}
    training = [known[one] for one in exemplars if one in known]
    calibration = [
        one
        for one in known.values()
        if second & {one.prompt_digest, earlier_prompt_digest(one.messages)} and one.id not in exemplars
    ]
    estimator = bundle.estimator
    for half, found, expected in (
        ("training", training, estimator.support.labels.tolist()),
        ("calibration", calibration, estimator.calibration.labels.tolist()),
    ):
        if [answer.label for answer in found] != expected:
            raise DataError(
                f"expected the {len(expected)} answers of the bundle's {half} half with their labels, found "
                f"{len(found)}, and not all the same: give --calibration the file that the bundle was made from, "
                "and --hidden-cache the folder with the answers of that run"
            )
    layer, alphas = layer_settings(bundle.manifest), bundle.manifest.alphas
    return Fitting(estimator, training, calibration, layer, alphas, seed, ensemble, bundle.rule)


def layer_settings(manifest: Manifest) -> LayerSettings:
    """How the bundle's layer was trained."""
    settings = manifest.provenance["settings"]
    return LayerSettings(
        exemplar_dim=settings["exemplar_dim"],
        epochs=settings["epochs"],
        learning_rate=settings["learning_rate"],
        blocks=standardisation_blocks(manifest.representation, manifest.model.hidden_size),
    )


def compare(
    fitting: Fitting,
    sets: Mapping[str, Sequence[Labelled]],
    names: Sequence[str],
    progress: Callable[[str], object],
) -> dict[str, SetComparison]:
    """Fits every named comparator and scores it on every set. progress: called with each method's title."""
    usable = {name: scorable(answers) for name, answers in sets.items()}
    rows = {name: Rows.of(fitting.estimator, answers) for name, answers in usable.items() if answers}
    verdicts: dict[str, dict[str, MethodVerdicts]] = {name: {} for name in rows}
    for method in names:
        scorer = COMPARATORS[method].fit(fitting)
        for name, these in rows.items():
            verdicts[name][method] = scorer(these)
        progress(TITLES[method])
    compared = {}
    for name, these in rows.items():
        y = torch.tensor([answer.label for answer in usable[name]])
        scores = figures(verdicts[name], y, fitting.seed)
        faults = count_faults(sets[name])
        compared[name] = SetComparison(usable[name], these, y, faults, verdicts[name], scores, {})
    return compared


def with_samplers(
    whole: SetComparison,
    ids: Sequence[str],
    more: Mapping[str, MethodVerdicts],
    cost: dict[str, dict[str, float]],
    seed: int,
) -> SetComparison:
    """A part of a set: every method's verdicts on the records `ids`, and in addition those in `more`."""
    places = {answer.id: index for index, answer in enumerate(whole.answers)}
    part = torch.tensor([places[one] for one in ids])
    verdicts = {name: verdicts[part] for name, verdicts in whole.verdicts.items()} | dict(more)
    y = whole.y[part]
    answers = [whole.answers[index] for index in part.tolist()]
    return SetComparison(answers, whole.rows[part], y, {}, verdicts, figures(verdicts, y, seed), cost)


def figures(verdicts: Mapping[str, MethodVerdicts], y: Tensor, seed: int) -> dict[str, MethodFigures]:
    """Figures of every method over the same redraws of the same rows. y: (n,)."""
    answers = {
        name: _ranked(answer_order(one.confidence, one.y_hat), y == 1, seed) for name, one in verdicts.items()
    }
    ranks = {name: _ranked(one.confidence, one.y_hat == y, seed) for name, one in verdicts.items()}
    return {
        name: MethodFigures(
            {
                alpha: shares(admission(admitted, one.y_hat, y), seed)
                for alpha, admitted in one.admitted.items()
            },
            {key: summarise(values) for key, values in answers[name].items()},
            {key: summarise(values) for key, values in {**ranks[name], **_sure(one, y, seed)}.items()},
            {
                view: summarise(found[name]["aurc"] - found[REFERENCE]["aurc"])
                for view, found in (("answers", answers), ("verdicts", ranks))
                if REFERENCE in found
            },
        )
        for name, one in verdicts.items()
    }


def _ranked(confidence: Tensor, right: Tensor, seed: int) -> Figures:
    return redrawn(lambda weights: ranking(weights, confidence, right), len(right), seed)


def _sure(one: MethodVerdicts, y: Tensor, seed: int) -> Figures:
    probability = one.probability
    if probability is None:
        return {}
    return redrawn(
        lambda weights: probabilistic(weights, probability, one.y_hat, one.y_hat == y), len(y), seed
    )
