"""Checks fixtures of one estimator, also before and after an update of its support.

Every array is compared twice: stage by stage on all rows, each stage fed with the recorded values of the one
before; and end to end from the raw inputs and recorded weights, on the rows that don't depend on rounding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.conformance.doubt import admission_in_doubt, d_in_doubt, n_range, q_range, y_in_doubt
from benchmarks.conformance.fixture import TOLERANCE, Fixture, Tally
from benchmarks.conformance.recorded import Fit, Recorded, adaptor_of
from candor.sdm.activation import sdm
from candor.sdm.adaptor import fit_standardisation
from candor.sdm.distance import ClasswiseECDF
from candor.sdm.estimator import SDMEstimator
from candor.sdm.outputs import Calibration, Measurement
from candor.sdm.region import Region, find_region, q_prime
from candor.sdm.sample_size import band, dkw_epsilon, effective_sample_size
from candor.sdm.similarity import neighbourhood, support_neighbourhood


def check_estimator(f: Fixture, t: Tally) -> None:
    """A fixture with weights, support and scored rows."""
    recorded = Recorded.of(f)
    adaptor = adaptor_of(f)
    if f["mean_std"].tolist() != [0.0, 1.0]:  # the recorded value where inputs are not standardised
        fitted_scalars = torch.stack(fit_standardisation(f["x_train"]))  # (2, D), all columns alike
        t.close("mean_std", fitted_scalars, f["mean_std"].float().unsqueeze(1).expand_as(fitted_scalars))
    fitted = SDMEstimator.fit(
        adaptor,
        (f["x_train"], f["y_train"]),
        (f["x_cal"], f["y_cal"]),
        [recorded.alpha, *f.settings.get("alpha_variants", [])],
        recorded.conventions,
    )
    same_ecdf, same_region = recorded.shared_by(f, t, fitted)
    fit = Fit(fitted, same_ecdf, same_region)
    _training_half(f, t, recorded, fitted)
    if "cal_q" in f:
        _calibration_half(f, t, recorded, fitted)
    _scored(f, t, recorded, "cal", "x_cal", fit)
    _scored(f, t, recorded, "test", "x_test", fit)
    _scored(f, t, recorded, "before", "x_test", fit)
    if "x_added" in f:
        added = fitted.measure(f["x_added"])
        t.close("added_h", added.h_prime, f["added_h"])
        t.equal("added_y_hat", added.y_hat, f["added_y_hat"], ~y_in_doubt(added.z_prime))
        grown = recorded.support.updated(f["added_h"], f["y_added"], f["added_y_hat"])
        updated = fitted.updated(f["y_added"], added.y_hat, added.h_prime)
        _scored(f, t, replace(recorded, support=grown), "after", "x_test", replace(fit, estimator=updated))
    for alpha in f.settings.get("alpha_variants", []):
        _variant(f, t, recorded, alpha)


def _training_half(f: Fixture, t: Tally, recorded: Recorded, fitted: SDMEstimator) -> None:
    seen = fitted.measure(f["x_train"])
    t.close("train_h", seen.h_prime, f["train_h"])
    if "train_z" in f:
        t.close("train_z", seen.z_prime, f["train_z"])
    t.equal("train_y_hat", seen.y_hat, f["train_y_hat"], ~y_in_doubt(seen.z_prime))

    support = recorded.support
    own = support_neighbourhood(support, recorded.conventions)
    left_out = neighbourhood(support.h_prime, support.predictions, support).nearest
    max_q = recorded.conventions.max_q
    low, high = q_range(support.h_prime, support.predictions, support, max_q and max_q - 1, left_out)
    q, d_nearest = f["train_q_selfexcl"], f["train_d_nearest_sq_selfexcl"]
    t.equal("train_q", own.q, q, low == high)
    t.true("train_q in doubt", _within(low, own.q, high) & _within(low, q, high), low != high)
    t.close("train_d_nearest", own.d_nearest, d_nearest)
    ecdf = ClasswiseECDF.fit(d_nearest, q, f["y_train"], fitted.adaptor.num_classes)
    _same_ecdf(t, "train_ecdf", ecdf, f.ragged("train_ecdf_d_sq"))
    t.close("train_d", ecdf.quantile(d_nearest, recorded.conventions), f["train_d_selfexcl"], 1e-6)


def _same_ecdf(t: Tally, what: str, ecdf: ClasswiseECDF, pieces: list[Tensor]) -> None:
    for c, piece in enumerate(pieces):
        t.close(f"{what}[{c}]", ecdf.of_class(c), piece)


def _calibration_half(f: Fixture, t: Tally, recorded: Recorded, fitted: SDMEstimator) -> None:
    """eCDFs, Algorithm 1 and the sorted q', from the recorded values of the calibration rows."""
    labels, conventions, alpha = f["y_cal"], recorded.conventions, recorded.alpha
    ecdf = ClasswiseECDF.fit(f["cal_d_nearest_sq"], f["cal_q"], labels, fitted.adaptor.num_classes)
    _same_ecdf(t, "ecdf", ecdf, f.ragged("ecdf_d_sq"))
    stored = Calibration(f["cal_sdm_stored"], f["cal_q_prime_stored"], labels)
    _same_ecdf(t, "q_prime_sorted", stored.q_prime_by_class, f.ragged("q_prime_sorted"))
    scores = sdm(f["cal_z"], f["cal_q"], f["cal_d"])
    t.close("cal_sdm_stored", scores, stored.sdm)
    t.close("cal_q_prime_stored", q_prime(f["cal_q"], _top(scores, f["cal_y_hat"])), stored.q_prime)
    t.equal("cal_is_ood_stored", stored.q_prime < 1, f.flags("cal_is_ood_stored"))
    _same_region(
        t, "region", find_region(stored.sdm, stored.q_prime, labels, alpha, conventions), recorded.region
    )
    steady = ~(f.flags("cal_sens_q") | f.flags("cal_sens_d"))
    t.close("end to end: cal_sdm_stored", fitted.calibration.sdm, stored.sdm, where=steady)
    t.close("end to end: cal_q_prime_stored", fitted.calibration.q_prime, stored.q_prime, where=steady)


