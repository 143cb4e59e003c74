"""The commands as typed: a tiny real model on the transformers engine, and every mistake told before one starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from candor.app.cli import cli
from candor.app.commands.calibrate import calibrate, results_alone_on_stdout
from candor.app.commands.evaluate import evaluate
from candor.model_store.bundle import load_bundle
from tests.calibration.test_judge import by_reference, listening, settings

FIT = ("--alpha", "0.9", "--alpha", "0.8", "--rounds", "1", "--epochs", "4", "--exemplar-dim", "8")
ENGINE = ("--engine", "transformers", "--max-model-len", "128")


def candor(*arguments: object) -> Result:
    commands = typer.Typer()
    commands.command()(calibrate)
    commands.command()(evaluate)
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def tiny_model(folder: Path) -> Path:
    """A Llama of 16 dimensions with random weights and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    wrapped.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=wrapped.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def given(path: Path, numbers: range) -> Path:
    """Given answers: dots are right, exclamation marks are wrong."""
    with path.open("w") as file:
        for i in numbers:
            right = i % 3 != 0
            record = {
                "id": f"r{i}",
                "messages": [{"role": "user", "content": f"Item {i}."}],
                "response": ("." if right else "!") * 6,
                "label": int(right),
            }
            file.write(json.dumps(record) + "\n")
    return path


def test_from_the_command_line_to_a_bundle_and_its_figures(model: Path, tmp_path: Path) -> None:
    data, test = given(tmp_path / "d.jsonl", range(120)), given(tmp_path / "t.jsonl", range(200, 230))
    generated = tmp_path / "g.jsonl"
    unanswerable = {
        "id": "g",
        "messages": [{"role": "user", "content": "Anything?"}],
        "reference": "yes",
        "verifier": "exact",
    }
    generated.write_text(json.dumps(unanswerable))

    made = candor(
        "calibrate", "--model", model, "--data", data, "--test", test, "--out", tmp_path / "bundle",
        "--certify", "0.6", "--delta", "0.2", "--certify-data", given(tmp_path / "c.jsonl", range(300, 330)),
        *FIT, *ENGINE, "--max-tokens", 8, "--dtype", "float32", "--evidence", "log_mean_surprisal, log_length",
        "--pass-over", 1, "--json",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout)
    bundle = load_bundle(tmp_path / "bundle")
    assert told["digest"] == bundle.digest
    assert told["report"] == bundle.report
    assert bundle.manifest.name == "bundle"
    certification = told["report"]["certification"]
    assert (certification["accuracy"], certification["delta"], certification["records"]) == (0.6, 0.2, 30)
    found = [one["certificate"] for one in certification["sought"] if one["certificate"]]
    assert json.loads(json.dumps([asdict(one) for one in bundle.manifest.certificates])) == found
    assert bundle.manifest.alphas == (0.8, 0.9)
    assert bundle.manifest.passed_over == bundle.estimator.conventions.passed_over == 1
    assert bundle.manifest.representation.evidence == ("log_mean_surprisal", "log_length")
    assert bundle.manifest.model.dtype == "float32"
    assert bundle.report["counts"]["held_out"] == {"records": 30, "correct": 20, "base_rate": 2 / 3}
    assert (tmp_path / "bundle.cache" / "answers.sqlite").is_file()
    assert "Of 30 questions kept apart" in (tmp_path / "bundle.html").read_text().replace("\n", " ")
    assert set(told["seconds"]) == {"engine", "answering", "fitting"}

    common = ("evaluate", "--bundle", tmp_path / "bundle", "--model", model, "--data", test, *ENGINE)
    found = candor(*common, "--ood", generated, "--json", "--page", tmp_path / "page.html")
    assert found.exit_code == 0, found.output
    assert "<td>ood</td>" in (tmp_path / "page.html").read_text()
    unknown = candor(*common, "--kind", "area")
    assert unknown.exit_code == 1
    assert "line 1: no column area; there are id, messages, response, label" in unknown.stderr
    sets = json.loads(found.stdout)["sets"]
    assert sets["test"] == bundle.report["held_out"]
    assert sets["ood"]["faults"] == {"truncated": 1}  # random weights never end their answer

    shown = candor(*common)
    assert shown.exit_code == 0, shown.output
    assert "test: 30 records" in shown.stdout

    again = candor("calibrate", "--model", model, "--data", data, "--out", tmp_path / "bundle", *FIT, *ENGINE)
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    seen = candor(*common[:-5], data, *ENGINE)
    assert seen.exit_code == 1
    assert "line 1: the bundle was fitted on this prompt" in seen.stderr


