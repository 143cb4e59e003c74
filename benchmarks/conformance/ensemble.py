"""Checks fixtures of J models on halves of one pool, each fitted end to end, and their combined verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from benchmarks.conformance.doubt import (
    admission_in_doubt,
    d_in_doubt,
    possible_speakers,
    q_range,
    y_in_doubt,
)
from benchmarks.conformance.fixture import Fixture, Tally
from benchmarks.conformance.recorded import adaptor_of
from candor.sdm.activation import sdm
from candor.sdm.conventions import RECORDED
from candor.sdm.ensemble import combine
from candor.sdm.estimator import SDMEstimator
from candor.sdm.outputs import Estimate
from candor.sdm.region import Region, q_prime


def check_ensemble(f: Fixture, t: Tally) -> None:
    models = f["models_q"].shape[1]
    recorded = [_recorded_estimate(f, t, j) for j in range(models)]
    everywhere = f["ens_mode_tied"] == 0
    _combined(f, t, "", recorded, everywhere, everywhere)

    fitted, sure, hr_sure = [], everywhere, everywhere
    for j in range(models):
        estimate, steady, hr_steady = _fitted_estimate(f, t, j)
        fitted.append(estimate)
        sure, hr_sure = sure & steady, hr_sure & steady & hr_steady
    _combined(f, t, "end to end: ", fitted, sure, hr_sure)


def _recorded_estimate(f: Fixture, t: Tally, j: int) -> Estimate:
    """Model j's recorded outputs; the others follow from them, or don't matter."""
    y_hat, q, scores, lower = (f[f"models_{name}"][:, j] for name in ("y_hat", "q", "sdm", "sdm_lower"))
    rescaled, rescaled_lower = (
        q_prime(q, s.gather(1, y_hat.unsqueeze(1)).squeeze(1)) for s in (scores, lower)
    )
    t.close(f"m{j}: q_prime", rescaled, f["models_q_prime"][:, j])
    blank = {field.name: torch.zeros(len(q)) for field in fields(Estimate)}
    known = {
        "y_hat": y_hat,
        "q": q,
        "sdm": scores,
        "sdm_lower": lower,
        "q_prime": f["models_q_prime"][:, j],
        "q_prime_lower": rescaled_lower,
        "is_ood": q == 0,
        "admitted": f.flags("models_is_hr")[:, j],
        "admitted_lower": f.flags("models_is_hr_lower")[:, j],
    }
    return Estimate(**(blank | known))


def _fitted_estimate(f: Fixture, t: Tally, j: int) -> tuple[Estimate, Tensor, Tensor]:
    """Model j from raw inputs and recorded weights; rows (n,) that don't depend on rounding, and verdicts."""
    alpha = float(f.settings["alpha"])
    conventions = replace(RECORDED, max_q=int(f.settings.get("max_q", 2048)))
    train, cal = f[f"m{j}_train_rows"], f[f"m{j}_cal_rows"]
    x, y = f["x_pool"], f["y_pool"]
    adaptor = adaptor_of(f, f"m{j}_")
    estimator = SDMEstimator.fit(adaptor, (x[train], y[train]), (x[cal], y[cal]), [alpha], conventions)
    region = Region(alpha, f.number(f"m{j}_q_prime_min"), f[f"m{j}_psi"])
    t.close(
        f"m{j}: q_prime_min",
        torch.tensor([estimator.regions[alpha].q_prime_min]),
        torch.tensor([region.q_prime_min]),
    )
    t.close(f"m{j}: psi", estimator.regions[alpha].psi, region.psi)

    seen = estimator.measure(f["x_test"])
    got = estimator.judge(seen, alpha)
    low, high = q_range(seen.h_prime, seen.y_hat, estimator.support, conventions.max_q)
    none = torch.zeros(len(low), adaptor.num_classes, dtype=torch.int64)
    doubtful_d = d_in_doubt(seen.d_nearest, estimator.ecdf, seen.h_prime, none)
    steady = ~((low != high) | doubtful_d | y_in_doubt(seen.z_prime))
    for name, value in {"q": got.q, "y_hat": got.y_hat}.items():
        t.equal(f"m{j}: {name}", value, f[f"models_{name}"][:, j], steady)
    recorded_d = f["models_d"][:, j]
    t.close(f"m{j}: d", got.d, recorded_d, 1e-6, steady)
    for name, value in {"sdm": got.sdm, "q_prime": got.q_prime}.items():
        t.close(f"m{j}: {name}", value, f[f"models_{name}"][:, j], where=steady)
    stage = sdm(seen.z_prime, f["models_q"][:, j], recorded_d)
    t.close(f"m{j}: sdm from q and d", stage, f["models_sdm"][:, j], where=~y_in_doubt(seen.z_prime))
    lower = f["models_sdm_lower"][:, j]
    t.close(f"m{j}: sdm_lower", got.sdm_lower, lower, where=steady)
    sure = ~(
        admission_in_doubt(f["models_sdm"][:, j], f["models_q_prime"][:, j], region)
        | admission_in_doubt(lower, got.q_prime_lower, region)
    )
    t.equal(f"m{j}: is_hr", got.admitted, f.flags("models_is_hr")[:, j], steady & sure)
    t.equal(f"m{j}: is_hr_lower", got.admitted_lower, f.flags("models_is_hr_lower")[:, j], steady & sure)
    return got, steady, sure


def _combined(
    f: Fixture, t: Tally, prefix: str, estimates: Sequence[Estimate], sure: Tensor, hr_sure: Tensor
) -> None:
    got = combine(estimates)
    t.equal(f"{prefix}ens_y_hat", got.y_hat, f["ens_y_hat"], sure)
    t.equal(f"{prefix}ens_is_hr", got.admitted, f.flags("ens_is_hr"), hr_sure)
    t.equal(f"{prefix}ens_is_hr_lower", got.admitted_lower, f.flags("ens_is_hr_lower"), hr_sure)
    t.equal(f"{prefix}ens_any_is_ood", got.is_ood, f.flags("ens_any_is_ood"), sure)
    votes, rows = torch.stack([e.y_hat for e in estimates], dim=1), torch.arange(len(sure))
    for bound, speaker in {"": got.speaker, "_lower": got.speaker_lower}.items():
        scores, rescaled = (
            torch.stack([getattr(e, name + bound) for e in estimates], dim=1) for name in ("sdm", "q_prime")
        )  # (n, J, C), (n, J)
        possible = possible_speakers(scores, votes, got.y_hat)
        doubt = possible.sum(dim=1) > 1
        model, recorded = f"ens_min_sdm{bound}_model", f[f"ens_min_sdm{bound}_model"]
        t.true(f"{prefix}{model} in doubt", possible[rows, recorded], sure & doubt)
        t.equal(f"{prefix}{model}", speaker, recorded, sure & ~doubt)
        heard = torch.where(doubt, recorded, speaker)
        t.close(f"{prefix}ens_sdm{bound}", scores[rows, heard], f[f"ens_sdm{bound}"], where=sure)
        t.close(f"{prefix}ens_q_prime{bound}", rescaled[rows, heard], f[f"ens_q_prime{bound}"], where=sure)