def _same_region(t: Tally, what: str, got: Region, recorded: Region) -> None:
    t.close(
        f"{what}: q_prime_min",
        torch.tensor([got.q_prime_min]),
        torch.tensor([recorded.q_prime_min]),
        TOLERANCE,
    )
    t.close(f"{what}: psi", got.psi, recorded.psi, TOLERANCE)


def _measured(f: Fixture, p: str) -> Measurement:
    names = ("h", "z", "y_hat", "q", "d_nearest_sq", "nearest_idx")
    h, z, y_hat, q, d_nearest, nearest = (f[f"{p}_{name}"] for name in names)
    return Measurement(h, z, y_hat, q, d_nearest, nearest, torch.ones(len(q), dtype=torch.bool))


def _scored(f: Fixture, t: Tally, recorded: Recorded, p: str, inputs: str, fit: Fit) -> None:
    """The arrays that start with `p`: similarity and distance, then what follows from them."""
    if f"{p}_q" not in f:
        return
    seen = _measured(f, p)
    support, max_q = recorded.support, recorded.conventions.max_q
    near = neighbourhood(seen.h_prime, seen.y_hat, support, max_q=max_q)
    low, high = q_range(seen.h_prime, seen.y_hat, support, max_q)
    q_doubt = (low != high) | (f.flags(f"{p}_sens_q") if f"{p}_sens_q" in f else False)
    t.equal(f"{p}_q", near.q, seen.q, ~q_doubt)
    t.true(f"{p}_q in doubt", _within(low, near.q, high) & _within(low, seen.q, high), q_doubt)
    if f"{p}_q_f64" in f:
        t.equal(f"{p}_q_f64", near.q, f[f"{p}_q_f64"], ~q_doubt)
        t.true(f"{p}_q_f64 in doubt", _within(low, f[f"{p}_q_f64"], high), q_doubt)
    t.close(f"{p}_d_nearest", near.d_nearest, seen.d_nearest)
    t.close(
        f"{p}_nearest_idx",
        support.exact(seen.h_prime, torch.arange(len(near.q)), seen.nearest),
        near.d_nearest,
    )

    d = recorded.ecdf.quantile(seen.d_nearest, recorded.conventions)
    own = torch.zeros(len(d), recorded.ecdf.num_classes, dtype=torch.int64)
    if p == "cal":
        own.scatter_(1, f["y_cal"].unsqueeze(1), (seen.q > 0).long().unsqueeze(1))
    noisy = d_in_doubt(seen.d_nearest, recorded.ecdf, seen.h_prime, own)
    d_doubt = f.flags(f"{p}_sens_d") if f"{p}_sens_d" in f else noisy
    step = float(1 / recorded.ecdf.sizes().clamp(min=1).min())
    t.close(f"{p}_d", d, f[f"{p}_d"], torch.where(d_doubt, step + 1e-6, 1e-6))
    scores = sdm(seen.z_prime, seen.q, f[f"{p}_d"])
    t.close(f"{p}_sdm", scores, f[f"{p}_sdm"])
    rescaled = q_prime(seen.q, _top(f[f"{p}_sdm"], seen.y_hat))
    t.close(f"{p}_q_prime", rescaled, f[f"{p}_q_prime"])
    is_ood = f.flags(f"{p}_is_ood")
    t.equal(f"{p}_floor_q_prime", f[f"{p}_q_prime"].floor().long(), f[f"{p}_floor_q_prime"])
    t.equal(f"{p}_is_ood", rescaled < 1, is_ood)
    n = effective_sample_size(f[f"{p}_q_prime"], recorded.q_primes)
    t.equal(f"{p}_n_eff", n, f[f"{p}_n_eff"])
    per_class = dkw_epsilon(f[f"{p}_n_eff"], recorded.alpha)
    t.close(f"{p}_dkw_eps_per_class", per_class, f[f"{p}_dkw_eps_per_class"])
    _banded(f, t, seen, recorded.region, p, per_class.amax(dim=1), p)

    hr_doubt = f.flags(f"{p}_sens_hr") if f"{p}_sens_hr" in f else None
    if hr_doubt is None:
        hr_doubt = admission_in_doubt(f[f"{p}_sdm"], f[f"{p}_q_prime"], recorded.region)
    y_doubt = f.flags(f"{p}_sens_y") if f"{p}_sens_y" in f else y_in_doubt(seen.z_prime)
    sure = ~(q_doubt | d_doubt | noisy | y_doubt)
    _end_to_end(f, t, p, fit.estimator.measure(f[inputs]), sure, ~hr_doubt, recorded, fit)