def test_another_model_than_the_bundles_is_refused(model: Path, tmp_path: Path) -> None:
    data, test = given(tmp_path / "d.jsonl", range(120)), given(tmp_path / "t.jsonl", range(200, 230))
    out = tmp_path / "bundle"
    made = candor(
        "calibrate", "--model", model, "--data", data, "--out", out, *FIT, *ENGINE, "--name", "first",
        "--certify", "0.9", "--certify-share", "0.25",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "held out: 18 records" in made.stdout  # a fifth of what 30 to certify on leave
    assert "right if answered, were another share of answers right (natural:" in made.stdout
    assert "certified on 30 records: 0.9 of the answered are right" in made.stdout or (
        "No certificate: no region" in made.stdout
    )
    assert f"{out}: digest {load_bundle(out).digest}" in made.stdout
    assert load_bundle(out).manifest.name == "first"
    template = model / "chat_template.jinja"
    kept = template.read_text()
    template.write_text(kept + "!")
    try:
        refused = candor("evaluate", "--bundle", out, "--model", model, "--data", test, *ENGINE)
    finally:
        template.write_text(kept)
    assert refused.exit_code == 1
    assert "chat_template_sha256" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"--alpha": "95"}, "between 0.5 and 1"),
        ({"--alpha": "1"}, "no number of records"),
        ({"--evidence": "mood"}, "unknown evidence ['mood']"),
        ({"--represent": "last,mood"}, "unknown parts ['mood']"),
        ({"--represent": "last", "--evidence": "min_margin"}, "disagree"),
        ({"--learning-rate": "0"}, "learning rate positive"),
        ({"--temperature": "-1"}, "--temperature"),
        ({"--certify": "95"}, "accuracy to certify must be between 0 and 1"),
        ({"--certify": "0.9", "--delta": "0.5"}, "delta in (0, 0.5)"),
        ({"--certify": "0.9", "--certify-share": "1"}, "share to certify on must be between 0 and 1"),
        ({"--certify-data": "c.jsonl", "--rule": "sdm"}, "say with --certify which accuracy"),
        ({"--may-lose": "0.02", "--rule": "sdm"}, "the rule sdm knows no prompts"),
        ({"--may-lose": "1"}, "may be lost must be in"),
        ({"--refuse": "0"}, "the share that the gate may refuse"),
        ({"--resample": "3"}, "needs a temperature above 0"),
        ({"--resample": "0"}, "--resample"),
        ({"--concurrency": "0"}, "--concurrency"),
        ({"--dtype": "int8"}, "--dtype"),
        ({"--data": "missing.jsonl"}, "cannot be read"),
        ({"--model": "no/such/model"}, "no/such/model"),
    ],
)
def test_mistakes_are_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, str], says: str
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # so that rich does not break the lines that are looked for
    monkeypatch.setenv("NO_COLOR", "1")
    data = given(tmp_path / "d.jsonl", range(30))
    values: dict[str, Any] = {"--model": tmp_path, "--data": data, "--out": tmp_path / "b", "--alpha": "0.9"}
    typed = [part for pair in (values | arguments).items() for part in pair]
    result = candor("calibrate", *typed, "--engine", "transformers")
    assert result.exit_code in (1, 2)
    assert says in result.stderr
    assert isinstance(result.exception, SystemExit)  # told, not a traceback
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


def test_a_bundle_that_is_none(tmp_path: Path) -> None:
    result = candor(
        "evaluate", "--bundle", tmp_path / "none", "--model", tmp_path, "--data", tmp_path / "d.jsonl"
    )
    assert result.exit_code == 1
    assert "there is no bundle" in result.stderr


