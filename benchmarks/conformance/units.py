"""Checks units: activation, loss and gradient; distance quantiles; sample sizes and bands; Algorithm 1."""

from __future__ import annotations

from itertools import count, pairwise

import torch

from benchmarks.conformance.fixture import Fixture, Tally
from candor.sdm.activation import log_base_sdm, sdm, sdm_loss
from candor.sdm.conventions import RECORDED
from candor.sdm.distance import ClasswiseECDF
from candor.sdm.region import find_region, q_prime
from candor.sdm.sample_size import dkw_epsilon, effective_sample_size


def check_units(f: Fixture, t: Tally) -> None:
    for c in range(2, 100):
        if f"act_c{c}_z" in f:
            _activation(f, t, f"act_c{c}")
    for i in count():
        if f"ecdf{i}_query" not in f:
            break
        ecdf = ClasswiseECDF.from_classes(f.ragged(f"ecdf{i}_support"))
        t.close(f"ecdf{i}", ecdf.quantile(f[f"ecdf{i}_query"], RECORDED), f[f"ecdf{i}_d"], 1e-6)
    for i in count():
        if f"neff{i}_query" not in f:
            break
        q_primes = ClasswiseECDF.from_classes(f.ragged(f"neff{i}_qprime"))
        n = effective_sample_size(f[f"neff{i}_query"], q_primes)
        t.equal(f"neff{i}_n", n, f[f"neff{i}_n"])
        t.close(f"neff{i}_eps", dkw_epsilon(n, f.number(f"neff{i}_alpha")), f[f"neff{i}_eps"])
    if "alg1_offsets" in f:
        _algorithm_1(f, t)


def _activation(f: Fixture, t: Tally, p: str) -> None:
    z_prime, q, d, y = (f[f"{p}_{name}"] for name in ("z", "q", "d", "y"))
    scores = sdm(z_prime, q, d)
    t.close(f"{p}_sdm", scores, f[f"{p}_sdm"])
    t.close(f"{p}_log_base_2q", log_base_sdm(z_prime, q, d), f[f"{p}_log_base_2q"])
    leaf = z_prime.clone().requires_grad_()
    loss = sdm_loss(leaf, q, d, y).mean()
    (gradient,) = torch.autograd.grad(loss, leaf)
    t.close(f"{p}_mean_nll", loss.detach().reshape(1), f[f"{p}_mean_nll"])
    # Gradients of a mean are small, so they are compared on the scale of one row's.
    t.close(f"{p}_grad_z", gradient * len(y), f[f"{p}_grad_z"] * len(y))
    top = scores.gather(1, z_prime.argmax(dim=1, keepdim=True)).squeeze(1)
    t.close(f"{p}_q_prime", q_prime(q, top), f[f"{p}_q_prime"])


def _algorithm_1(f: Fixture, t: Tally) -> None:
    sdm_all, q_all, y_all = f["alg1_sdm"], f["alg1_q_prime"], f["alg1_y"]
    alphas, classes = f["alg1_alpha"].tolist(), f["alg1_classes"].tolist()
    t.equal("alg1_is_ood", q_all < 1, f.flags("alg1_is_ood"))
    for i, (a, b) in enumerate(pairwise(f["alg1_offsets"].tolist())):
        c = classes[i]
        region = find_region(sdm_all[a:b, :c], q_all[a:b], y_all[a:b], alphas[i], RECORDED)
        t.close("alg1_q_prime_min", torch.tensor([region.q_prime_min]), f["alg1_q_prime_min"][i : i + 1])
        t.close("alg1_psi", region.psi.unsqueeze(0), f["alg1_psi"][i : i + 1, :c])
