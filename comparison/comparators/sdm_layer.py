"""The bundle's own layer, used in three ways (2509.12760).

    SDM_alpha     admitted where SDM(z')_y_hat >= alpha, without the region
    SDM_HR        the region of Algorithm 1; confidence q'
    SDM_HR lower  the region by the lower band of d for the sample size, as served; confidence q'_lower

q' and SDM(z')_y_hat order rows differently; each way is ranked by the value that its threshold is on. The lower band
depends on alpha; the ranking is that of the lowest alpha.
"""

from __future__ import annotations

from candor.comparison.comparators.base import Fitting, MethodVerdicts, Rows, Scorer, by_classes


def fit_alpha(fitting: Fitting) -> Scorer:
    def score(rows: Rows) -> MethodVerdicts:
        _, sdm, _ = fitting.estimator.activate(rows.measurement)
        verdicts = by_classes(sdm.double(), fitting.alphas)
        # At d = 0 SDM is uniform and its argmax is meaningless, so the verdict is always that of z'.
        return MethodVerdicts(rows.y_hat, verdicts.confidence, verdicts.probability, verdicts.admitted)

    return score


def fit_region(fitting: Fitting) -> Scorer:
    def score(rows: Rows) -> MethodVerdicts:
        judged = {alpha: fitting.estimator.judge(rows.measurement, alpha) for alpha in fitting.alphas}
        one = judged[min(judged)]
        admitted = {alpha: estimate.admitted for alpha, estimate in judged.items()}
        return MethodVerdicts(one.y_hat, one.q_prime.double(), one.sdm.double().amax(1), admitted)

    return score


def fit_region_lower(fitting: Fitting) -> Scorer:
    def score(rows: Rows) -> MethodVerdicts:
        judged = {alpha: fitting.estimator.judge(rows.measurement, alpha) for alpha in fitting.alphas}
        one = judged[min(judged)]
        admitted = {alpha: estimate.admitted_lower for alpha, estimate in judged.items()}
        return MethodVerdicts(one.y_hat, one.q_prime_lower.double(), one.sdm_lower.double().amax(1), admitted)

    return score
