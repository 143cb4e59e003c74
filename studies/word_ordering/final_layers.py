"""The final SDM layer of a row, four ways, and what each admits of the row's own answers.

documents   the papers': h, on right answers and wrong ones shown by a coin, the model's own wrong
            answer where it has one, else the static negative (arXiv 2510.26183, section 4)
answers     h, on the model's own answers to the calibration prompts, as `candor calibrate` does
evidence    the same with the generation's evidence beside h
last        the state at the tag and the evidence alone (docs/results/ablation.md)

Which records fall into which half decides much of the region at these sizes, so each is fitted on three deals and
the deal in the middle by its share admitted in distribution is shown, beside all three shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from candor.calibration.data import Record
from candor.calibration.errors import CalibrationError
from candor.calibration.evaluate import auroc
from candor.calibration.fit import FitSettings, fit, standardisation_blocks
from candor.calibration.generate import Labelled
from candor.calibration.intervals import Share
from candor.engine.base import EVIDENCE, Representation
from candor.finetune.encoding import TAG, parse
from candor.sdm.estimator import SDMEstimator
from studies.word_ordering.answers import REPRESENTATION, Answers

ALPHAS = (0.9, 0.95)
DEALS = 3
SETTINGS = FitSettings(ALPHAS, rounds=3, epochs=100, exemplar_dim=256, learning_rate=1e-4)


def final_layers(answers: Answers, records: dict[str, list[Record]]) -> dict[str, Any]:
    """Figures of every layer on every set, as plain JSON values."""
    result: dict[str, Any] = {
        "accuracy": {name: _accuracy(own, records[name]) for name, own in answers.own.items()},
        "layers": {},
    }
    hidden = (answers.own["test"][0].h.numel() - len(EVIDENCE)) // 2
    for layer, (fitted_on, representation) in {
        "documents": (answers.documents, Representation()),
        "answers": (answers.own["calibration"], Representation()),
        "evidence": (answers.own["calibration"], REPRESENTATION),
        "last": (answers.own["calibration"], Representation(order=("last", "evidence"), evidence=EVIDENCE)),
    }.items():
        blocks = standardisation_blocks(representation, hidden)
        fitted_on = [_reduced(answer, representation) for answer in fitted_on]
        judged = {
            name: [_reduced(answer, representation) for answer in own]
            for name, own in answers.own.items()
            if name != "calibration"
        }
        try:
            deals = [
                fit(fitted_on, blocks, replace(SETTINGS, seed=seed), lambda _: None) for seed in range(DEALS)
            ]
        except CalibrationError as error:
            result["layers"][layer] = {"failed": str(error)}
            continue
        result["layers"][layer] = _middle(
            [{name: judge(fitted.estimator, own) for name, own in judged.items()} for fitted in deals]
        )
    return result


def _middle(deals: list[dict[str, Any]]) -> dict[str, Any]:
    """The deal in the middle; in each reading "deals", how many each deal admits, ascending."""
    deals.sort(key=lambda figures: figures["test"][f"plain {ALPHAS[0]}"]["admitted"][0])
    middle = deals[len(deals) // 2]
    for name, figures in middle.items():
        for reading in (reading for reading in figures if reading.startswith(("plain", "lower"))):
            figures[reading]["deals"] = sorted(deal[name][reading]["admitted"][0] for deal in deals)
    return middle


def judge(estimator: SDMEstimator, own: Sequence[Labelled]) -> dict[str, Any]:
    """The papers' tables of one set: by alpha, for the plain region (theirs) and the lower one (served)."""
    h = torch.stack([answer.h for answer in own])
    unscored = torch.tensor([answer.fault is not None for answer in own])
    h[unscored] = torch.nan  # never admitted
    y = torch.tensor([answer.label for answer in own])
    seen = estimator.measure(h)
    figures: dict[str, Any] = {}
    for alpha in ALPHAS:
        estimate = estimator.judge(seen, alpha)
        for name, admitted in (("plain", estimate.admitted), ("lower", estimate.admitted_lower)):
            figures[f"{name} {alpha}"] = _counts(admitted, estimate.y_hat, y)
    one = estimate.sdm[:, 1]
    figures["auroc"] = auroc(one, y)
    figures["scores"] = [round(value, 4) for value in one.tolist()]
    figures["right"] = y.tolist()
    return figures


def _counts(admitted: Tensor, y_hat: Tensor, y: Tensor) -> dict[str, list[int]]:
    """hits and of: admitted of all, right among them, by true class and by verdict. rows: which are admitted."""

    def pair(hits: Tensor) -> list[int]:
        share = Share.count(hits)
        return [share.hits, share.of]

    right = y_hat == y
    return {
        "admitted": pair(admitted),
        "right": pair(right[admitted]),
        "class 0": pair(right[admitted & (y == 0)]),
        "class 1": pair(right[admitted & (y == 1)]),
        "verdict 0": pair(right[admitted & (y_hat == 0)]),
        "verdict 1": pair(right[admitted & (y_hat == 1)]),
        "rows": admitted.nonzero().flatten().tolist(),
    }


def _reduced(answer: Labelled, representation: Representation) -> Labelled:
    """With those parts of h alone that `representation` names."""
    hidden = (answer.h.numel() - len(EVIDENCE)) // 2
    if hidden < 0:  # the states could not be taken
        return answer
    parts = dict(zip(REPRESENTATION.order, answer.h.split(REPRESENTATION.block_sizes(hidden)), strict=True))
    return replace(answer, h=torch.cat([parts[part] for part in representation.order]))


def _accuracy(own: Sequence[Labelled], records: Sequence[Record]) -> dict[str, list[int]]:
    """exact: tags and all, the label. sentence: the first tagged sentence has the reference's words (the public
    code's check). three: exact among the prompts with the papers' three words."""
    three = [answer.label for answer in own if answer.id.endswith("-3")]
    sentence = [
        _words(answer.response) == _words(record.reference)
        for answer, record in zip(own, records, strict=True)
    ]
    return {
        "exact": [sum(answer.label for answer in own), len(own)],
        "sentence": [sum(sentence), len(own)],
        "three": [sum(three), len(three)],
    }


def _words(response: str) -> list[str] | None:
    """Of the first tagged sentence; None without one."""
    sentences = parse(f"{response.strip()}\n{TAG}Yes</verified>").sentences
    return sentences[0].split() if sentences else None
