"""Distance quantiles: strict counts, the minimum over classes, and empty classes."""

from __future__ import annotations

import pytest
import torch

from candor.sdm.conventions import RECORDED
from candor.sdm.distance import ClasswiseECDF


def test_quantile_by_hand() -> None:
    ecdf = ClasswiseECDF.from_classes([torch.tensor([3.0, 1.0, 2.0, 4.0]), torch.tensor([2.0, 10.0])])
    distances = torch.tensor([0.0, 1.0, 1.5, 2.0, 4.0, 4.5, 10.0, float("inf")])
    # Class 0 alone: 1, 1, 3/4, 3/4, 1/4, 0, 0, 0. Class 1 alone: 1, 1, 1, 1, 1/2, 1/2, 1/2, 0.
    assert ecdf.quantile(distances).tolist() == [1.0, 1.0, 0.75, 0.75, 0.25, 0.0, 0.0, 0.0]
    assert ecdf.sizes().tolist() == [4, 2]
    assert ecdf.of_class(0).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_the_largest_entry_has_quantile_one_over_n_and_twins_share_theirs() -> None:
    ecdf = ClasswiseECDF.from_classes([torch.tensor([5.0, 1.0, 5.0])])
    assert ecdf.quantile(torch.tensor([5.0])).item() == pytest.approx(2 / 3)
    assert ecdf.quantile(torch.tensor([5.0000005])).item() == 0.0


def test_only_rows_with_similarity_enter_their_true_class() -> None:
    d_nearest, q = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1, 0, 5, 1])
    ecdf = ClasswiseECDF.fit(d_nearest, q, torch.tensor([0, 0, 1, 0]), 2)
    assert ecdf.of_class(0).tolist() == [1.0, 4.0]
    assert ecdf.of_class(1).tolist() == [3.0]


def test_an_empty_class_is_left_out_by_default_and_zero_as_recorded() -> None:
    ecdf = ClasswiseECDF.from_classes([torch.tensor([1.0, 2.0]), torch.empty(0)])
    distance = torch.tensor([1.5])
    assert ecdf.quantile(distance).item() == 0.5
    assert ecdf.quantile(distance, RECORDED).item() == 0.0


def test_without_any_entry_every_distance_is_beyond() -> None:
    ecdf = ClasswiseECDF.from_classes([torch.empty(0), torch.empty(0)])
    assert ecdf.quantile(torch.tensor([0.0, 1.0])).tolist() == [0.0, 0.0]


def test_a_quantile_is_rounded_once() -> None:
    """To float32, from a double: 1 - k / 49 rounded on the way as well would differ for some k."""
    ecdf = ClasswiseECDF.from_classes([torch.arange(49.0)])
    expected = [1 - k / 49 for k in range(50)]
    assert ecdf.quantile(torch.arange(50) - 0.5).tolist() == torch.tensor(expected).tolist()
