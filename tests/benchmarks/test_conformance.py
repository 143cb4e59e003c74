"""The recorded vectors are met, all of them are looked at, and a changed one is found.

tests/golden was recorded from the public reference implementation; its README.json says how.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.conformance.__main__ import INFORMATIVE, check, main
from benchmarks.conformance.fixture import find, load
from candor.sdm.conventions import RECORDED
from candor.sdm.similarity import neighbourhood, support_neighbourhood
from candor.sdm.support import Support

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("path", find(GOLDEN), ids=lambda path: path.stem)
def test_every_recorded_vector_is_met_and_none_is_left_out(path: Path) -> None:
    fixture = load(path)
    tally = check(fixture)
    assert not tally.mismatches
    assert tally.rows > 0
    assert set(fixture.unread()) <= INFORMATIVE


@pytest.mark.parametrize("name", ["s01_c2_overlap", "s04_ties_duplicates", "s07_far_and_identical"])
def test_with_ties_in_support_order_q_is_met_on_every_row(name: str) -> None:
    """Stricter than the masks allow: also where q hangs on the order of equal distances."""
    f = load(GOLDEN / f"{name}.npz")
    support = Support(f["train_h"], f["y_train"], f["train_y_hat"])
    assert torch.equal(support_neighbourhood(support, RECORDED).q, f["train_q_selfexcl"])
    for p in ("cal", "test"):
        got = neighbourhood(f[f"{p}_h"], f[f"{p}_y_hat"], support, max_q=2048)
        assert torch.equal(got.q, f[f"{p}_q"])
        assert torch.equal(got.nearest, f[f"{p}_nearest_idx"])


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("s03_no_finite_qmin", "conv_weight"),
        ("s03_no_finite_qmin", "train_h"),
        ("s03_no_finite_qmin", "train_ecdf_d_sq_values"),
        ("s03_no_finite_qmin", "ecdf_d_sq_values"),
        ("s03_no_finite_qmin", "q_prime_sorted_values"),
        ("s03_no_finite_qmin", "q_prime_min"),
        ("s03_no_finite_qmin", "psi"),
        ("s03_no_finite_qmin", "cal_sdm_stored"),
        ("s03_no_finite_qmin", "test_h"),
        ("s03_no_finite_qmin", "test_z"),
        ("s03_no_finite_qmin", "test_y_hat"),
        ("s03_no_finite_qmin", "test_q"),
        ("s03_no_finite_qmin", "test_d_nearest_sq"),
        ("s03_no_finite_qmin", "test_nearest_idx"),
        ("s03_no_finite_qmin", "test_d"),
        ("s03_no_finite_qmin", "test_sdm"),
        ("s03_no_finite_qmin", "test_q_prime"),
        ("s03_no_finite_qmin", "test_is_ood"),
        ("s03_no_finite_qmin", "test_is_hr"),
        ("s03_no_finite_qmin", "test_is_hr_lower"),
        ("s03_no_finite_qmin", "test_n_eff"),
        ("s03_no_finite_qmin", "test_dkw_eps"),
        ("s03_no_finite_qmin", "test_d_upper"),
        ("s03_no_finite_qmin", "test_sdm_lower"),
        ("s03_no_finite_qmin", "test_q_prime_lower"),
        ("s08_support_update", "after_q"),
        ("s08_support_update", "added_h"),
        ("s09_train_trace", "epoch_fc_bias"),
        ("s09_train_trace", "train_q"),
        ("s09_train_trace", "cal_d"),
        ("s09_train_trace", "best_epoch"),
        ("s10_units", "act_c3_grad_z"),
        ("s10_units", "alg1_psi"),
        ("s11_ensemble", "ens_sdm_lower"),
        ("s12_lm_loss", "lm1_reward_grad"),
        ("s12_lm_loss", "lm0_ce_loss"),
    ],
)
def test_one_changed_value_is_found(name: str, array: str) -> None:
    fixture = load(GOLDEN / f"{name}.npz")
    values = fixture.arrays[array] = fixture.arrays[array].clone()
    flat = values.view(-1)
    if values.is_floating_point():
        flat[0] = flat[0] * 1.01 + 0.01 if torch.isfinite(flat[0]) else 3.0
    else:
        flat[0] = 1 - flat[0] if flat[0] in (0, 1) else flat[0] + 1
    assert check(fixture).mismatches


def copied(name: str, folder: Path, **changed: torch.Tensor) -> Path:
    """A recorded fixture with some of its arrays replaced."""
    with np.load(GOLDEN / f"{name}.npz") as recorded:
        arrays = dict(recorded)
    for array, value in changed.items():
        assert value.shape == arrays[array].shape
        arrays[array] = value.numpy().astype(arrays[array].dtype)
    np.savez(folder / f"{name}.npz", **arrays)
    shutil.copy(GOLDEN / f"{name}.json", folder)
    return folder / f"{name}.npz"


def with_speaker(folder: Path, row: int, model: int, **changed: torch.Tensor) -> Path:
    """s11, had rounding let this model speak in this row: its values stand for the ensemble's, of both estimators."""
    f = load(GOLDEN / "s11_ensemble.npz")
    for bound in ("", "_lower"):
        top = f[f"models_sdm{bound}"][row, model, f["ens_y_hat"][row]]
        similarity = f["models_q"][row, model].double()
        told = {
            f"ens_min_sdm{bound}_model": torch.tensor(model),
            f"ens_sdm{bound}": f[f"models_sdm{bound}"][row, model],
            f"ens_q_prime{bound}": torch.minimum(similarity, (2 + similarity) ** top.double()),
        }
        for array, value in told.items():
            changed[array] = f[array].clone()
            changed[array][row] = value
    return copied("s11_ensemble", folder, **changed)


