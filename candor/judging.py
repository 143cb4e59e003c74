"""Verdicts on many answers at once, from their states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, get_args

import numpy
import torch

from candor.policy import judging
from candor.policy.certificate import Certificate, EstimatorKind, RuleCertificate, RuleKind
from candor.policy.decision import REASONS, REGION_OF, Verdict
from candor.policy.judging import Judgement, TwoGates, certificate_at
from candor.sdm.estimator import SDMEstimator
from candor.sdm.outputs import Measurement

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_ROWS = 1024
"""Maximum rows measured at once. It bounds the memory of a large call."""

_REGIONS = ["high" if reason is None else REGION_OF[reason] for reason in REASONS]


class Judges(Protocol):
    """An object that can judge states: a `Bundle`, or the result of `calibrate`."""

    @property
    def estimator(self) -> SDMEstimator: ...

    @property
    def certificates(self) -> Sequence[Certificate]: ...

    @property
    def rule(self) -> TwoGates | None: ...


@dataclass(frozen=True, eq=False)
class Verdicts:
    """n verdicts as columns, each (n,); `verdicts[i]` is one of them as a `Verdict`, with all its figures.

    region: "high", "low", "ood" or "unavailable". reason: why the verdict abstains, None if it does not.
    abstained: bool. prediction: 1 if the SDM layer says that the answer follows its instruction, else 0.
    probability, in [0, 1]: by two gates, that the answer is right; by a region, SDM(z') of the prediction.
    similarity: q, at least 0. rescaled_similarity: q', in [0, q]. distance_quantile: d, in [0, 1].
    score, prompt_p_value: those of the two gates; nan if a region judged. certified: bool, whether `certificate`
    covers the answer. certificate: of the rule at alpha, or of the region under the estimator that judged; None if
    there is none.

    If nothing could be measured, prediction and similarity are -1 and the other figures are nan.

    >>> import numpy, candor
    >>> states = numpy.random.default_rng(0).normal(size=(400, 3)) + [[0], [4]] * 200
    >>> calibrated = candor.calibrate(states, [0, 1] * 200, rounds=1, epochs=5, exemplar_dim=4, learning_rate=0.05)
    >>> verdicts = candor.judge(calibrated, [[4, 4, 4], [0, 0, 0], [90, -90, 0], [numpy.nan, 0, 0]])
    >>> len(verdicts), verdicts.alpha
    (4, 0.9)
    >>> verdicts.abstained
    array([False,  True,  True,  True])
    >>> verdicts.reason.tolist()
    [None, 'predicted_not_following', 'out_of_distribution', 'scoring_unavailable']
    >>> verdicts[0].region, verdicts[0].figures.prediction
    ('high', 1)
    """

    alpha: float
    region: NDArray[numpy.str_]
    reason: NDArray[numpy.object_]
    abstained: NDArray[numpy.bool_]
    prediction: NDArray[numpy.int64]
    probability: NDArray[numpy.float32]
    similarity: NDArray[numpy.int64]
    rescaled_similarity: NDArray[numpy.float32]
    distance_quantile: NDArray[numpy.float32]
    score: NDArray[numpy.float32]
    prompt_p_value: NDArray[numpy.float64]
    certified: NDArray[numpy.bool_]
    certificate: Certificate | RuleCertificate | None
    _judgement: Judgement = field(repr=False)

    def __len__(self) -> int:
        return len(self.abstained)

    def __getitem__(self, row: int) -> Verdict:
        return self._judgement.verdict(range(len(self))[row])  # accepts negative rows; raises IndexError

    def __iter__(self) -> Iterator[Verdict]:
        return map(self._judgement.verdict, range(len(self)))


def judge(
    bundle: Judges,
    states: ArrayLike | torch.Tensor,
    *,
    prompt_states: ArrayLike | torch.Tensor | None = None,
    rule: RuleKind | None = None,
    alpha: float | None = None,
    estimator: EstimatorKind = "lower",
    calibrated: ArrayLike | torch.Tensor | None = None,
    certified_only: bool = False,
) -> Verdicts:
    """Returns the verdict on each of n answers, as a server with this bundle gives it.

    states (n, D): one row an answer, of any float type, in the bundle's representation (`Model.states`). A row that
    is not finite is `scoring_unavailable`. alpha: one of the bundle's; None: the lowest.
    prompt_states (n, P): of the same answers' prompts (`Model.prompt_states`), which two gates need.
    rule: "two-gates", or "sdm" for the papers' region alone; None: two gates if the bundle has them.
    estimator: of the region; "lower" allows for the number of calibration points behind a verdict, "plain" does not.
    calibrated: bool, for all or (n,), whether answers were made as the bundle's policy says; None: they were. The
    states do not show this. certified_only: abstain from answers that no certificate covers.

    Raises ValueError for a shape, alpha, rule or estimator that the bundle does not have, and for `certified_only` if
    nothing is certified.

    >>> import numpy, candor
    >>> bundle = candor.load_bundle("demo/bundle")
    >>> states = numpy.zeros((2, 1158), dtype="float32")
    >>> candor.judge(bundle, states, rule="sdm", alpha=0.95).region
    array(['ood', 'ood'], dtype='<U11')
    >>> candor.judge(bundle, states[:, :100])
    Traceback (most recent call last):
    ValueError: states must be (n, 1158), one row an answer; got (2, 100)
    """
    judges, certificates = bundle.estimator, bundle.certificates
    h = as_states(states, judges.adaptor.input_dim)
    at = min(judges.regions) if alpha is None else alpha
    if at not in judges.regions:
        raise ValueError(f"alpha must be one that was calibrated, of {sorted(judges.regions)}; got {alpha}")
    if estimator not in get_args(EstimatorKind):
        raise ValueError(f'estimator must be "lower" or "plain"; got {estimator!r}')
    gates = _gates(bundle, rule)
    prompts = None
    if gates is not None:
        if prompt_states is None:
            raise ValueError(
                'two gates judge, and need prompt_states, one row an answer (Model.prompt_states); or say rule="sdm"'
            )
        prompts = as_states(prompt_states, len(gates.rule.gate.mean), name="prompt_states")
        if len(prompts) != len(h):
            raise ValueError(f"expected as many prompt_states as states, {len(h)}; got {len(prompts)}")
        if certified_only and gates.terms.at(at) is None:
            raise ValueError(
                f"certified_only needs a certificate of the two gates at alpha {at}; there is none"
            )
    elif certified_only and certificate_at(certificates, at, estimator) is None:
        raise ValueError(
            f"certified_only needs a certificate at alpha {at} under the estimator {estimator}; there is none: "
            "calibrate with certify, or judge without"
        )
    kept = torch.ones(len(h), dtype=torch.bool)
    if calibrated is not None:
        given = to_tensor("calibrated", calibrated)
        if given.dtype != torch.bool or given.shape not in (kept.shape, ()):
            raise ValueError(
                f"calibrated must be bool, one for all or ({len(h)},); got {given.dtype}, {tuple(given.shape)}"
            )
        kept &= given
    with torch.inference_mode():
        seen = _measure(judges, h)
        if gates is not None and prompts is not None:
            return _columns(judging.judge_by_rule(judges, gates, seen, h, prompts, at, calibrated=kept))
        return _columns(
            judging.judge(
                judges,
                seen,
                at,
                estimator,
                calibrated=kept,
                certificates=certificates,
                certified_only=torch.full_like(kept, certified_only),
            )
        )


def as_states(
    states: ArrayLike | torch.Tensor, width: int | None = None, *, name: str = "states"
) -> torch.Tensor:
    """Returns (n, D) float32 on the CPU. Raises ValueError for another shape, or a D other than `width`."""
    found = to_tensor(name, states)
    if found.dim() != 2 or (width is not None and found.shape[1] != width):
        raise ValueError(f"{name} must be (n, {width or 'D'}), one row an answer; got {tuple(found.shape)}")
    return found.float()


def _gates(bundle: Judges, rule: RuleKind | None) -> TwoGates | None:
    """Returns the gates to judge by; None: the papers' region. Raises ValueError for a rule that is not there."""
    if rule not in (None, *get_args(RuleKind)):
        raise ValueError(f'rule must be "two-gates" or "sdm"; got {rule!r}')
    if rule == "two-gates" and bundle.rule is None:
        raise ValueError('rule must be "sdm": there are no two gates here; calibrate with prompt_states')
    return None if rule == "sdm" else bundle.rule


def to_tensor(name: str, values: ArrayLike | torch.Tensor) -> torch.Tensor:
    """Returns the values on the CPU. Raises ValueError if they are not an array of numbers."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu()
    try:
        return torch.from_numpy(numpy.array(values))  # a copy, since PyTorch needs writable arrays
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from None


def _measure(estimator: SDMEstimator, h: torch.Tensor) -> Measurement:
    """Measures any number of rows, in parts. A row's values depend on that row alone, so the split has no effect."""
    parts = [estimator.measure(part) for part in h.split(_ROWS)]
    names = [one.name for one in fields(Measurement)]
    return Measurement(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _columns(judgement: Judgement) -> Verdicts:
    estimate, reason = judgement.estimate, judgement.decisions.reason
    measured = reason != REASONS.index("scoring_unavailable")  # (n,)
    codes = reason.numpy()  # NumPy would treat a one-element tensor as a scalar

    def figure(values: torch.Tensor) -> NDArray[Any]:
        return values.where(measured, torch.nan if values.is_floating_point() else -1).numpy()

    gates = judgement.rule
    nothing = torch.full((len(codes),), torch.nan)
    probability = estimate.sdm.gather(1, estimate.y_hat.unsqueeze(1)).squeeze(1)
    return Verdicts(
        alpha=judgement.alpha,
        region=numpy.array(_REGIONS)[codes],
        reason=numpy.array(REASONS, dtype=object)[codes],
        abstained=codes != 0,
        prediction=figure(estimate.y_hat),
        probability=figure(probability if gates is None else gates.probability),
        similarity=figure(estimate.q),
        rescaled_similarity=figure(estimate.q_prime),
        distance_quantile=figure(estimate.d),
        score=figure(nothing if gates is None else gates.score),
        prompt_p_value=figure(nothing.double() if gates is None else gates.p_value),
        certified=judgement.decisions.covered.numpy(),
        certificate=judgement.certificate,
        _judgement=judgement,
    )
