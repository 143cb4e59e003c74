"""A bundle with a two-gate rule: restored to the bit, and every fault of its tensors or terms named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from candor.model_store.bundle import Exemplar, encode, load_bundle
from candor.model_store.errors import ContentError, ManifestError
from candor.model_store.layout import RULE, layout
from candor.model_store.manifest import ESTIMATOR, MANIFEST, SEAL, FileEntry, Manifest, seal
from candor.policy.certificate import RuleCertificate, RuleTerms
from candor.sdm.estimator import SDMEstimator
from candor.sdm.forecast import ScoreForecast
from candor.sdm.gate import PromptGate
from candor.sdm.probe import StrangerProbe
from candor.sdm.rule import AnswerRule
from candor.sdm.score import AnswerScore

Files = dict[str, bytes]
Write = Callable[[Path, Files], Path]

AT_0_9 = RuleCertificate(0.9, 0.95, 0.95, 1.5, 400, 200, 197, 300, 0.96)
TERMS = RuleTerms("sum", 0.02, 0.019, 0.95, 12.5, 0, (AT_0_9,))


@pytest.fixture(scope="module")
def rule() -> AnswerRule:
    """Of states of 2 * 4 numbers, h of 11 and four figures."""
    draw = torch.Generator().manual_seed(3)
    gate = PromptGate.fit(
        torch.randn(40, 8, generator=draw), torch.randn(30, 8, generator=draw), (4, 4), 3, 2
    )
    one = torch.tensor(1.25, dtype=torch.float64)
    return AnswerRule(
        gate, AnswerScore(torch.randn(8 + 11 + 4, generator=draw), torch.tensor(0.5), one, -one)
    )


@pytest.fixture
def gated(
    manifest: Manifest, estimator: SDMEstimator, exemplars: Sequence[Exemplar], rule: AnswerRule
) -> Files:
    return encode(replace(manifest, rule=TERMS), estimator, exemplars, {}, rule)


def with_tensors(files: Files, change: Callable[[dict[str, torch.Tensor]], None]) -> Files:
    """The files with other tensors, sealed anew."""
    tensors = load(files[ESTIMATOR])
    change(tensors)
    data = save({name: tensor.clone().contiguous() for name, tensor in tensors.items()})
    manifest = Manifest.from_bytes(files[MANIFEST])
    written = replace(manifest, files=manifest.files | {ESTIMATOR: FileEntry.of(data)}).to_bytes()
    return files | {ESTIMATOR: data, MANIFEST: written, SEAL: seal(written)}


def test_a_rule_is_restored_to_the_bit(
    gated: Files, rule: AnswerRule, estimator: SDMEstimator, write: Write, tmp_path: Path
) -> None:
    bundle = load_bundle(write(tmp_path / "b", gated))
    assert bundle.rule is not None
    assert bundle.rule.terms == bundle.manifest.rule == TERMS
    restored = bundle.rule.rule.state()
    assert restored.keys() == rule.state().keys()
    assert all(value.equal(restored[name]) for name, value in rule.state().items())
    assert all(value.equal(bundle.estimator.state()[name]) for name, value in estimator.state().items())


def test_the_layout_lists_what_a_rule_keeps(rule: AnswerRule) -> None:
    assert set(layout(2, rule=True)) - set(layout(2)) == {RULE + name for name in rule.state()}


@pytest.mark.parametrize("name", sorted(set(layout(2, rule=True)) - set(layout(2))))
@pytest.mark.parametrize(
    "change",
    [lambda value: None, lambda value: value.unsqueeze(0), lambda value: value.to(torch.float16)],
    ids=["missing", "another rank", "another type"],
)
def test_faults_of_its_tensors_are_named(
    gated: Files, write: Write, tmp_path: Path, name: str, change: Callable[[Any], Any]
) -> None:
    def changed(tensors: dict[str, torch.Tensor]) -> None:
        value = change(tensors.pop(name))
        if value is not None:
            tensors[name] = value

    with pytest.raises(ContentError, match=name.replace(".", r"\.")):
        load_bundle(write(tmp_path / "b", with_tensors(gated, changed)))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("gate.rank_cut", torch.tensor(31), "at most 30"),
        ("gate.reference", torch.arange(30.0).flip(0).double(), "ascending"),
        ("gate.deviations", torch.zeros(3, dtype=torch.float64), "values in"),
        ("gate.residual_variance", torch.tensor(torch.nan, dtype=torch.float64), "NaN"),
        ("score.weight", torch.zeros(22), "score.weight"),
    ],
)
def test_values_that_no_gate_has(
    gated: Files, write: Write, tmp_path: Path, name: str, value: torch.Tensor, said: str
) -> None:
    files = with_tensors(gated, lambda tensors: tensors.update({RULE + name: value}))
    with pytest.raises(ContentError, match=said):
        load_bundle(write(tmp_path / "b", files))


def test_terms_and_tensors_go_together(gated: Files, files: Files, write: Write, tmp_path: Path) -> None:
    def without(tensors: dict[str, torch.Tensor]) -> None:
        for name in [one for one in tensors if one.startswith(RULE)]:
            del tensors[name]

    with pytest.raises(ContentError, match=r"rule\.gate\.mean"):
        load_bundle(write(tmp_path / "b", with_tensors(gated, without)))
    extra = with_tensors(files, lambda tensors: tensors.update({RULE + "gate.mean": torch.zeros(8)}))
    with pytest.raises(ContentError, match="no such tensor"):
        load_bundle(write(tmp_path / "c", extra))


def test_terms_out_of_range(manifest: Manifest) -> None:
    elsewhere = replace(TERMS, certificates=(replace(AT_0_9, alpha=0.8),))
    with pytest.raises(ManifestError, match=r"rule\.certificates"):
        replace(manifest, rule=elsewhere)
    with pytest.raises(ManifestError, match="two class names"):
        replace(manifest, rule=TERMS, class_names=("a", "b", "c"))


def test_a_forecast_is_kept_where_answers_may_be_left_unbegun(
    manifest: Manifest,
    estimator: SDMEstimator,
    exemplars: Sequence[Exemplar],
    rule: AnswerRule,
    write: Write,
    tmp_path: Path,
) -> None:
    forecast = ScoreForecast(torch.arange(8.0), torch.tensor(0.25))
    terms = replace(TERMS, may_lose=0.02, certificates=(replace(AT_0_9, forecast_min=-1.5),))
    foretold = replace(rule, forecast=forecast)
    files = encode(replace(manifest, rule=terms), estimator, exemplars, {}, foretold)
    loaded = load_bundle(write(tmp_path / "b", files)).rule
    assert loaded is not None
    assert loaded.terms == terms
    assert all(value.equal(loaded.rule.state()[name]) for name, value in foretold.state().items())
    for wrong in (encode(replace(manifest, rule=TERMS), estimator, exemplars, {}, foretold),
                  encode(replace(manifest, rule=terms), estimator, exemplars, {}, rule)):  # fmt: skip
        with pytest.raises(ContentError, match=r"rule\.forecast"):
            load_bundle(write(tmp_path / "wrong", wrong))


def test_a_rule_of_format_6_begins_every_answer(
    manifest: Manifest,
    estimator: SDMEstimator,
    exemplars: Sequence[Exemplar],
    rule: AnswerRule,
    write: Write,
    tmp_path: Path,
) -> None:
    files = encode(replace(manifest, rule=TERMS), estimator, exemplars, {}, rule)
    value = json.loads(files[MANIFEST]) | {"format_version": 6}

    def written() -> Files:
        data = json.dumps(value).encode()
        return {**files, MANIFEST: data, SEAL: seal(data)}

    with pytest.raises(ManifestError, match=r"rule\.certificates\[0\]\.forecast_min: expected no such field"):
        load_bundle(write(tmp_path / "named", written()))
    assert value["rule"].pop("may_lose") is None
    for one in value["rule"]["certificates"]:
        assert one.pop("forecast_min") is None
    loaded = load_bundle(write(tmp_path / "old", written()))
    assert loaded.rule is not None
    assert loaded.rule.terms == TERMS
    assert loaded.rule.rule.forecast is None


def test_a_probe_is_kept_where_strangers_were_declared(
    manifest: Manifest,
    estimator: SDMEstimator,
    exemplars: Sequence[Exemplar],
    rule: AnswerRule,
    write: Write,
    tmp_path: Path,
) -> None:
    draw = torch.Generator().manual_seed(4)
    probe = StrangerProbe.fit(torch.randn(8, generator=draw), torch.randn(30, 8, generator=draw), 2)
    terms, probed = replace(TERMS, strangers=12), replace(rule, probe=probe)
    files = encode(replace(manifest, rule=terms), estimator, exemplars, {}, probed)
    loaded = load_bundle(write(tmp_path / "b", files)).rule
    assert loaded is not None
    assert all(value.equal(loaded.rule.state()[name]) for name, value in probed.state().items())
    for wrong in (encode(replace(manifest, rule=TERMS), estimator, exemplars, {}, probed),
                  encode(replace(manifest, rule=terms), estimator, exemplars, {}, rule)):  # fmt: skip
        with pytest.raises(ContentError, match=r"rule\.probe"):
            load_bundle(write(tmp_path / "wrong", wrong))
    cut = with_tensors(files, lambda tensors: tensors.update({RULE + "probe.rank_cut": torch.tensor(31)}))
    with pytest.raises(ContentError, match=r"rule\.probe\.rank_cut: expected at most 30"):
        load_bundle(write(tmp_path / "cut", cut))