def _within(low: Tensor, value: Tensor, high: Tensor) -> Tensor:
    return (low <= value) & (value <= high)


def _top(scores: Tensor, y_hat: Tensor) -> Tensor:
    return scores.gather(1, y_hat.unsqueeze(1)).squeeze(1)


def _banded(f: Fixture, t: Tally, seen: Measurement, region: Region, p: str, eps: Tensor, base: str) -> None:
    """Bands and both verdicts at `region`, in arrays `p`; arrays `base` don't depend on alpha."""
    t.close(f"{p}_dkw_eps", eps, f[f"{p}_dkw_eps"])
    lower, upper = band(f[f"{base}_d"], f[f"{p}_dkw_eps"])
    t.close(f"{p}_d_lower", lower, f[f"{p}_d_lower"])
    t.close(f"{p}_d_upper", upper, f[f"{p}_d_upper"])
    sdm_lower = f[f"{p}_sdm_lower"]
    t.close(f"{p}_sdm_lower", sdm(seen.z_prime, seen.q, f[f"{p}_d_lower"]), sdm_lower)
    t.close(f"{p}_sdm_upper", sdm(seen.z_prime, seen.q, f[f"{p}_d_upper"]), f[f"{p}_sdm_upper"])
    q_prime_lower = f[f"{p}_q_prime_lower"]
    t.close(f"{p}_q_prime_lower", q_prime(seen.q, _top(sdm_lower, seen.y_hat)), q_prime_lower)
    if f"{p}_floor_q_prime_lower" in f:
        t.equal(f"{p}_floor_q_prime_lower", q_prime_lower.floor().long(), f[f"{p}_floor_q_prime_lower"])
    is_ood = f.flags(f"{base}_is_ood")
    admitted = region.admit(f[f"{base}_sdm"], seen.y_hat, f[f"{base}_q_prime"], is_ood)
    t.equal(f"{p}_is_hr", admitted, f.flags(f"{p}_is_hr"))
    admitted_lower = region.admit(sdm_lower, seen.y_hat, q_prime_lower, is_ood)
    t.equal(f"{p}_is_hr_lower", admitted_lower, f.flags(f"{p}_is_hr_lower"))


