"""Makes a bundle from states and labels, as `candor calibrate` does once it has the arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from candor.calibration import certificate, rule_certificate
from candor.calibration.data import prompt_digest
from candor.calibration.errors import CalibrationError, DataError
from candor.calibration.evaluate import Evaluation
from candor.calibration.fit import FitSettings, standardisation_blocks
from candor.calibration.generate import Labelled
from candor.calibration.intervals import Share
from candor.calibration.rule_certificate import RuleParts
from candor.calibration.rule_settings import RuleSettings
from candor.calibration.run import (
    HELD_OUT_SHARE,
    Certifying,
    Outcome,
    calibrate_answers,
    publish_outcome,
    require_free,
)
from candor.judging import as_states, to_tensor
from candor.language_model import Model, Prompt, turns_of
from candor.model_store.bundle import Bundle, load_bundle
from candor.policy.certificate import Certificate
from candor.policy.conversation import Turn
from candor.policy.judging import TwoGates
from candor.sdm.adaptor import Block
from candor.sdm.estimator import SDMEstimator
from candor.sdm.region import Region

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False)
class Calibrated:
    """The result of `calibrate`. You can judge by it and save it. Printing it shows its figures on held-out rows."""

    _outcome: Outcome
    _model: Model | None
    _data: Mapping[str, Any]

    @property
    def estimator(self) -> SDMEstimator:
        return self._outcome.fitted.estimator

    @property
    def regions(self) -> Mapping[float, Region]:
        """The regions by alpha. A region that was not found admits nothing."""
        return self.estimator.regions

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        """The certificates; empty if none was requested or none could be issued."""
        return self._outcome.certificates

    @property
    def rule(self) -> TwoGates | None:
        """The two-gate rule with its certificates; None if `calibrate` was given no states of prompts."""
        return self._outcome.gates

    @property
    def evaluation(self) -> Evaluation:
        """Held-out figures: shares answered and right, `rule[alpha]`, `lower[alpha]`, `plain[alpha]`, with 95 %
        intervals."""
        return self._outcome.evaluation

    def __str__(self) -> str:
        found = self.evaluation
        lines = [f"held out: {found.records} answers, {_percent(found.correct)} of them right"]
        for alpha, region in self.regions.items():
            served = self.rule is None or self.rule.terms.at(alpha) is not None
            reading = found.rule.get(alpha, found.lower[alpha])
            said = f"answered {_percent(reading.answered)}, right {_percent(reading.accuracy_answered)}"
            if self.rule is None and not region.found:
                said = "no region, nothing is answered"
            elif not served:
                said = "no certificate, nothing is answered"
            lines.append(f"alpha {alpha}: {said}")
        lines += (
            [rule_certificate.summary(one) for one in self._outcome.rule.searches]
            if self._outcome.rule
            else []
        )
        if self._outcome.certification is not None:
            lines.append(certificate.summary(self._outcome.certification))
        return "\n".join(lines)

    def save(self, path: str | Path, name: str | None = None) -> Bundle:
        """Publishes a bundle that a server of the model can use, and loads it.

        path: free, or an empty directory. name: the bundle's; None: the folder's name.

        Raises CalibrationError if `calibrate` was not given the model; BundleError or OSError if the bundle cannot be
        written.
        """
        path = Path(path)
        if self._model is None:
            raise CalibrationError(
                "a bundle names its model and shows the answers behind a verdict: "
                "give model, prompts and responses to calibrate"
            )
        require_free(path)
        publish_outcome(
            path,
            self._outcome,
            name or path.resolve().name,
            self._model.identity,
            None,
            self._model.representation,
            self._model.policy,
            self._data,
        )
        return load_bundle(path)


def calibrate(
    states: ArrayLike | torch.Tensor,
    labels: ArrayLike | torch.Tensor,
    *,
    prompt_states: ArrayLike | torch.Tensor | None = None,
    alphas: float | Sequence[float] = (0.9,),
    certify: float | None = None,
    delta: float = 0.05,
    certify_share: float | None = None,
    prompts: Sequence[Prompt] | None = None,
    responses: Sequence[str] | None = None,
    model: Model | None = None,
    rounds: int = 10,
    epochs: int = 200,
    exemplar_dim: int = 1000,
    learning_rate: float = 1e-5,
    seed: int = 0,
    progress: Callable[[int], object] = lambda epochs: None,
) -> Calibrated:
    """Fits an SDM layer and a two-gate rule, certifies and evaluates what they let through, each on separate rows.

    states (n, D): one row an answer. A row that is not finite is left out of fitting and counts as not answered.
    labels (n,): 1 if the answer follows its instruction, else 0.
    prompt_states (n, P): one row an answer, of its prompt at the end of prefill (`Model.prompt_states`). With them,
    the bundle has a two-gate rule, certified at each alpha; without them, the papers' regions alone.
    alphas: target accuracies, each in (0.5, 1). certify: accuracy in (0, 1) to certify among the answered at least,
    also of regions, with confidence 1 - delta; None: the rule's alphas, and no region. certify_share: of the prompts,
    to certify on; None: 0.4 with a rule, else 0.2.
    prompts: one a row, a text or a list of {"role", "content"}. Rows of one prompt stay in one split, so that no
    split contains a prompt seen in another; without prompts, each row counts as its own prompt.
    model, with prompts and responses: the model that gave the states; needed to save a bundle.
    rounds, epochs, exemplar_dim, learning_rate, seed: as in `candor calibrate`; the defaults suit thousands of a
    model's states. progress: called with the number of epochs done since the last call, from other threads, one call
    at a time.

    Raises CalibrationError for data that cannot be calibrated on, ValueError for wrong shapes and settings.

    >>> import numpy, candor
    >>> states = numpy.random.default_rng(0).normal(size=(400, 3)) + [[0], [4]] * 200
    >>> calibrated = candor.calibrate(states, [0, 1] * 200, rounds=1, epochs=5, exemplar_dim=4, learning_rate=0.05)
    >>> calibrated.regions[0.9].found
    True
    >>> calibrated.evaluation.records
    80
    >>> candor.calibrate(states, [1] * 400)
    Traceback (most recent call last):
    candor.calibration.errors.DataError: expected both right and wrong answers to fit on, got ...
    """
    listed = (alphas,) if isinstance(alphas, int | float) else alphas
    settings = FitSettings(tuple(sorted(set(listed))), rounds, epochs, exemplar_dim, learning_rate, seed)
    certifying = Certifying.of(certify, delta, certify_share, rule=prompt_states is not None)
    h = as_states(states)
    known = (
        torch.empty(len(h), 0) if prompt_states is None else as_states(prompt_states, name="prompt_states")
    )
    answers = _answers(h, known, labels, prompts, responses, model)
    blocks: tuple[Block, ...] = ((h.shape[1], "scalar"),)  # as in the papers: one mean and scale for all
    parts: tuple[tuple[str, int], ...] = (("last", h.shape[1]),)
    widths: tuple[int, ...] = (known.shape[1],)
    if model is not None:
        if prompts is None or responses is None:
            raise ValueError(
                "a bundle shows the answers behind a verdict: with model, give prompts and responses"
            )
        _require_given_by(model, answers)
        hidden = model.identity.hidden_size
        blocks, parts = (
            standardisation_blocks(model.representation, hidden),
            model.representation.parts(hidden),
        )
        widths = (hidden, hidden)
    rule = None if prompt_states is None else RuleParts(RuleSettings(delta=delta, seed=seed), parts, widths)
    outcome = calibrate_answers(answers, blocks, settings, certifying, rule, progress=progress)
    data = {
        "data": {"records": len(answers), "given_responses": len(answers)},
        "certification_share": certifying.share if certifying else None,
        "held_out_share": HELD_OUT_SHARE,
    }
    return Calibrated(outcome, model, data)


def _answers(
    h: torch.Tensor,
    known: torch.Tensor,
    labels: ArrayLike | torch.Tensor,
    prompts: Sequence[Prompt] | None,
    responses: Sequence[str] | None,
    model: Model | None,
) -> list[Labelled]:
    """Returns one record a row of h (n, D) and of prompt states (n, P).

    Raises ValueError for lengths, DataError for labels not 0 or 1.
    """
    if len(known) != len(h):
        raise ValueError(f"prompt_states must be ({len(h)}, P), one row an answer; got {tuple(known.shape)}")
    y = to_tensor("labels", labels)
    if y.shape != (len(h),):
        raise ValueError(f"labels must be ({len(h)},), one for each row of states; got {tuple(y.shape)}")
    for name, texts in {"prompts": prompts, "responses": responses}.items():
        if texts is not None and (isinstance(texts, str) or len(texts) != len(h)):
            raise ValueError(f"{name} must be a list of {len(h)}, one for each row of states")
    if wrong := ((y != 0) & (y != 1)).nonzero().flatten().tolist():
        problems = [f"row {row}: {y[row].item()}" for row in wrong]
        raise DataError.from_problems("labels", problems, "A label is 1 (follows) or 0 (does not follow).")
    turns = [() if prompts is None else _turns(prompts[row], row) for row in range(len(h))]
    return [
        Labelled(
            id=f"row {row}",
            prompt_digest=prompt_digest(turns[row]) if turns[row] else f"row {row}",
            messages=turns[row],
            response="" if responses is None else responses[row],
            label=1 if y[row] else 0,
            h=state,
            fault=None if state.isfinite().all() else "non_finite",
            tokens=len(model.chat.encode_response(responses[row])) if model and responses else 0,
            prompt_states=known[row],
        )
        for row, state in enumerate(h)
    ]


def _percent(share: Share) -> str:
    if share.value is None or share.low is None or share.high is None:
        return "-"
    return f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"


def _turns(prompt: Prompt, row: int) -> tuple[Turn, ...]:
    try:
        return turns_of(prompt)
    except ValueError as error:
        raise ValueError(f"prompts, row {row}: {error}") from None


def _require_given_by(model: Model, answers: Sequence[Labelled]) -> None:
    """Raises ValueError or DataError if the states or answers cannot come from this model."""
    hidden = model.identity.hidden_size
    if any(answer.prompt_states.numel() not in (0, 2 * hidden) for answer in answers):
        raise ValueError(f"states of this model's prompts are {2 * hidden} wide: take Model.prompt_states")
    width = sum(model.representation.block_sizes(hidden))
    if any(len(answer.h) != width for answer in answers):
        raise ValueError(f"states of this model are {width} wide; got {len(answers[0].h)}")
    if model.policy.resample > 1:
        raise ValueError("one answer a prompt does not show a policy that resamples: use `candor calibrate`")
    problems = [
        f"{answer.id}: {departure}"
        for answer in answers
        if (departure := model.departure(answer.messages, answer.response)) is not None
    ]
    if problems:
        remedy = "Leave these rows out, or open the model with a policy that says how they were made."
        raise DataError.from_problems("answers that the model's policy does not give", problems, remedy)
