"""An ensemble of J SDM layers: all must agree and admit; the least confident voter's SDM counts (2509.12760, A.7).

Each layer is trained as the bundle's was, on a new split of the same fitted prompts and with new weights. Its figures
are those of the lower estimator.
"""

from __future__ import annotations

import torch

from candor.calibration.generate import Labelled
from candor.calibration.layer import train_layer
from candor.calibration.splits import split
from candor.comparison.comparators.base import Fitting, MethodVerdicts, Rows, Scorer
from candor.sdm.ensemble import combine
from candor.sdm.estimator import SDMEstimator


def fit(fitting: Fitting) -> Scorer:
    seeds = torch.randint(2**62, (fitting.ensemble,), generator=fitting.generator()).tolist()
    layers = [_train(fitting, seed) for seed in seeds]

    def score(rows: Rows) -> MethodVerdicts:
        seen = [layer.measure(rows.h) for layer in layers]
        judged = {
            alpha: combine([layer.judge(m, alpha) for layer, m in zip(layers, seen, strict=True)])
            for alpha in fitting.alphas
        }
        one = judged[min(judged)]
        top = one.sdm_lower.gather(1, one.y_hat.unsqueeze(1)).squeeze(1).double()
        admitted = {alpha: estimate.admitted_lower for alpha, estimate in judged.items()}
        return MethodVerdicts(one.y_hat, one.q_prime_lower.double(), top, admitted)

    return score


def _train(fitting: Fitting, seed: int) -> SDMEstimator:
    pool = [*fitting.training, *fitting.calibration]
    halves = split(
        [answer.prompt_digest for answer in pool], [answer.label for answer in pool], (0.5, 0.5), seed
    )
    (h_train, y_train), (h_cal, y_cal) = (_tensors([pool[i] for i in half.tolist()]) for half in halves)
    return train_layer(
        h_train,
        y_train,
        h_cal,
        y_cal,
        num_classes=fitting.estimator.adaptor.num_classes,
        generator=torch.Generator().manual_seed(seed),
        alphas=fitting.alphas,
        settings=fitting.layer,
        conventions=fitting.estimator.conventions,
    ).estimator


def _tensors(answers: list[Labelled]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([answer.h for answer in answers]), torch.tensor([answer.label for answer in answers])
