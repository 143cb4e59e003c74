"""Deals of one task: records dealt to fitting and certification, a layer fitted, a rule on it, a certificate sought.

The layer of a deal costs most and does not depend on the rule, so it is kept: `layer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from candor.calibration.fit import FitSettings, fit, set_aside_for_certification, standardisation_blocks
from candor.calibration.rule import RuleRows
from candor.engine.base import EVIDENCE, Representation
from candor.sdm.estimator import SDMEstimator
from candor.sdm.score import sdm_figures
from studies.two_gates.answers import Answered

REPRESENTATION = Representation("<verified>", ("mean", "last", "evidence"), EVIDENCE)
SHARE = 0.4
"""Of the records, to certify on."""


@dataclass(frozen=True, eq=False)
class Deal:
    """fitting, certification: rows of the calibration records; in_calibration: which of `fitting` are in the layer's
    calibration half."""

    estimator: SDMEstimator
    fitting: Tensor
    in_calibration: Tensor
    certification: Tensor


def layer(
    answered: Answered, seed: int, kept: Path, alpha: float, rounds: int = 4, share: float = SHARE
) -> Deal:
    """The deal of this seed, from `kept` where it has been made before."""
    path = kept / f"deal-{seed}-{share:g}.pt"
    if path.exists():
        state = torch.load(path)
        return Deal(
            SDMEstimator.from_state(state["estimator"]),
            state["fitting"],
            state["in_calibration"],
            state["certification"],
        )
    rest, apart = set_aside_for_certification(answered.labelled(), share, seed)
    size = (len(answered.prompts[0])) // 2
    settings = FitSettings(
        (alpha,), rounds=rounds, epochs=100, exemplar_dim=256, learning_rate=1e-4, seed=seed
    )
    fitted = fit(rest, standardisation_blocks(REPRESENTATION, size), settings, lambda _: None)
    training, calibration = ([int(one.id) for one in half] for half in (fitted.training, fitted.calibration))
    deal = Deal(
        fitted.estimator,
        torch.tensor(training + calibration),
        torch.tensor([False] * len(training) + [True] * len(calibration)),
        torch.tensor([int(one.id) for one in apart]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {name: getattr(deal, name) for name in ("fitting", "in_calibration", "certification")}
    torch.save(fields | {"estimator": deal.estimator.state()}, path)
    return deal


def rows(answered: Answered, estimator: SDMEstimator, at: Tensor | None = None) -> RuleRows:
    """As a rule sees them; answers that did not end on their own hold NaN, and are never let through."""
    at = torch.arange(len(answered)) if at is None else at
    some = answered.take(at.tolist())
    h = some.h.where(some.complete.unsqueeze(1), torch.nan)
    seen = estimator.measure(h)
    d, _, _ = estimator.activate(seen)
    return RuleRows(some.prompts, h, sdm_figures(seen, d), some.labels, some.digests)
