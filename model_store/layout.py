"""The tensors of an estimator's file. The type, shape and range of each is checked before use.

    D  width of h, from the representation      C  classes           A  alphas
    M  width of the exemplar vectors h'         N  support rows      K  calibration rows
    E  distances in the classwise eCDFs

and, if the bundle has a two-gate rule,

    P  width of a prompt's states, 2 H          G  components        R  reference distances of gate and probe
    P + D + F: what the score weighs; F figures of the layer (`sdm.score.FIGURES`)

Manifest and exemplars give D, C, A, N and P. The first tensor that has another letter gives its size, and all others
must agree. Only thresholds may be infinite, which means that no region was found at that alpha. NaN is never allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from candor.model_store.errors import Difference
from candor.sdm.score import FIGURES

_MOST = torch.finfo(torch.float32).max
_LEAST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Spec:
    """One tensor's dtype, its shape in the letters above, and the range [least, most] of its values."""

    dtype: torch.dtype
    shape: tuple[str, ...]
    least: float
    most: float


RULE = "rule."
"""What the names of a rule's tensors begin with."""


def layout(
    num_classes: int, *, rule: bool = False, probe: bool = False, forecast: bool = False
) -> dict[str, Spec]:
    """Returns the specs of the tensors of estimator.safetensors by name: `SDMEstimator.state`, `AnswerRule.state`.

    rule: whether there is one. probe, forecast: whether it has one.
    """
    single, double, integer = torch.float32, torch.float64, torch.int64
    last = num_classes - 1
    inf = float("inf")
    specs = {
        "adaptor.mean": Spec(single, ("D",), -_MOST, _MOST),
        "adaptor.scale": Spec(single, ("D",), _LEAST_SCALE, _MOST),
        "adaptor.exemplar.weight": Spec(single, ("M", "D"), -_MOST, _MOST),
        "adaptor.exemplar.bias": Spec(single, ("M",), -_MOST, _MOST),
        "adaptor.head.weight": Spec(single, ("C", "M"), -_MOST, _MOST),
        "adaptor.head.bias": Spec(single, ("C",), -_MOST, _MOST),
        "support.h_prime": Spec(single, ("N", "M"), -_MOST, _MOST),
        "support.labels": Spec(integer, ("N",), -99, last),
        "support.predictions": Spec(integer, ("N",), 0, last),
        "ecdf.values": Spec(single, ("E",), 0, _MOST),
        "ecdf.offsets": Spec(integer, ("C + 1",), 0, inf),
        "calibration.sdm": Spec(single, ("K", "C"), 0, 1),
        "calibration.q_prime": Spec(single, ("K",), 0, _MOST),
        "calibration.labels": Spec(integer, ("K",), 0, last),
        "regions.alpha": Spec(double, ("A",), 0.5, 1),
        "regions.q_prime_min": Spec(double, ("A",), 1, inf),
        "regions.psi": Spec(single, ("A", "C"), 0.5, inf),
    }
    gate_and_score = {
        "gate.mean": Spec(single, ("P",), -_MOST, _MOST),
        "gate.scale": Spec(single, ("P",), _LEAST_SCALE, _MOST),
        "gate.whitening": Spec(single, ("G", "P"), -_MOST, _MOST),
        "gate.deviations": Spec(double, ("G",), _LEAST_SCALE, _MOST),
        "gate.residual_variance": Spec(double, (), _LEAST_SCALE, _MOST),
        "gate.reference": Spec(double, ("R",), 0, _MOST),
        "gate.rank_cut": Spec(integer, (), 0, inf),
        "score.weight": Spec(single, ("P + D + F",), -_MOST, _MOST),
        "score.bias": Spec(single, (), -_MOST, _MOST),
        "score.slope": Spec(double, (), -_MOST, _MOST),
        "score.intercept": Spec(double, (), -_MOST, _MOST),
    }
    probed = {
        "probe.weight": Spec(single, ("P",), -_MOST, _MOST),
        "probe.reference": Spec(double, ("R",), -_MOST, _MOST),
        "probe.rank_cut": Spec(integer, (), 0, inf),
    }
    foretold = {
        "forecast.weight": Spec(single, ("P",), -_MOST, _MOST),
        "forecast.bias": Spec(single, (), -_MOST, _MOST),
    }
    own = (gate_and_score if rule else {}) | (probed if probe else {}) | (foretold if forecast else {})
    return specs | {RULE + name: spec for name, spec in own.items()}