def test_where_every_answer_is_kept_no_engine_starts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, test = given(tmp_path / "d.jsonl", range(120)), given(tmp_path / "t.jsonl", range(200, 230))
    common = ("--model", model, *ENGINE)
    made = candor("calibrate", "--data", data, "--test", test, "--out", tmp_path / "b", *FIT, *common)
    assert made.exit_code == 0, made.output

    async def refused(*_: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("candor.calibration.kept.start_with_adapter", refused)
    found = candor("evaluate", "--bundle", tmp_path / "b", "--data", test, *common, "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["sets"]["test"] == load_bundle(tmp_path / "b").report["held_out"]
    again = candor(
        "calibrate",
        "--data",
        data,
        "--out",
        tmp_path / "c",
        *FIT,
        *common,
        "--hidden-cache",
        tmp_path / "b.cache",
    )
    assert again.exit_code == 0, again.output
    more = given(tmp_path / "u.jsonl", range(300, 301))
    with pytest.raises(AssertionError, match="an engine was started"):
        candor_raising("evaluate", "--bundle", tmp_path / "b", "--data", more, *common)


def candor_raising(*arguments: object) -> None:
    result = candor(*arguments)
    if result.exception is not None:
        raise result.exception


def test_a_bundle_of_another_model_is_refused_before_an_engine_starts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, test = given(tmp_path / "d.jsonl", range(120)), given(tmp_path / "t.jsonl", range(200, 230))
    made = candor("calibrate", "--model", model, "--data", data, "--out", tmp_path / "b", *FIT, *ENGINE)
    assert made.exit_code == 0, made.output

    async def refused(*_: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("candor.calibration.kept.start_with_adapter", refused)
    longer = ("--engine", "transformers", "--max-model-len", "128")
    template = model / "chat_template.jinja"
    before = template.read_text()
    template.write_text(before + "{# another #}")
    try:
        found = candor("evaluate", "--bundle", tmp_path / "b", "--model", model, "--data", test, *longer)
    finally:
        template.write_text(before)
    assert found.exit_code == 1
    assert "chat_template_sha256" in found.stderr


def test_data_check_counts_the_models_tokens(model: Path, tmp_path: Path) -> None:
    data = given(tmp_path / "d.jsonl", range(120))
    options = ("data", "check", data, "--model", model, "--max-tokens", 8)
    fits = CliRunner().invoke(cli, [str(one) for one in (*options, "--max-model-len", 128)])
    assert fits.exit_code == 0, fits.output
    assert "the longest prompt has 29 tokens: with 8 for the answer, all fit the model's 128" in fits.stdout
    told = CliRunner().invoke(cli, [str(one) for one in (*options, "--json")])
    assert json.loads(told.stdout)["longest_prompt_tokens"] == 29
    long = CliRunner().invoke(cli, [str(one) for one in (*options, "--max-model-len", 20)])
    assert long.exit_code == 1
    assert "for the answer exceed the model's 20" in long.stderr


def test_results_stand_alone_on_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    with results_alone_on_stdout():
        print("a library prints")
        os.write(1, b"so does an engine\n")
        subprocess.run([sys.executable, "-c", "print('and its process')"], check=True)
    print("{}")
    captured = capfd.readouterr()
    assert captured.out == "{}\n"
    for line in ("a library prints", "so does an engine", "and its process"):
        assert line in captured.err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"--model": "meta/llama"},
            "meta/llama is not a directory, and Candor asks no model hub: download the model",
        ),
        ({"--out": "{file}/b"}, "cannot be written: Not a directory"),
        ({"--hidden-cache": "{file}/c"}, "cannot be written: Not a directory"),
        ({"--data": "{few}"}, "has 30 prompts, and a region at alpha = 0.9 takes at least 48"),
        ({"--data": "{right}"}, "are labelled right"),
        ({"--max-tokens": "3"}, "it has 6 tokens, and answers have at most 3"),
        ({"--max-model-len": "20"}, "for the answer exceed the model's 20"),
        ({"--data": "{raising}"}, "tried before any answer: verifier"),
        ({"--columns": "prompt"}, "expected FIELD=COLUMN"),
        ({"--data": "{bare}"}, "say with --verifier how an answer is judged"),
    ],
)
def test_what_can_fail_fails_before_an_engine_starts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], says: str
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")

    async def refused(*_: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("candor.calibration.kept.start_with_adapter", refused)
    (tmp_path / "mine.py").write_text("def f(response, reference):\n    raise OSError('no network')\n")
    rows = [{"question": f"Item {i}.", "answer": "."} for i in range(60)]
    files = {
        "file": tmp_path / "file",
        "few": given(tmp_path / "few.jsonl", range(30)),
        "right": tmp_path / "right.jsonl",
        "raising": tmp_path / "raising.jsonl",
        "bare": tmp_path / "bare.jsonl",
    }
    files["file"].touch()
    right = [{"prompt": row["question"], "response": "......", "label": True} for row in rows]
    for name, lines in (
        ("right", right),
        ("bare", rows),
        ("raising", [r | {"verifier": "mine.py:f"} for r in rows]),
    ):
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = given(tmp_path / "d.jsonl", range(120))
    values = {"--model": str(model), "--data": str(data), "--out": str(tmp_path / "b"), "--alpha": "0.9"}
    values |= {"--max-tokens": "8", "--max-model-len": "128", "--rule": "sdm"}
    values |= {name: value.format(**files) for name, value in change.items()}
    found = candor(
        "calibrate", *(part for pair in values.items() for part in pair), "--engine", "transformers"
    )
    assert isinstance(found.exception, SystemExit), found.exception
    assert says in found.stderr
    assert not (tmp_path / "b").exists()


def test_killed_while_a_judge_is_asked_it_pays_for_no_verdict_twice(model: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Item {i}.", "response": ("." if i % 3 else "!") * 6, "reference": "......"}
        for i in range(120)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "calibrate", "--model", model, "--data", tmp_path / "d.jsonl", "--verifier", "judge(judge.toml)",
        "--out", tmp_path / "bundle", *FIT, *ENGINE, "--max-tokens", 8, "--dtype", "float32", "--json",
        "--rule", "sdm",
    ]  # fmt: skip
    script = [sys.executable, "-c", "from candor.app.cli import main; main()", *map(str, arguments)]
    with listening() as endpoint:
        endpoint.say, endpoint.delay = by_reference, 0.02
        settings(tmp_path / "judge.toml", endpoint, concurrency=4)
        process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(endpoint.asked) < 40:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
        before = len(endpoint.asked)
        assert before < 100
        done = subprocess.run(script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        asked = len(endpoint.asked)
        # All once, the trial, and what was under way when it was killed.
        assert 121 <= asked <= 121 + 4
        again = asked - before
        assert f"judge(judge.toml) was asked {again} times: {50 * again} tokens read" in done.stderr
    report = json.loads(done.stdout)["report"]
    counts = report["counts"]
    assert sum(counts[part]["correct"] for part in ("training_half", "calibration_half", "held_out")) == 80


def test_suspects_are_reviewed_at_the_terminal_without_asking_the_model_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = given(tmp_path / "d.jsonl", range(120))
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for i in (7, 30):  # 7 is right and 30 is wrong
        lines[i]["label"] = 1 - lines[i]["label"]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ("--model", model, *ENGINE, "--data", data, *FIT, "--rule", "sdm")
    first = candor("calibrate", *common, "--out", tmp_path / "first", "--json")
    assert first.exit_code == 0, first.output
    named = {one["id"] for one in json.loads(first.stdout)["report"]["advice"]["suspects"]}
    assert {"r7", "r30"} <= named

    async def refused(*_: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("candor.calibration.kept.start_with_adapter", refused)
    monkeypatch.chdir(tmp_path)
    numbers = sorted(int(name[1:]) for name in named)
    says = "".join("right\n" if i % 3 else "w\n" for i in numbers)
    commands = typer.Typer()
    commands.command()(calibrate)
    typed = [
        str(one) for one in (*common, "--out", tmp_path / "second", "--review", tmp_path / "first", "--json")
    ]
    second = CliRunner().invoke(commands, typed, input=says)
    assert second.exit_code == 0, second.output
    assert f"[1 of {len(named)}] Item" in second.stderr
    counts = json.loads(second.stdout[second.stdout.index("{") :])["report"]["counts"]
    assert sum(counts[part]["correct"] for part in ("training_half", "calibration_half", "held_out")) == 80
