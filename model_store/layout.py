"""The tensors of an estimator's file. The type, shape and range of each is checked before use.

    D  width of h, from the representation      C  classes           A  alphas
    M  width of the exemplar vectors h'         N  support rows      K  calibration rows
    E  distances in the classwise eCDFs

Manifest and exemplars give D, C, A and N. The first tensor that has M, K or E gives its size, and all others must
agree. Only thresholds may be infinite, which means that no region was found at that alpha. NaN is never allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from candor.model_store.errors import Difference

_MOST = torch.finfo(torch.float32).max
_LEAST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Spec:
    """One tensor's dtype, its shape in the letters above, and the range [least, most] of its values."""

    dtype: torch.dtype
    shape: tuple[str, ...]
    least: float
    most: float


def layout(num_classes: int) -> dict[str, Spec]:
    """Returns the specs of the tensors of estimator.safetensors by name (`SDMEstimator.state`)."""
    single, double, integer = torch.float32, torch.float64, torch.int64
    last = num_classes - 1
    inf = float("inf")
    return {
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


def check(tensors: Mapping[str, Tensor], *, d: int, c: int, a: int, n: int) -> list[Difference]:
    """Returns the differences, [] if there are none. d, c, a, n: the sizes D, C, A and N."""
    specs = layout(c)
    faults = [
        Difference(name, "no such tensor", _describe(tensors[name])) for name in tensors.keys() - specs.keys()
    ]
    faults += [
        Difference(name, _describe_spec(specs[name]), "nothing") for name in specs.keys() - tensors.keys()
    ]
    sizes = {"D": d, "C": c, "C + 1": c + 1, "A": a, "N": n}
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
    return sorted(faults, key=lambda one: one.where) or _check_ecdf(tensors)


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