def _variant(f: Fixture, t: Tally, recorded: Recorded, alpha: float) -> None:
    """The same model at another alpha, arrays aXX_test_*."""
    p = f"a{round(100 * alpha)}"
    found = find_region(f["cal_sdm_stored"], f["cal_q_prime_stored"], f["y_cal"], alpha, recorded.conventions)
    region = Region(alpha, f.number(f"{p}_q_prime_min"), f[f"{p}_psi"])
    _same_region(t, f"{p} region", found, region)
    seen = _measured(f, "test")
    eps = dkw_epsilon(f["test_n_eff"], alpha).amax(dim=1)
    _banded(f, t, seen, region, f"{p}_test", eps, "test")


def _end_to_end(
    f: Fixture,
    t: Tally,
    p: str,
    seen: Measurement,
    sure: Tensor,
    hr_sure: Tensor,
    recorded: Recorded,
    fit: Fit,
) -> None:
    def close(name: str, got: Tensor, where: Tensor, tolerance: float = TOLERANCE) -> None:
        t.close(f"end to end: {p}_{name}", got, f[f"{p}_{name}"], tolerance, where)

    def equal(name: str, got: Tensor, where: Tensor) -> None:
        t.equal(f"end to end: {p}_{name}", got, f[f"{p}_{name}"].to(got), where)

    got = fit.estimator.judge(seen, recorded.alpha)
    everywhere = torch.ones_like(sure)
    close("h", seen.h_prime, everywhere)
    close("z", got.z_prime, everywhere)
    equal("y_hat", got.y_hat, sure)
    equal("q", got.q, sure)
    close("d_nearest_sq", got.d_nearest, sure)
    if not fit.same_ecdf:
        return
    close("d", got.d, sure, 1e-6)
    close("sdm", got.sdm, sure)
    close("q_prime", got.q_prime, sure)
    equal("is_ood", got.is_ood, sure)
    equal("is_hr", got.admitted, sure & hr_sure & fit.same_region)
    low, high = n_range(f[f"{p}_q_prime"], recorded.q_primes)
    n = got.effective_sample_size
    t.true(f"end to end: {p}_n_eff in range", _within(low, n, high), sure)
    same_n = sure & (n == f[f"{p}_n_eff"]).all(dim=1)
    close("dkw_eps", got.epsilon, same_n)
    close("d_lower", got.d_lower, same_n)
    close("d_upper", got.d_upper, same_n)
    close("sdm_lower", got.sdm_lower, same_n)
    close("sdm_upper", got.sdm_upper, same_n)
    close("q_prime_lower", got.q_prime_lower, same_n)
    lower_sure = ~admission_in_doubt(f[f"{p}_sdm_lower"], f[f"{p}_q_prime_lower"], recorded.region)
    equal("is_hr_lower", got.admitted_lower, same_n & lower_sure & fit.same_region)
