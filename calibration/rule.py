"""Fits a two-gate rule to labelled answers: the prompts' gates, the answers' score, and the order of thresholds.

    gates    `calibration.gates`
    score    columns    logistic regressions on VIEWS, blocks of h and of the prompt's states, and the figures of
                        the SDM layer; each with cross-validated values for every record
             scores     weighted sums of columns: a view alone, their sum, with the layer's margin and logit, a stack
             chosen     by AURC of the cross-validated values
    order    of thresholds (`calibration.rule_certificate`), from the cross-validated values of the score chosen
    forecast of that score (`calibration.forecast`), where answers may be left unbegun

Cross-validated: a record's value comes from weights fitted without any record of its prompt. So it is distributed as
a fresh record's, the order needs no records of its own, and the records set aside are used only to certify. The
layer's figures are not recomputed for each fold: the layer was trained on its training half, and the calibration half
chose its epoch. So they are read on the calibration half only, and columns with them are chosen and weighed there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from candor.calibration.errors import CalibrationError
from candor.calibration.forecast import fit_forecast, forecast_min
from candor.calibration.gates import fit_gate, fit_probe, gate_halves, refusal_bound
from candor.calibration.generate import Labelled
from candor.calibration.logistic import fit_chosen, fit_logistic, fit_standardised
from candor.calibration.ranking import ranking
from candor.calibration.rule_settings import SUM_WITH_LAYER, VIEWS, RuleSettings
from candor.calibration.served import Attempts
from candor.calibration.splits import split
from candor.sdm.adaptor import Block
from candor.sdm.estimator import SDMEstimator
from candor.sdm.probe import StrangerProbe
from candor.sdm.rule import AnswerRule
from candor.sdm.score import FIGURES, AnswerScore, sdm_figures

REACHES = (1.0, 3.0, 10.0, 30.0)
"""Reaches that are tried, the strongest penalty first (`calibration.logistic`)."""


@dataclass(frozen=True, eq=False)
class RuleRows:
    """n answers, one a record. prompts (n, P), h (n, D), figures (n, F): `sdm.score.sdm_figures`, or none; y (n,)
    int64: 1 where the answer is right; digests: of the prompts. All finite where fitted on."""

    prompts: Tensor
    h: Tensor
    figures: Tensor
    y: Tensor
    digests: Sequence[str]

    def __post_init__(self) -> None:
        sizes = {len(self.prompts), len(self.h), len(self.figures), len(self.y), len(self.digests)}
        if len(sizes) != 1:
            raise ValueError(f"expected as many prompts, h, figures, labels and digests, got {sorted(sizes)}")

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Tensor) -> RuleRows:
        """rows: (r,) indices or (n,) bool."""
        at = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        digests = [self.digests[i] for i in at.tolist()]
        return RuleRows(self.prompts[at], self.h[at], self.figures[at], self.y[at], digests)


def rows_of(estimator: SDMEstimator, answers: Sequence[Labelled]) -> RuleRows:
    """All attempts, those at one prompt next to each other. What cannot be scored holds NaN.

    Raises CalibrationError where no answer's prompt has states.
    """
    attempts = Attempts.measure(estimator, answers)
    if not attempts.prompts.shape[1]:
        raise CalibrationError(
            "a prompt gate needs the states at the end of prefill, and no answer has them: answer the records again, "
            "or calibrate with the rule sdm"
        )
    d, _, _ = estimator.activate(attempts.measurement)
    return RuleRows(
        attempts.prompts,
        attempts.h,
        sdm_figures(attempts.measurement, d),
        attempts.y.flatten(),
        [answer.prompt_digest for answer in answers for _ in answer.attempts],
    )


@dataclass(frozen=True, eq=False)
class FittedRule:
    """rule: what it lets through, `calibration.rule_certificate` decides.

    scores, known, y (n,): cross-validated scores of the fitting records, whether the gate lets their prompts pass,
    labels. chosen: the score's name in `aurc`; aurc: of every candidate; reaches: the reach chosen for each view.
    refusal_bound: with confidence 1 - delta the gate refuses at most this share of prompts like those calibrated on.
    forecasts (n,): cross-validated, of the same records; None: all answers are begun. settings: it was fitted with.
    """

    rule: AnswerRule
    scores: Tensor
    known: Tensor
    y: Tensor
    chosen: str
    aurc: Mapping[str, float]
    reaches: Mapping[str, float]
    refusal_bound: float
    forecasts: Tensor | None = None
    settings: RuleSettings = field(default_factory=RuleSettings)

    def reaching(self, threshold: float) -> Tensor:
        """(n,) bool: the fitting records that gate and score let through at the threshold."""
        return self.known & (self.scores.double() >= threshold)

    def forecast_min(self, threshold: float) -> float | None:
        """The forecast below which no answer is begun, at one of the thresholds; None: all are begun."""
        if self.forecasts is None or self.settings.may_lose is None:
            return None
        reaching = self.reaching(threshold)
        return forecast_min(self.forecasts, reaching, self.settings.may_lose, self.settings.delta)


def fit_rule(
    rows: RuleRows,
    in_calibration: Tensor,
    parts: Sequence[tuple[str, int]],
    prompt_widths: Sequence[int],
    settings: RuleSettings,
    strangers: Tensor | None = None,
    probe_weight: Tensor | None = None,
) -> FittedRule:
    """rows: the fitting records. in_calibration: (n,) bool, those of the layer's calibration half.

    parts: h's blocks by name and width, e.g. (("mean", 576), ("last", 576), ("evidence", 6)). prompt_widths: of the
    prompt states' blocks. strangers: (s, P), states of prompts that are to be refused; None: none were declared.
    probe_weight: (P,), of an earlier probe, which is kept and measured against these prompts.

    Raises CalibrationError where a fold lacks right or wrong answers, ValueError where the
    settings name a score that these rows do not provide.
    """
    known, reference = gate_halves(rows.prompts, rows.digests, in_calibration)
    gate = fit_gate(known, reference, prompt_widths, settings)
    probe: StrangerProbe | None = None
    refused = refusal_bound(len(reference), int(gate.rank_cut), settings.delta)
    if strangers is not None:
        probe = fit_probe(known, reference, strangers, prompt_widths, settings)
    elif probe_weight is not None:
        probe = StrangerProbe.fit(probe_weight, reference, 1)
    if probe is not None:  # both bounds hold together, each at half of delta
        refused = sum(
            refusal_bound(len(reference), int(one.rank_cut), settings.delta / 2) for one in (gate, probe)
        )
    shares = (1 / settings.folds,) * settings.folds
    folds = split(list(rows.digests), rows.y.tolist(), shares, settings.seed)
    columns = _columns(rows, [*(("prompt", width) for width in prompt_widths), *parts], folds)
    candidates = _candidates(columns, rows.y, in_calibration, folds)
    aurc = {name: one.aurc for name, one in candidates.items()}
    chosen = settings.score or min(aurc, key=lambda name: aurc[name])
    if chosen not in candidates:
        raise ValueError(f"no score named {chosen}: these rows give {', '.join(candidates)}")
    best = candidates[chosen]
    weight, bias = best.weights @ columns.weights, best.weights @ columns.biases
    slope, intercept = _platt(best.values[best.rows], rows.y[best.rows])
    score = AnswerScore(weight.float(), bias.float(), slope, intercept)
    forecast, forecasts = None, None
    if settings.may_lose is not None:
        own = rows[best.rows]
        parted = split(list(own.digests), own.y.tolist(), shares, settings.seed)
        forecast, forecasts = fit_forecast(own.prompts, best.values[best.rows], prompt_widths, parted)
    rule = AnswerRule(gate, score, probe, forecast)
    return FittedRule(
        rule,
        best.values[best.rows].float(),
        rule.know(rows.prompts[best.rows]).known,
        rows.y[best.rows],
        chosen,
        aurc,
        columns.reaches,
        min(1.0, refused),
        forecasts,
        settings,
    )


@dataclass(frozen=True, eq=False)
class _Columns:
    """c scores to sum. values (n, c): cross-validated. weights (c, P + D + F), biases (c,): fitted on all records."""

    names: tuple[str, ...]
    values: Tensor
    weights: Tensor
    biases: Tensor
    reaches: dict[str, float]


@dataclass(frozen=True, eq=False)
class _Candidate:
    """weights (c,) over the columns; values (n,): cross-validated, valid at `rows` only."""

    weights: Tensor
    values: Tensor
    rows: Tensor
    aurc: float


def _columns(rows: RuleRows, parts: Sequence[tuple[str, int]], folds: Sequence[Tensor]) -> _Columns:
    """parts: blocks of prompt states and h together."""
    x = torch.cat([rows.prompts, rows.h, rows.figures], dim=1).double()
    names, values, weights, biases, reaches = [], [], [], [], {}
    seen: set[tuple[str, ...]] = set()
    for name, wanted in VIEWS.items():
        blocks, at = _view(parts, wanted)
        held = tuple(part for part, _ in parts if part in wanted)
        if not at.any() or held in seen:
            continue
        seen.add(held)
        own = x[:, : len(at)][:, at]
        chosen = fit_chosen(own, rows.y, blocks, folds, REACHES)
        weight = x.new_zeros(x.shape[1])
        weight[: len(at)][at] = chosen.w
        names.append(name)
        values.append(chosen.out_of_fold)
        weights.append(weight)
        biases.append(chosen.b)
        reaches[name] = chosen.reach
    width = x.shape[1] - rows.figures.shape[1]
    for column in range(rows.figures.shape[1]):
        names.append(FIGURES[column])
        values.append(x[:, width + column])
        weights.append(torch.nn.functional.one_hot(torch.tensor(width + column), x.shape[1]).double())
        biases.append(x.new_zeros(()))
    return _Columns(tuple(names), torch.stack(values, 1), torch.stack(weights), torch.stack(biases), reaches)


def _view(parts: Sequence[tuple[str, int]], wanted: Sequence[str]) -> tuple[list[Block], Tensor]:
    blocks: list[Block] = []
    at = []
    for part, width in parts:
        at += [part in wanted] * width
        if part in wanted:
            blocks.append((width, "feature" if part == "evidence" else "scalar"))
    return blocks, torch.tensor(at)


def _candidates(
    columns: _Columns, y: Tensor, in_calibration: Tensor, folds: Sequence[Tensor]
) -> dict[str, _Candidate]:
    views = list(columns.reaches)
    everyone = torch.ones_like(in_calibration)
    spread = columns.values.std(0)
    spread = torch.where(spread > 0, spread, 1.0)

    def of(names: Sequence[str]) -> Tensor:
        return torch.tensor([float(name in names) for name in columns.names], dtype=torch.float64) / spread

    sums: dict[str, tuple[tuple[str, ...], Tensor]] = {name: ((name,), everyone) for name in views}
    if len(views) > 1:
        sums["sum"] = (tuple(views), everyone)
    layers = [name for name in ("margin", "logit") if name in columns.names]
    sums |= {name: ((name,), in_calibration) for name in layers}
    if layers:
        sums[SUM_WITH_LAYER] = ((*views, *layers), in_calibration)
    found = {}
    for name, (names, rows) in sums.items():
        weights = of(names)
        values = columns.values @ weights
        found[name] = _Candidate(weights, values, rows, _aurc(values[in_calibration], y[in_calibration]))
    if layers:
        found["stack"] = _stack(columns, (*views, *FIGURES), y, in_calibration, folds)
    return found


def _stack(
    columns: _Columns, names: Sequence[str], y: Tensor, rows: Tensor, folds: Sequence[Tensor]
) -> _Candidate:
    at = torch.tensor([name in names for name in columns.names])
    x = columns.values[:, at]
    blocks: list[Block] = [(int(at.sum()), "feature")]
    values = torch.zeros(len(y), dtype=torch.float64)
    for fold in folds:
        rest = rows.clone()
        rest[fold] = False
        ((w, b),) = fit_standardised(x[rest], y[rest], blocks, (8.0,))
        values[fold] = x[fold] @ w + b
    ((w, _),) = fit_standardised(x[rows], y[rows], blocks, (8.0,))
    weights = torch.zeros(len(at), dtype=torch.float64)
    weights[at] = w
    return _Candidate(weights, values, rows, _aurc(values[rows], y[rows]))


def _aurc(scores: Tensor, y: Tensor) -> float:
    return float(ranking(torch.ones(1, len(y), dtype=torch.float64), scores, y == 1)["aurc"])


def with_probabilities(fitted: FittedRule, certification: RuleRows) -> AnswerRule:
    """The rule with probabilities fitted to the certification records' scores too, which change no verdict.

    Their scores come from the weights that serve, as fresh records' do; there are as many again.
    """
    scores = fitted.rule.score(certification.prompts, certification.h, certification.figures)
    usable = scores.isfinite()
    slope, intercept = _platt(
        torch.cat([fitted.scores, scores[usable]]).double(), torch.cat([fitted.y, certification.y[usable]])
    )
    return replace(fitted.rule, score=replace(fitted.rule.score, slope=slope, intercept=intercept))


def _platt(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """slope and intercept of P(y = 1) = sigmoid(slope S + intercept)."""
    ((w, b),) = fit_logistic(scores.unsqueeze(1), y, (32.0,))
    return w.squeeze(0), b
