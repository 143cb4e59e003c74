"""The recorded vectors are met, all of them are looked at, and a changed one is found.

tests/golden was recorded from the public reference implementation; its README.json says how.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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
