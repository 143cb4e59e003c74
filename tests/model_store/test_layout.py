"""Every tensor has its name, type, shape and range; each fault is named with what was expected."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from candor.model_store.layout import check, layout
from candor.sdm.estimator import STATE_NAMES, SDMEstimator

SPECS = layout(2)
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def tensors(estimator: SDMEstimator) -> dict[str, Tensor]:
    return estimator.state()


def _check(tensors: dict[str, Tensor]) -> dict[str, tuple[str, str]]:
    return {one.where: (one.expected, one.actual) for one in check(tensors, d=11, c=2, a=2, n=40)}


def test_an_estimator_s_own_state(tensors: dict[str, Tensor]) -> None:
    assert set(SPECS) == STATE_NAMES
    assert _check(tensors) == {}


@pytest.mark.parametrize("name", SPECS)
def test_a_missing_tensor(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]
    (fault,) = _check(tensors).items()
    assert fault[0] == name
    assert fault[1][1] == "nothing"


def test_an_extra_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["more"] = torch.zeros(2, 3, dtype=torch.float16)
    assert _check(tensors) == {"more": ("no such tensor", "float16 (2, 3)")}


@pytest.mark.parametrize("name", SPECS)
def test_another_type(tensors: dict[str, Tensor], name: str) -> None:
    other = torch.int32 if SPECS[name].dtype == torch.int64 else torch.float16
    tensors[name] = tensors[name].nan_to_num(posinf=1).to(other)
    assert set(_check(tensors)) == {name}


@pytest.mark.parametrize("name", SPECS)
def test_another_rank(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].unsqueeze(0)
    assert name in _check(tensors)


@pytest.mark.parametrize(
    ("name", "dim"), [(name, dim) for name, spec in SPECS.items() for dim in range(len(spec.shape))]
)
def test_a_row_too_few(tensors: dict[str, Tensor], name: str, dim: int) -> None:
    tensors[name] = tensors[name].narrow(dim, 1, tensors[name].shape[dim] - 1)
    faults = _check(tensors)
    letter = SPECS[name].shape[dim]
    # For sizes that nothing outside gives, whatever comes first is believed and its fellows are at fault.
    if letter in "DCAN" or letter == "C + 1":
        assert set(faults) == {name}
    elif letter == "E":
        assert set(faults) == {"ecdf.offsets"}
    else:
        assert faults


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, NAN) for name, spec in SPECS.items() if spec.dtype != torch.int64]
    + [(name, INF) for name, spec in SPECS.items() if spec.dtype != torch.int64 and spec.most < INF]
    + [(name, -INF) for name, spec in SPECS.items() if spec.dtype != torch.int64]
    + [
        ("adaptor.scale", 0.0),
        ("adaptor.scale", -1.0),
        ("support.labels", 2),
        ("support.labels", -100),
        ("support.predictions", -1),
        ("support.predictions", 2),
        ("ecdf.values", -1.0),
        ("ecdf.offsets", -1),
        ("calibration.sdm", 1.5),
        ("calibration.q_prime", -0.5),
        ("calibration.labels", -1),
        ("calibration.labels", 2),
        ("regions.alpha", 0.4),
        ("regions.q_prime_min", 0.5),
        ("regions.psi", 0.0),
    ],
)
def test_a_value_out_of_range(tensors: dict[str, Tensor], name: str, value: float) -> None:
    changed = tensors[name].clone()
    changed.view(-1)[0] = value
    tensors[name] = changed
    faults = _check(tensors)
    assert set(faults) == {name}
    assert faults[name][0].startswith("values in [")
    if value != value:
        assert faults[name][1] == "1 NaN"


def test_no_region_is_an_infinite_threshold(make_estimator: Callable[..., SDMEstimator]) -> None:
    tensors = make_estimator(alphas=(0.9, 1.0)).state()
    assert tensors["regions.q_prime_min"][1] == INF  # no number of points suffices at alpha = 1
    assert _check(tensors) == {}


@pytest.mark.parametrize("offsets", [[1, 2, 20], [0, 20, 10], [0, 5, 10**9]])
def test_offsets_that_are_no_bounds(tensors: dict[str, Tensor], offsets: list[int]) -> None:
    tensors["ecdf.values"] = torch.arange(20.0)
    tensors["ecdf.offsets"] = torch.tensor(offsets)
    assert set(_check(tensors)) == {"ecdf.offsets"}


def test_distances_ascend_within_a_class_only(tensors: dict[str, Tensor]) -> None:
    tensors["ecdf.offsets"] = torch.tensor([0, 2, 4])
    tensors["ecdf.values"] = torch.tensor([1.0, 2.0, 0.5, 0.5])
    assert _check(tensors) == {}
    tensors["ecdf.values"] = torch.tensor([1.0, 2.0, 0.5, 0.4])
    assert set(_check(tensors)) == {"ecdf.values"}