ALL_AGREE, TWO_AGREE = 150, 153
"""Rows of s11 where all three models have d = 0, hence 1/2: all vote 0; the third votes 1."""


def test_which_of_equal_models_speaks_is_rounding(tmp_path: Path) -> None:
    f = load(GOLDEN / "s11_ensemble.npz")
    assert not f["models_d"][[ALL_AGREE, TWO_AGREE]].any()
    assert f["models_q"][ALL_AGREE].tolist() == [26, 11, 2]  # so q' tells who spoke
    for model in range(3):
        assert not check(load(with_speaker(tmp_path, ALL_AGREE, model))).mismatches
    # As the recorded implementation rounds it: a little under 1/2.
    rounded = f["models_sdm"].clone()
    rounded[ALL_AGREE, 2] = torch.tensor([0.49999997, 0.50000003])
    assert not check(load(with_speaker(tmp_path, ALL_AGREE, 2, models_sdm=rounded))).mismatches


def test_but_it_must_be_one_of_them_and_be_quoted_rightly(tmp_path: Path) -> None:
    wrong_vote = check(load(with_speaker(tmp_path, TWO_AGREE, 2))).mismatches
    assert {"ens_min_sdm_model in doubt", "end to end: ens_min_sdm_model in doubt"} <= set(wrong_vote)
    f = load(GOLDEN / "s11_ensemble.npz")
    differing = int((f["models_sdm"][:, :, 0].amax(1) - f["models_sdm"][:, :, 0].amin(1)).argmax())
    most_sure = int(f["models_sdm"][differing, :, f["ens_y_hat"][differing]].argmax())
    assert "ens_min_sdm_model" in check(load(with_speaker(tmp_path, differing, most_sure))).mismatches
    misquoted = f["ens_q_prime"].clone()
    misquoted[ALL_AGREE] = f["models_q_prime"][ALL_AGREE, 2]
    path = copied("s11_ensemble", tmp_path, ens_q_prime=misquoted)
    assert "ens_q_prime" in check(load(path)).mismatches


def test_a_fixture_without_standardisation(tmp_path: Path) -> None:
    """s03 with its two scalars folded into the weights: W ((x - m) / s) + b = (W / s) x + (b - W m / s)."""
    f = load(GOLDEN / "s03_no_finite_qmin.npz")
    mean, scale = f["mean_std"].tolist()
    weight = f["conv_weight"].double() / scale
    folded = {
        "conv_weight": weight,
        "conv_bias": f["conv_bias"] - mean * weight.sum(dim=1),
        "mean_std": torch.tensor([0.0, 1.0]),
    }
    assert not check(load(copied("s03_no_finite_qmin", tmp_path, **folded))).mismatches
    unfolded = copied("s03_no_finite_qmin", tmp_path, mean_std=folded["mean_std"])
    assert "train_h" in check(load(unfolded)).mismatches
    misread = copied("s03_no_finite_qmin", tmp_path, mean_std=torch.tensor([0.0, 1.001]))
    assert "mean_std" in check(load(misread)).mismatches


def test_a_changed_text_is_found() -> None:
    fixture = load(GOLDEN / "s13_text_formatting.json")
    fixture.settings[0]["parsed_sentences"] = ["another"]
    assert check(fixture).mismatches == {"parsed_sentences": 1}


def test_fixtures_are_known_by_content_not_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in (".npz", ".json"):
        shutil.copy(GOLDEN / f"s10_units{suffix}", tmp_path / f"h42{suffix}")
    shutil.copy(GOLDEN / "s13_text_formatting.json", tmp_path / "texts.json")
    shutil.copy(GOLDEN / "README.json", tmp_path)
    assert main([str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [line["name"] for line in report["fixtures"]] == ["h42", "texts"]
    assert report["mismatches"] == 0
    assert report["rows"] == sum(line["rows"] for line in report["fixtures"]) > 1000


def test_nothing_recognised_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "no fixtures" in capsys.readouterr().err
    (tmp_path / "odd.json").write_text('{"name": "odd"}')
    assert main([str(tmp_path)]) == 1
    assert "odd: 0 rows, 1 mismatches; nothing recognised (1)" in capsys.readouterr().out


def test_a_fixture_without_one_of_its_arrays_is_a_failure() -> None:
    fixture = load(GOLDEN / "s12_lm_loss.npz")
    del fixture.arrays["lm2_q"]
    assert any("ended early: KeyError: 'lm2_q'" in what for what in check(fixture).mismatches)
