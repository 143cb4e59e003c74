"""Converts an estimator to flat tensors, as a bundle's safetensors file keeps them, and back.

    adaptor.*  support.*  ecdf.*  calibration.*  regions.alpha (A,)  regions.q_prime_min (A,)  regions.psi (A, C)

Floats keep their bits; an infinite threshold is an infinity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType

import torch
from torch import Tensor

from candor.sdm.adaptor import ExemplarAdaptor
from candor.sdm.distance import ClasswiseECDF
from candor.sdm.outputs import Calibration
from candor.sdm.region import Region
from candor.sdm.support import Support

Regions = Mapping[float, Region]

_GROUPS = {
    "adaptor": ("mean", "scale", "exemplar.weight", "exemplar.bias", "head.weight", "head.bias"),
    "support": tuple(field.name for field in fields(Support)),
    "ecdf": tuple(field.name for field in fields(ClasswiseECDF)),
    "calibration": tuple(field.name for field in fields(Calibration)),
    "regions": ("alpha", "q_prime_min", "psi"),
}
STATE_NAMES = frozenset(f"{group}.{name}" for group, names in _GROUPS.items() for name in names)
"""The names of `SDMEstimator.state`."""


def flatten(
    adaptor: ExemplarAdaptor,
    support: Support,
    ecdf: ClasswiseECDF,
    calibration: Calibration,
    regions: Regions,
) -> dict[str, Tensor]:
    """One tensor for each of `STATE_NAMES`."""
    found = list(regions.values())
    psi = [region.psi for region in found]
    state = {f"adaptor.{name}": value for name, value in adaptor.state_dict().items()}
    for group, part in {"support": support, "ecdf": ecdf, "calibration": calibration}.items():
        state |= {f"{group}.{name}": getattr(part, name) for name in _GROUPS[group]}
    state["regions.alpha"] = torch.tensor([region.alpha for region in found], dtype=torch.float64)
    state["regions.q_prime_min"] = torch.tensor([region.q_prime_min for region in found], dtype=torch.float64)
    state["regions.psi"] = torch.stack(psi) if psi else torch.empty(0, adaptor.num_classes)
    return state


def restore(
    state: Mapping[str, Tensor],
) -> tuple[ExemplarAdaptor, Support, ClasswiseECDF, Calibration, Regions]:
    """The parts of `flatten`. Raises ValueError naming missing or unexpected tensors."""
    if set(state) != STATE_NAMES:
        missing, unexpected = sorted(STATE_NAMES - set(state)), sorted(set(state) - STATE_NAMES)
        raise ValueError(f"estimator tensors: missing {missing}, unexpected {unexpected}")
    parts = {group: {name: state[f"{group}.{name}"] for name in names} for group, names in _GROUPS.items()}
    weights = parts["adaptor"]
    exemplar_dim, num_classes = len(weights["exemplar.bias"]), len(weights["head.bias"])
    adaptor = ExemplarAdaptor(weights["mean"], weights["scale"], exemplar_dim, num_classes)
    adaptor.load_state_dict(weights)
    alphas, bounds = parts["regions"]["alpha"].tolist(), parts["regions"]["q_prime_min"].tolist()
    regions = {
        alpha: Region(alpha, q_prime_min, psi)
        for alpha, q_prime_min, psi in zip(alphas, bounds, parts["regions"]["psi"], strict=True)
    }
    return (
        adaptor,
        Support(**parts["support"]),
        ClasswiseECDF(**parts["ecdf"]),
        Calibration(**parts["calibration"]),
        MappingProxyType(regions),
    )
