"""The interface of comparators: the same states, halves and alphas as input, one verdict a row as output.

    fit(Fitting) -> Scorer,      Scorer(Rows) -> MethodVerdicts

A comparator may use the training half, and choose temperatures, thresholds and epochs on the calibration
half, as the bundle's own layer did. It never sees an evaluated row before it scores it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor, nn

from candor.calibration.epochs import LayerSettings
from candor.calibration.generate import Labelled, stacked_prompts
from candor.policy.judging import TwoGates
from candor.sdm.estimator import SDMEstimator
from candor.sdm.outputs import Measurement
from candor.sdm.region import minimum_points


@dataclass(frozen=True, eq=False)
class Rows:
    """n rows: h (n, D) as captured, x (n, D) standardised, and the measurement of the bundle's layer.

    prompts: (n, P), states at the end of prefill; NaN where they are not known.
    """

    h: Tensor
    x: Tensor
    measurement: Measurement
    prompts: Tensor

    @classmethod
    def of(cls, estimator: SDMEstimator, answers: Sequence[Labelled]) -> Rows:
        """The first attempts of answers that can be scored."""
        h = torch.stack([answer.h for answer in answers])
        return cls(h, estimator.adaptor.standardise(h), estimator.measure(h), stacked_prompts(answers))

    def __getitem__(self, rows: Tensor) -> Rows:
        """Some rows, by index."""
        seen = self.measurement
        part = {field.name: getattr(seen, field.name)[rows] for field in fields(seen)}
        return Rows(self.h[rows], self.x[rows], Measurement(**part), self.prompts[rows])

    @property
    def z_prime(self) -> Tensor:
        """(n, C) float32."""
        return self.measurement.z_prime

    @property
    def y_hat(self) -> Tensor:
        """(n,) int64: the adaptor's own prediction."""
        return self.measurement.y_hat


@dataclass(frozen=True, eq=False)
class Fitting:
    """The data that comparators are fitted on: the halves of the bundle's layer; every answer is scorable.

    layer: how the bundle's layer was trained. ensemble: how many layers the ensemble has.
    alphas: target accuracies, those of the bundle. gates: the bundle's two gates; None if it has none.
    """

    estimator: SDMEstimator
    training: Sequence[Labelled]
    calibration: Sequence[Labelled]
    layer: LayerSettings
    alphas: tuple[float, ...]
    seed: int = 0
    ensemble: int = 3
    gates: TwoGates | None = None

    @cached_property
    def train_rows(self) -> Rows:
        return Rows.of(self.estimator, self.training)

    @cached_property
    def calibration_rows(self) -> Rows:
        return Rows.of(self.estimator, self.calibration)

    @cached_property
    def train_labels(self) -> Tensor:
        return torch.tensor([answer.label for answer in self.training])

    @cached_property
    def calibration_labels(self) -> Tensor:
        return torch.tensor([answer.label for answer in self.calibration])

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True, eq=False)
class MethodVerdicts:
    """n rows judged by one method.

    y_hat: (n,) int64, 1 if the answer follows the instruction. confidence: (n,) float64, higher means more
    confident that y_hat is right; only its order counts. probability: (n,) float64 in [0, 1] that y_hat is
    right, None for methods that give none. admitted: by alpha, (n,) bool.
    """

    y_hat: Tensor
    confidence: Tensor
    probability: Tensor | None
    admitted: Mapping[float, Tensor]

    def __getitem__(self, rows: Tensor) -> MethodVerdicts:
        """The verdicts of some rows, by index or mask."""
        return MethodVerdicts(
            self.y_hat[rows],
            self.confidence[rows],
            None if self.probability is None else self.probability[rows],
            {alpha: admitted[rows] for alpha, admitted in self.admitted.items()},
        )


Scorer = Callable[[Rows], MethodVerdicts]
Fit = Callable[[Fitting], Scorer]


def by_probability(y_hat: Tensor, probability: Tensor, alphas: Sequence[float]) -> MethodVerdicts:
    """Admits rows whose probability is at least alpha. y_hat, probability: (n,)."""
    probability = probability.double()
    return MethodVerdicts(y_hat, probability, probability, {alpha: probability >= alpha for alpha in alphas})


def by_classes(probabilities: Tensor, alphas: Sequence[float]) -> MethodVerdicts:
    """Judges by the likeliest class and its probability. probabilities: (n, C)."""
    top, y_hat = probabilities.max(dim=1)
    return by_probability(y_hat, top, alphas)


def by_thresholds(y_hat: Tensor, confidence: Tensor, thresholds: Mapping[float, float]) -> MethodVerdicts:
    """For confidences that are not probabilities: admits at and above each alpha's threshold."""
    admitted = {alpha: confidence >= threshold for alpha, threshold in thresholds.items()}
    return MethodVerdicts(y_hat, confidence.double(), None, admitted)


def selective_threshold(confidence: Tensor, right: Tensor, alpha: float) -> float:
    """The lowest threshold above which at least alpha of the calibration rows are right; inf if there is none.

    confidence: (n,). right: (n,) bool. Equal confidences enter together, and at least as many rows as
    Algorithm 1 requires of a class are above. This is Geifman and El-Yaniv (1705.08500) without their bound.
    """
    order = confidence.argsort(descending=True)
    confidence = confidence[order]
    count = torch.arange(1, len(order) + 1)
    kept = (right[order].cumsum(0) >= alpha * count - 1e-9) & (count >= minimum_points(alpha))
    kept[:-1] &= confidence[1:] != confidence[:-1]
    found = kept.nonzero()
    return float(confidence[found[-1]]) if len(found) else torch.inf


def linear_head(estimator: SDMEstimator) -> nn.Linear:
    """The adaptor as one linear map x -> z', float64 and trainable; it is one since both its layers are linear."""
    exemplar, head = estimator.adaptor.exemplar, estimator.adaptor.head
    linear = nn.Linear(exemplar.in_features, head.out_features, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(head.weight.double() @ exemplar.weight.double())
        linear.bias.copy_(head.weight.double() @ exemplar.bias.double() + head.bias.double())
    return linear
