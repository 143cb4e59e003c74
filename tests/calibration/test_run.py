"""Files in, a published bundle out, with a scripted engine; and what stands there after a failure: nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from candor.calibration.answering import (
    AnsweringOptions,
    DataFile,
    Inputs,
    answer_inputs,
    answer_sets,
    require_unseen,
)
from candor.calibration.errors import CalibrationError, DataError
from candor.calibration.fit import FitSettings
from candor.calibration.rule_settings import RuleSettings
from candor.calibration.run import Certifying, Made, evaluate_sets, make_bundle, require_free
from candor.calibration.strangers import dealt
from candor.engine.base import AdapterIdentity, EngineDead
from candor.engine.prompt import ChatFormat
from candor.model_store.bundle import Bundle, load_bundle
from candor.policy.policy import Policy

POLICY = Policy(temperature=0.0, top_p=1.0, top_k=0, max_tokens=16)
SETTINGS = FitSettings(alphas=(0.8, 0.9), rounds=1, epochs=10, exemplar_dim=8, learning_rate=1e-2)

MakeEngine = Callable[..., Any]
Task = Callable[[Path, Sequence[int]], Path]


def calibrate(
    engine: Any, chat: ChatFormat, data: Path, held_out: Sequence[Path], folder: Path
) -> tuple[Bundle, dict[str, Any]]:
    inputs = Inputs.load(data, held_out)
    asking = AnsweringOptions(folder / "cache", concurrency=8)
    answers = asyncio.run(answer_inputs(engine, chat, inputs, POLICY, asking))
    made = make_bundle(inputs, answers, SETTINGS, folder / "bundle", "scripted")
    bundle = load_bundle(folder / "bundle")
    assert bundle.digest == made.digest
    outcome = made.outcome
    assert outcome.report["held_out"] == outcome.evaluation.to_json()
    return bundle, outcome.report


def test_a_bundle_holds_what_was_made_and_nothing_of_the_held_out_part(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    engine = make_engine()
    engine.adapter = AdapterIdentity("laid over", "a" * 64)
    bundle, report = calibrate(engine, chat, task(tmp_path / "d.jsonl", range(300)), [], tmp_path)
    manifest = bundle.manifest
    assert manifest.adapter == engine.adapter
    assert (manifest.name, manifest.alphas, manifest.policy) == ("scripted", (0.8, 0.9), POLICY)
    assert manifest.model == engine.identity
    assert bundle.report == json.loads(json.dumps(report))
    data = manifest.provenance["data"]
    assert (data["file"], data["records"], data["given_responses"]) == ("d.jsonl", 300, 0)
    assert (data["verifiers"], len(data["sha256"])) == (["exact"], 64)
    assert str(tmp_path) not in json.dumps(manifest.provenance) + json.dumps(report)

    counts = report["counts"]
    parts = ("training_half", "calibration_half", "held_out")
    assert [counts[part]["records"] for part in parts] == pytest.approx([120, 120, 60], abs=2)
    assert sum(counts[part]["records"] for part in parts) == 300
    assert len(report["fitted_prompts"]) == 300 - counts["held_out"]["records"]
    assert len(bundle.exemplars) == counts["training_half"]["records"]
    for row, exemplar in enumerate(bundle.exemplars):
        assert exemplar.label == int(bundle.estimator.support.labels[row])
        assert exemplar.prediction == int(bundle.estimator.support.predictions[row])
        assert exemplar.label == int(exemplar.response == exemplar.prompt.removeprefix("number "))

    for alpha in ("0.8", "0.9"):
        answered = report["held_out"]["lower"][alpha]["answered"]
        assert report["reference_abstention_ratio"][alpha] == pytest.approx(1 - answered["value"])
        assert report["regions"][alpha]["found"] == (report["regions"][alpha]["class_thresholds"] is not None)
    assert report["held_out"]["auroc"]["value"] > 0.9
    assert report["held_out"]["plain"]["0.8"]["answered"]["hits"] > 10


def test_the_held_out_files_do_not_touch_the_estimator(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    data = task(tmp_path / "d.jsonl", range(150))
    made = []
    for name, numbers in (("a", range(1000, 1040)), ("b", range(2000, 2100))):
        folder = tmp_path / name
        folder.mkdir()
        held_out = task(folder / "test.jsonl", numbers)
        made.append(calibrate(make_engine(), chat, data, [held_out], folder))
    (first, first_report), (second, second_report) = made
    one, other = first.estimator.state(), second.estimator.state()
    assert all(one[name].equal(other[name]) for name in one)
    assert first_report["counts"]["held_out"]["records"] == 40
    assert second_report["counts"]["held_out"]["records"] == 100
    assert first_report["counts"]["training_half"] == second_report["counts"]["training_half"]


def test_dropped_answers_are_counted_and_named(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = make_engine()
    engine.overrides = {3: {"truncated": True}, 5: {"hidden": None}, 1001: {"truncated": True}}
    held_out = task(tmp_path / "test.jsonl", range(1000, 1020))
    _, report = calibrate(engine, chat, task(tmp_path / "d.jsonl", range(150)), [held_out], tmp_path)
    assert report["counts"]["dropped"] == {"by_fault": {"truncated": 1, "incomplete": 1}, "ids": ["r3", "r5"]}
    assert report["held_out"]["faults"] == {"truncated": 1}
    assert report["held_out"]["lower"]["0.8"]["admitted"]["of"] == 20
    written = capsys.readouterr()
    assert "1 truncated, 1 incomplete of 150 answers cannot be scored" in written.err
    assert written.out == ""


def test_after_a_failure_nothing_stands_at_the_path_and_the_next_run_goes_on(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    data = task(tmp_path / "d.jsonl", range(150))
    dying = make_engine()
    dying.overrides = {100: {"raises": EngineDead("gone")}}
    with pytest.raises(EngineDead):
        calibrate(dying, chat, data, [], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "d.jsonl"]
    engine = make_engine()
    calibrate(engine, chat, data, [], tmp_path)
    assert 0 < len(engine.asked) <= 60


def test_too_few_records_leave_nothing(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="prompts of each kind"):
        calibrate(make_engine(), chat, task(tmp_path / "d.jsonl", range(20)), [], tmp_path)
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(DataError, match="no record is left for the held-out part"):
        calibrate(make_engine(), chat, task(tmp_path / "d.jsonl", [1]), [], tmp_path)


def test_a_prompt_on_both_sides_is_refused_before_anything_is_answered(task: Task, tmp_path: Path) -> None:
    data, held_out = task(tmp_path / "d.jsonl", range(10)), task(tmp_path / "t.jsonl", [20, 7])
    with pytest.raises(DataError, match="line 2: same prompt as line 8"):
        Inputs.load(data, [held_out])


def test_only_an_empty_or_missing_folder_is_free(tmp_path: Path) -> None:
    require_free(tmp_path / "new" / "deep")
    require_free(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (tmp_path, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(CalibrationError, match="exists already"):
            require_free(taken)


def test_evaluation_of_a_bundle_repeats_what_the_report_says(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    held_out = task(tmp_path / "test.jsonl", range(1000, 1060))
    bundle, report = calibrate(
        make_engine(), chat, task(tmp_path / "d.jsonl", range(150)), [held_out], tmp_path
    )
    engine = make_engine()
    far = task(tmp_path / "far.jsonl", [-1, -2])
    sets = {"test": DataFile.load(held_out), "ood": DataFile.load(far)}
    asking = AnsweringOptions(tmp_path / "cache", concurrency=2)
    figures = evaluate_sets(bundle, asyncio.run(answer_sets(engine, chat, bundle, sets, asking)))
    assert len(engine.asked) == 2  # the held-out answers come from the cache
    assert figures["test"].to_json() == report["held_out"]
    assert figures["ood"].records == 2


def test_a_prompt_that_the_bundle_was_fitted_on_is_no_test(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    held_out = task(tmp_path / "test.jsonl", range(1000, 1020))
    bundle, _ = calibrate(make_engine(), chat, task(tmp_path / "d.jsonl", range(150)), [held_out], tmp_path)
    require_unseen(bundle, DataFile.load(held_out))
    seen = task(tmp_path / "seen.jsonl", [1000, 149])
    with pytest.raises(DataError, match="line 2: the bundle was fitted on this prompt"):
        require_unseen(bundle, DataFile.load(seen))


CERTIFYING = Certifying(0.8, 0.1, 0.3)


def certified(
    engine: Any, chat: ChatFormat, inputs: Inputs, folder: Path, policy: Policy = POLICY
) -> tuple[Bundle, Made]:
    asking = AnsweringOptions(folder / "cache", concurrency=8)
    answers = asyncio.run(answer_inputs(engine, chat, inputs, policy, asking))
    made = make_bundle(inputs, answers, SETTINGS, folder / "bundle", "scripted", CERTIFYING)
    return load_bundle(folder / "bundle"), made


def test_a_certificate_comes_from_prompts_that_nothing_else_saw(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    inputs = Inputs.load(task(tmp_path / "d.jsonl", range(400)), [])
    bundle, made = certified(make_engine(), chat, inputs, tmp_path)
    found = made.outcome.certification
    assert found is not None
    assert bundle.manifest.certificates == found.certificates != ()
    for one in found.certificates:
        assert (one.accuracy, one.confidence, one.records) == (0.8, 0.9, 120)
        assert one.right <= one.answered <= 120
        assert one.rescaled_similarity_min >= bundle.estimator.regions[one.alpha].q_prime_min
    report = bundle.report
    assert report["certification"] == json.loads(json.dumps(found.to_json()))
    counts = report["counts"]
    parts = ("training_half", "calibration_half", "held_out")
    assert sum(counts[part]["records"] for part in parts) == 280
    # Neither fitted on nor left for a later evaluation.
    assert len(found.prompts) == 120
    assert found.prompts <= set(report["fitted_prompts"])
    assert len(report["fitted_prompts"]) == 400 - counts["held_out"]["records"]
    assert not {exemplar.prompt for exemplar in bundle.exemplars} & {
        record.prompt for record in inputs.fitting.records if record.prompt_digest in found.prompts
    }
    assert bundle.manifest.provenance["certification_share"] == 0.3
    assert bundle.manifest.provenance["certification_data"] is None


def test_a_file_to_certify_on_leaves_the_rest_as_it_was(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    data, apart = task(tmp_path / "d.jsonl", range(200)), task(tmp_path / "c.jsonl", range(1000, 1150))
    for name in ("plain", "certified"):
        (tmp_path / name).mkdir()
    without, _ = calibrate(make_engine(), chat, data, [], tmp_path / "plain")
    bundle, made = certified(make_engine(), chat, Inputs.load(data, [], apart), tmp_path / "certified")
    one, other = without.estimator.state(), bundle.estimator.state()
    assert all(one[name].equal(other[name]) for name in one)
    assert without.manifest.certificates == ()
    assert without.report["certification"] is None
    assert made.outcome.certification is not None
    assert len(made.outcome.certification.prompts) == 150
    assert bundle.manifest.provenance["certification_data"]["file"] == "c.jsonl"
    assert bundle.manifest.provenance["certification_share"] is None


def test_a_prompt_to_certify_on_stands_in_no_other_file(task: Task, tmp_path: Path) -> None:
    data, held_out = task(tmp_path / "d.jsonl", range(10)), task(tmp_path / "t.jsonl", range(20, 30))
    for numbers in ([40, 3], [40, 25]):
        apart = task(tmp_path / "c.jsonl", numbers)
        with pytest.raises(DataError, match="same prompt as line"):
            Inputs.load(data, [held_out], apart)


def test_a_policy_that_resamples_is_what_is_calibrated(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    policy = replace(POLICY, temperature=0.7, resample=2)
    inputs = Inputs.load(task(tmp_path / "d.jsonl", range(300)), [])
    engine = make_engine()
    bundle, made = certified(engine, chat, inputs, tmp_path, policy)
    assert len(engine.asked) == 600
    assert bundle.manifest.policy.resample == 2
    # The scripted engine says the same twice: what is not served at once costs a second answer.
    reading = made.outcome.evaluation.plain[0.8]
    assert reading.answered.value is not None
    once = make_engine()
    (tmp_path / "once").mkdir()
    _, single = certified(once, chat, inputs, tmp_path / "once", replace(policy, resample=1))
    assert reading.answered.hits == single.outcome.evaluation.plain[0.8].answered.hits
    assert (
        single.outcome.evaluation.plain[0.8].tokens
        < reading.tokens
        < 2 * single.outcome.evaluation.plain[0.8].tokens
    )
    with pytest.raises(ValueError, match="share to certify on"):
        Certifying(0.8, 0.1, 1.0)


def two_gates(
    engine: Any,
    chat: ChatFormat,
    inputs: Inputs,
    folder: Path,
    policy: Policy = POLICY,
    rule: RuleSettings | None = None,
) -> tuple[Bundle, Made]:
    asking = AnsweringOptions(folder / "cache", concurrency=8)
    answers = asyncio.run(answer_inputs(engine, chat, inputs, policy, asking))
    certifying = Certifying(None, 0.1, 0.4)
    made = make_bundle(
        inputs, answers, SETTINGS, folder / "bundle", "scripted", certifying, rule or RuleSettings()
    )
    return load_bundle(folder / "bundle"), made


def test_a_rule_that_may_lose_answers_is_certified_with_its_cuts(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    inputs = Inputs.load(task(tmp_path / "d.jsonl", range(500)), [])
    bundle, made = two_gates(make_engine(), chat, inputs, tmp_path, rule=RuleSettings(may_lose=0.05))
    assert bundle.rule is not None
    assert bundle.rule.rule.forecast is not None
    assert bundle.rule.terms.may_lose == 0.05
    assert made.outcome.rule is not None
    for search, one in zip(made.outcome.rule.searches, bundle.rule.terms.certificates, strict=True):
        assert one.forecast_min is not None
        assert search.unbegun is not None
        assert search.unbegun.of - search.unbegun.lost == one.answered
    counted = bundle.report["rule"]["certification"][0]["unbegun"]
    assert set(counted) == {"prompts", "lost", "of"}
    assert bundle.manifest.provenance["rule"]["may_lose"] == 0.05


def test_a_rule_is_certified_at_each_alpha_and_measured_as_it_serves(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    inputs = Inputs.load(
        task(tmp_path / "d.jsonl", range(500)), [task(tmp_path / "t.jsonl", range(900, 1000))]
    )
    bundle, made = two_gates(make_engine(), chat, inputs, tmp_path)
    rule = made.outcome.rule
    assert rule is not None
    assert bundle.rule is not None
    assert bundle.manifest.rule == rule.gates.terms
    assert [one.alpha for one in rule.gates.terms.certificates] == [0.8, 0.9]
    assert [one.accuracy for one in rule.gates.terms.certificates] == [0.8, 0.9]
    assert bundle.manifest.certificates == ()  # of regions: none was asked for
    report = bundle.report
    assert report["rule"] == json.loads(json.dumps(rule.to_json()))
    [first, _] = report["rule"]["certification"]
    assert first["records"] == 200
    assert 0 < first["answered"] <= first["ceiling"]
    fitted = set(report["fitted_prompts"])
    for search in rule.searches:
        assert search.prompts <= fitted
    # Held out: what the report says is what the loaded bundle's rule does, row by row.
    for alpha in (0.8, 0.9):
        reading = report["held_out"]["rule"][str(alpha)]
        assert report["reference_abstention_ratio_of_rule"][str(alpha)] == pytest.approx(
            1 - reading["answered"]["value"]
        )
        assert reading["answered"]["of"] == 100
        assert reading["answered"]["hits"] > 40
    assert 0 <= report["held_out"]["probabilities"]["calibration_error"] < 0.2


def test_certify_asks_for_at_least_that_accuracy(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    certifying = Certifying(0.85, 0.1, 0.4)
    assert [certifying.of_rule(alpha).accuracy for alpha in (0.8, 0.9)] == [0.85, 0.9]
    assert certifying.of_regions is not None
    assert Certifying.of(None, 0.1, None, rule=False) is None
    assert Certifying.of(None, 0.1, None, rule=True) == Certifying(None, 0.1, 0.4)
    assert Certifying.of(0.9, 0.1, None, rule=False) == Certifying(0.9, 0.1, 0.2)


def test_a_rule_of_a_policy_that_resamples_is_about_what_is_served(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    policy = replace(POLICY, temperature=0.7, resample=2)
    inputs = Inputs.load(task(tmp_path / "d.jsonl", range(400)), [])
    bundle, made = two_gates(make_engine(), chat, inputs, tmp_path, policy)
    assert made.outcome.rule is not None
    search = made.outcome.rule.searches[0]
    assert len(search.prompts) == 160  # each prompt once, whatever its attempts
    reading = made.outcome.evaluation.rule[0.8]
    assert bundle.manifest.policy.resample == 2
    # The scripted engine says the same twice: what is not let through at once costs a second answer.
    assert reading.answered.value is not None
    assert reading.tokens > 0


def test_declared_strangers_are_learnt_from_and_counted(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    data, strange = task(tmp_path / "d.jsonl", range(400)), task(tmp_path / "s.jsonl", range(5000, 5060))
    engine = make_engine()
    bundle, made = two_gates(engine, chat, Inputs.load(data, [], None, strange), tmp_path)
    assert engine.read == 60
    assert bundle.rule is not None
    assert bundle.rule.rule.probe is not None
    taught = bundle.rule.terms.strangers
    assert 20 <= taught <= 40  # each by a coin
    provenance = bundle.manifest.provenance
    assert (provenance["strangers"]["file"], provenance["strangers"]["conversations"]) == ("s.jsonl", 60)
    assert provenance["rule"]["eps"] == 0.02
    with pytest.raises(DataError, match="the bundle was fitted on this prompt"):
        require_unseen(bundle, DataFile.load(strange))
    passing = bundle.report["rule"]["declared_strangers"]
    assert (passing["fitted"], passing["kept_apart"]) == (taught, 60 - taught)
    assert 0 <= passing["both"] <= passing["gate_alone"] <= 60 - taught
    assert made.outcome.rule is not None
    assert "declared strangers kept apart" in str(made.outcome.rule)


def test_a_stranger_made_of_a_record_teaches_if_that_record_fitted_the_gate(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    """Else the gate would know twins of what certifies it, and of what it is measured against."""
    data, strange = task(tmp_path / "d.jsonl", range(400)), tmp_path / "s.jsonl"
    with strange.open("w") as file:
        for i in range(400):
            messages = [{"role": "user", "content": f"number {10_000 + i}"}]
            file.write(json.dumps({"of": f"r{i}", "messages": messages}) + "\n")
    inputs = Inputs.load(data, [], None, strange)
    assert inputs.strangers is not None
    bundle, made = two_gates(make_engine(), chat, inputs, tmp_path)
    training = made.outcome.fitted.training
    assert bundle.rule is not None
    assert bundle.rule.terms.strangers == len(training)
    states = torch.arange(400.0).unsqueeze(1)  # each its own number
    taught, held = dealt(states, inputs.strangers.of, {one.prompt_digest for one in training}, 0)
    assert sorted(taught.flatten().int().tolist()) == sorted(int(one.id[1:]) for one in training)
    assert len(held) == 400 - len(training)
    with strange.open("a") as file:
        file.write(json.dumps({"of": "nobody", "messages": [{"role": "user", "content": "number 9"}]}) + "\n")
    with pytest.raises(DataError, match='there is no record "nobody"'):
        Inputs.load(data, [], None, strange)


def test_a_stranger_is_no_record_to_calibrate_on(task: Task, tmp_path: Path) -> None:
    data = task(tmp_path / "d.jsonl", range(10))
    with pytest.raises(DataError, match="conversation 2: it is also a record to calibrate on"):
        Inputs.load(data, [], None, task(tmp_path / "s.jsonl", [70, 3]))
    with pytest.raises(DataError, match="expected at least 20 different strangers, got 2"):
        Inputs.load(data, [], None, task(tmp_path / "s.jsonl", [70, 71]))


def test_without_prompt_states_there_is_no_rule(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    inputs = Inputs.load(task(tmp_path / "d.jsonl", range(200)), [])
    asking = AnsweringOptions(tmp_path / "cache", concurrency=8)
    answers = asyncio.run(answer_inputs(make_engine(), chat, inputs, POLICY, asking))
    blind = [replace(one, prompt_states=torch.empty(0)) for one in answers.fitting]
    with pytest.raises(CalibrationError, match="calibrate with the rule sdm"):
        make_bundle(
            inputs,
            replace(answers, fitting=blind),
            SETTINGS,
            tmp_path / "bundle",
            "scripted",
            Certifying(None, 0.1, 0.4),
            RuleSettings(),
        )
    assert not (tmp_path / "bundle").exists()