def check(
    tensors: Mapping[str, Tensor],
    *,
    d: int,
    c: int,
    a: int,
    n: int,
    p: int | None = None,
    probe: bool = False,
    forecast: bool = False,
) -> list[Difference]:
    """Returns the differences, [] if there are none. d, c, a, n, p: the sizes D, C, A, N and P; p is None if the
    bundle has no rule. probe, forecast: whether the rule has one."""
    specs = layout(c, rule=p is not None, probe=probe, forecast=forecast)
    faults = [
        Difference(name, "no such tensor", _describe(tensors[name])) for name in tensors.keys() - specs.keys()
    ]
    faults += [
        Difference(name, _describe_spec(specs[name]), "nothing") for name in specs.keys() - tensors.keys()
    ]
    sizes = {"D": d, "C": c, "C + 1": c + 1, "A": a, "N": n}
    if p is not None:
        sizes |= {"P": p, "P + D + F": p + d + len(FIGURES)}
    for name, spec in specs.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if len(tensor.shape) == len(spec.shape):
            for letter, size in zip(spec.shape, tensor.shape, strict=True):
                sizes.setdefault(letter, size)
        shape = tuple(sizes.get(letter, 0) for letter in spec.shape)
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != shape:
            known = ", ".join(f"{letter} = {sizes[letter]}" for letter in spec.shape if letter in sizes)
            faults.append(Difference(name, f"{_describe_spec(spec)}, {known}", _describe(tensor)))
        # This form refuses NaN, which is in no range.
        elif not bool(((tensor >= spec.least) & (tensor <= spec.most)).all()):
            faults.append(Difference(name, f"values in [{spec.least:g}, {spec.most:g}]", _extremes(tensor)))
    return sorted(faults, key=lambda one: one.where) or _check_ecdf(tensors) + _check_ranks(tensors)


def _check_ranks(tensors: Mapping[str, Tensor]) -> list[Difference]:
    faults = []
    for part in (RULE + "gate.", RULE + "probe."):
        if part + "reference" not in tensors:
            continue
        reference, cut = tensors[part + "reference"], int(tensors[part + "rank_cut"])
        if bool((reference.diff() < 0).any()):
            faults.append(Difference(part + "reference", "ascending distances", "a descent"))
        if cut > len(reference):
            faults.append(Difference(part + "rank_cut", f"at most {len(reference)}", str(cut)))
    return faults


def _check_ecdf(tensors: Mapping[str, Tensor]) -> list[Difference]:
    values, offsets = tensors["ecdf.values"], tensors["ecdf.offsets"].tolist()
    if offsets[0] != 0 or offsets[-1] != len(values) or offsets != sorted(offsets):
        return [Difference("ecdf.offsets", f"ascending from 0 to {len(values)}", str(offsets))]
    for start, end in pairwise(offsets):
        if bool((values[start:end].diff() < 0).any()):
            return [
                Difference("ecdf.values", "ascending values in each class", f"a descent in {start}:{end}")
            ]
    return []


def _describe_spec(spec: Spec) -> str:
    return f"{_short(spec.dtype)} ({', '.join(spec.shape)})"


def _describe(tensor: Tensor) -> str:
    return f"{_short(tensor.dtype)} ({', '.join(map(str, tensor.shape))})"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _extremes(tensor: Tensor) -> str:
    nans = int(tensor.isnan().sum())
    return f"{nans} NaN" if nans else f"[{float(tensor.min()):g}, {float(tensor.max()):g}]"
