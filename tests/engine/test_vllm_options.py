"""vLLM's options as typed, from the environment and from a file; what is refused says what to do, without vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from candor.engine.vllm_options import (
    CAPTURE_WRONG,
    CHANGES_H,
    OURS,
    VARIABLE,
    OptionError,
    as_typed,
    changing_h,
    images,
    read,
)


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def told(line: str, **more: Any) -> str:
    with pytest.raises(OptionError) as caught:
        read(line.split(), **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_three_lists_do_not_overlap_and_name_options_of_vllms() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    lists = (set(OURS), set(CHANGES_H), set(CAPTURE_WRONG))
    assert sum(map(len, lists)) == len(set.union(*lists))
    assert set.union(*lists) <= AsyncEngineArgs.__dataclass_fields__.keys()


def test_speculation_by_n_grams_is_passed_on() -> None:
    line = '--speculative-config {"method":"ngram","num_speculative_tokens":3}'
    assert read([*line.split()])["speculative_config"]["method"] == "ngram"


def test_what_is_given_and_no_more() -> None:
    line = "--tensor-parallel-size 4 --gpu-memory-utilization=0.8 --quantization awq --max_num_seqs 8"
    assert read(line.split()) == {
        "tensor_parallel_size": 4,
        "gpu_memory_utilization": 0.8,
        "quantization": "awq",
        "max_num_seqs": 8,
    }
    assert read([]) == {}


def test_a_default_is_nothing_given() -> None:
    assert read(["--kv-cache-dtype", "auto", "-pp", "1"]) == {}


def test_the_command_goes_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text(
        "tensor-parallel-size: 2\nenforce-eager: true\nseed: 7\n"
        "hf-overrides:\n  rope_parameters: {factor: 2.0}\nmax-num-seqs: 3\n",
        encoding="utf-8",
    )
    monkeypatch.setenv(VARIABLE, f"--config '{file}' --seed 8 --max-num-seqs 4")
    assert read(["--max-num-seqs", "5"]) == {
        "tensor_parallel_size": 2,
        "enforce_eager": True,
        "seed": 8,
        "hf_overrides": {"rope_parameters": {"factor": 2.0}},
        "max_num_seqs": 5,
    }
    monkeypatch.delenv(VARIABLE)
    assert read([f"--config={file}"])["tensor_parallel_size"] == 2


@pytest.mark.parametrize("name", [*OURS, *CAPTURE_WRONG])
def test_a_refusal_names_the_option_and_what_to_do(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    said = told(f"{flag} 3")
    assert said.startswith(f"{flag} ")
    assert any(word in said for word in ("leave it out", "give ", "use ", "change ", "calibrate", "choose "))


def test_refusals_hold_in_every_spelling(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("decode-context-parallel-size: 2\n", encoding="utf-8")
    for line in (
        "--decode-context-parallel-size 2",
        "--decode_context_parallel_size=2",
        "-dcp 2",
        f"--config {file}",
        "-dcp=2",
    ):
        assert told(line).startswith("--decode-context-parallel-size is not served: "), line
    for line in ('--speculative-config {"method":"eagle"}', "--speculative-config.model X", "-sc.method mtp"):
        assert told(line).startswith("--speculative-config is not served: "), line
    ngrams = '--speculative-config {"method":"ngram"}'
    found = told(f"{ngrams} --pipeline-parallel-size 2")
    assert found.startswith("--speculative-config with --pipeline-parallel-size is not served: "), found
    assert read(f"{ngrams} --pipeline-parallel-size 1 --tensor-parallel-size 2".split())
    assert "made up" in told("--load-format dummy")
    assert "mp or ray" in told("--distributed-executor-backend external_launcher")


@pytest.mark.parametrize(
    ("line", "most"),
    [
        ("", 0),
        ('--limit-mm-per-prompt {"image":2}', 2),
        ("--limit-mm-per-prompt.image 3", 3),
        ('--limit-mm-per-prompt {"image":{"count":4,"width":512}}', 4),
        ('--limit-mm-per-prompt {"video":0}', 0),
    ],
)
def test_images_are_looked_at_where_it_is_said_how_many(line: str, most: int) -> None:
    assert images(read(line.split())) == most


def test_sounds_and_films_are_refused() -> None:
    for line in ('--limit-mm-per-prompt {"image":1,"video":1}', "--limit-mm-per-prompt.audio 1"):
        assert "images alone are" in told(line)


def test_what_vllm_does_not_know_or_take_is_its_own_message() -> None:
    assert told("--no-such-thing") == "neither Candor nor vLLM has an option --no-such-thing"
    assert "--tensor-parallel-size/-tp: invalid int value: 'four'" in told("--tensor-parallel-size four")
    assert "--kv-cache-dtype: invalid choice: 'fp9'" in told("--kv-cache-dtype fp9")
    assert "No such file" in told("--config nowhere.yaml")


def test_other_engines_take_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--engine transformers takes none" in told("--seed 1", engine="transformers")
    monkeypatch.setenv(VARIABLE, '--quantization "awq')
    assert told("").startswith("CANDOR_VLLM: expected words as on a command line")


def test_what_changes_h_is_told_in_one_order() -> None:
    options = {"kv_cache_dtype": "fp8", "seed": 1, "quantization": "awq"}
    assert list(changing_h(options)) == ["quantization", "kv_cache_dtype"]
    assert as_typed(changing_h(options)) == "--quantization awq --kv-cache-dtype fp8"
    assert as_typed({"hf_overrides": {"a": 1}}) == '--hf-overrides {"a": 1}'
    assert as_typed({}) == "none"


def test_what_grammars_let_through_is_told_without_defaults() -> None:
    given = ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    assert changing_h(read(given)) == {
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}
    }
    assert changing_h(read(["--structured-outputs-config", "{}"])) == {}


def test_a_refusal_does_not_wait_for_vllm() -> None:
    code = (
        "import sys\nfrom candor.engine.vllm_options import OptionError, read\n"
        "for words in (['--worker-cls', 'mine.Worker'], ['--tensor-paralel-size', '4']):\n"
        "    try: read(words)\n"
        "    except OptionError as error: print(error, sorted({'torch', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, unknown = done.stdout.splitlines()
    assert ours.endswith(" leave it out []")
    assert unknown.endswith("an option --tensor-paralel-size; did you mean --tensor-parallel-size? []")
