"""Fits what knows a prompt: the gate, and a probe where strangers were declared.

    gate     distances fitted on the training half's prompts, measured against the calibration half's
    probe    a regression between the training half's prompts and declared strangers, measured likewise

Each refuses what lies beyond a rank of the calibration half. So the share of the calibrated kind that they refuse has
a bound, whatever the states are like.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from candor.calibration.errors import CalibrationError
from candor.calibration.intervals import binomial_tails, clopper_pearson
from candor.calibration.logistic import fit_chosen
from candor.calibration.rule_settings import RuleSettings
from candor.calibration.splits import split
from candor.sdm.adaptor import Block
from candor.sdm.gate import PromptGate
from candor.sdm.probe import StrangerProbe

PROBE_REACHES = (10.0, 30.0, 100.0, 300.0)
"""Of the probe for strangers. Few prompts in many dimensions lie apart; stronger penalties turn its direction towards
their mean, away from what tells them apart (docs/log.md, 2026-11-26)."""


def rank_cut(references: int, eps: float, delta: float) -> int:
    """l: the largest rank from the farthest reference to cut at, so that P(refused) <= eps with confidence 1 - delta.

    The refusal rate is Beta(l, m + 1 - l) over draws of the m references. So l is the largest with a (1 - delta)
    quantile of at most eps, that is, P(Binomial(m, eps) >= l) >= 1 - delta. It is at least 1, a cut beyond the
    farthest, even where that exceeds eps: a gate that refuses nobody is useless. `refusal_bound` states the bound.
    """
    return max(1, int((binomial_tails(references, eps) >= 1 - delta).sum()) - 1)


def refusal_bound(references: int, cut: int, delta: float) -> float:
    """The (1 - delta) quantile of Beta(cut, references + 1 - cut)."""
    return clopper_pearson(cut - 1, references, confidence=1 - 2 * delta)[1]


def gate_halves(prompts: Tensor, digests: Sequence[str], in_calibration: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt states to fit gates on, and to measure against: each prompt once, since its records are one draw."""
    first = {digest: row for row, digest in reversed(list(enumerate(digests)))}
    once = torch.zeros(len(digests), dtype=torch.bool)
    once[list(first.values())] = True
    return prompts[once & ~in_calibration], prompts[once & in_calibration]


def fit_gate(
    training: Tensor, calibration: Tensor, widths: Sequence[int], settings: RuleSettings
) -> PromptGate:
    """training, calibration: prompt states (n, P) and (m, P) of the two halves; no prompt is in both."""
    cut = rank_cut(len(calibration), settings.eps, settings.delta)
    return PromptGate.fit(training, calibration, widths, settings.components, cut)


def fit_probe(
    known: Tensor, reference: Tensor, strangers: Tensor, widths: Sequence[int], settings: RuleSettings
) -> StrangerProbe:
    """known, reference: as in `fit_gate`. strangers (s, P): prompts to be refused.

    Its reach is cross-validated. Its cut is beyond the farthest reference, which refuses one in m + 1 of the
    calibrated kind.

    Raises CalibrationError for fewer strangers than folds.
    """
    if len(strangers) < settings.folds:
        raise CalibrationError(
            f"expected at least {settings.folds} declared strangers to tell them apart by, got {len(strangers)}"
        )
    x = torch.cat([known, strangers]).double()
    y = torch.cat([torch.zeros(len(known)), torch.ones(len(strangers))]).long()
    shares = (1 / settings.folds,) * settings.folds
    folds = split(list(range(len(y))), y.tolist(), shares, settings.seed)
    blocks: list[Block] = [(width, "scalar") for width in widths]
    chosen = fit_chosen(x, y, blocks, folds, PROBE_REACHES)
    return StrangerProbe.fit(chosen.w, reference, 1)
