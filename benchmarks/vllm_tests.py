"""vLLM's own tests of its OpenAI endpoints, against vLLM's own server and against Candor, with the same model.

    python -m pip download --no-deps --no-binary vllm vllm==0.32.0      the sources; their tests are not in the wheel
    pip install pytest-asyncio tblib                                    beside this repository's own packages
    python -m benchmarks.vllm_tests FOLDER                              FOLDER: the unpacked sources

The tests run as they are, but for two things: the models that they name become one model that is here, and where they
start `vllm serve`, they get a server with the same options that is vLLM's own or Candor's (this module is a plugin of
pytest for that). A test that a model of this size cannot pass fails on both, so what counts is where the two differ.
What needs an adapter, another kind of model or a tool server is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest

from benchmarks.servers import Serving, bind_all_cores, plain_vllm, serving

Outcomes = dict[str, dict[str, Any]]  # by test

ROOT = Path(__file__).resolve().parents[1]
MODEL, BUNDLE = ROOT / "var/models/smollm2-135m-word-ordering", ROOT / "demo/bundle"

Side = Literal["vllm", "candor"]
SIDES: Sequence[Side] = ("vllm", "candor")

ENTRYPOINTS = "tests/entrypoints/"
FILES = (  # in an order in which few servers are started
    "openai/completion/test_completion.py",
    "openai/completion/test_prompt_validation.py",
    "anthropic/test_messages.py",
    "openai/chat_completion/test_chat.py",
    "openai/chat_completion/test_chat_completion.py",
    "openai/chat_completion/test_chat_logit_bias_validation.py",
    "openai/chat_completion/test_logprob_token_ids.py",
    "openai/chat_completion/test_batched_chat_completions.py",
    "openai/test_return_token_ids.py",
    "openai/test_chunked_prompt.py",
    "openai/models/test_models.py",
    "serve/tokenize/test_tokenization.py",
    "serve/instrumentator/test_basic.py",
    "tool_parsers/test_hermes_tool_parser.py",
    "../tool_use/test_chat_completions.py",
    "../tool_use/test_tool_calls.py",
    "../tool_use/test_parallel_tool_calls.py",
    "generate/structured_decisions/test_structured_decisions_e2e.py",
    "generate/generative_scoring/test_generative_scoring_e2e.py",
    "openai/responses/test_simple.py",  # from here on with a parser of reasoning
    "openai/responses/test_basic.py",
    "openai/responses/test_stateful.py",
    "openai/responses/test_structured_output.py",
    "openai/responses/test_function_call.py",
    "openai/chat_completion/test_include_reasoning.py",
    "openai/chat_completion/test_completion_with_function_calling.py",
    "openai/test_return_tokens_as_ids.py",
    "openai/chat_completion/test_chat_echo.py",
    "openai/chat_completion/test_enable_force_include_usage.py",
)
"""Those of text, without adapters, draft models and tools that run on a server of their own; of those that need no
server but vLLM's classes alone, none."""

HUB = re.compile(
    r'"(?:Qwen|HuggingFaceH4|HuggingFaceTB|NousResearch|facebook|meta-llama|openai-community)/[\w.-]+"'
)

BASE = ["--enable-auto-tool-choice", "--tool-call-parser=hermes", "--enable-prompt-tokens-details"]
KEPT = {
    "--reasoning-parser": 1,
    "--max-logprobs": 1,
    "--return-tokens-as-token-ids": 0,
    "--enable-force-include-usage": 0,
}
"""Options of a test's server that change what it answers here, and how many values each has."""
ENVIRONMENT = {"VLLM_ENABLE_RESPONSES_API_STORE": "1", "VLLM_SYSTEM_START_DATE": "2023-09-12"}
LENGTH = 4096


class Shared:
    """The one server that runs now; another is started where a test wants other options."""

    def __init__(self, side: Side, model: Path, bundle: Path) -> None:
        self._side, self._model, self._bundle = side, model, bundle
        self._wanted: list[str] = []
        self._running = ExitStack()
        self._server: Serving | None = None

    def get(self, arguments: Sequence[str]) -> Serving:
        wanted = _kept(arguments)
        if self._server is None or wanted != self._wanted:
            self.close()
            self._wanted = wanted
            self._server = self._running.enter_context(self._start(wanted))
        return self._server

    def close(self) -> None:
        self._running.close()
        self._server = None

    def _start(self, options: Sequence[str]) -> AbstractContextManager[Serving]:
        os.environ.update(ENVIRONMENT)
        names = [str(self._model), "claude-3-7-sonnet-latest"]
        if self._side == "vllm":
            limits = [f"--max-model-len={LENGTH}", "--dtype=bfloat16", "--enforce-eager", "--max-num-seqs=64"]
            limits += [
                f"--kv-cache-memory-bytes={1 << 30}",
                "--block-size=32",
                "--enable-tokenizer-info-endpoint",
            ]
            return plain_vllm(self._model, [*limits, *BASE, *options, "--served-model-name", *names])
        settings = {"CANDOR_MAX_MODEL_LEN": str(LENGTH), "CANDOR_MAX_NUM_SEQS": "64", "CANDOR_EAGER": "true"}
        settings |= {"CANDOR_SERVED_MODEL_NAME": ",".join(names), "CANDOR_VLLM": " ".join([*BASE, *options])}
        return serving(self._model, self._bundle, settings)


def _kept(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for at, one in enumerate(arguments):
        if one in KEPT:
            kept += arguments[at : at + 1 + KEPT[one]]
    return kept


# --- as a plugin of pytest ------------------------------------------------------------------------------------------

SIDE, GIVEN_MODEL, GIVEN_BUNDLE = "VLLM_TESTS_SIDE", "VLLM_TESTS_MODEL", "VLLM_TESTS_BUNDLE"
FOUND = "VLLM_TESTS_FOUND"


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before any of vLLM's files takes the class that starts `vllm serve`."""
    utils: Any = import_module("tests.utils")  # vLLM's
    hub: Any = import_module("huggingface_hub")
    model = os.environ[GIVEN_MODEL]
    shared = Shared(os.environ[SIDE], Path(model), Path(os.environ[GIVEN_BUNDLE]))  # type: ignore[arg-type]
    hub.snapshot_download = hub.HfApi.snapshot_download = lambda *_, **__: model

    class RemoteOpenAIServer(utils.RemoteOpenAIServer):  # type: ignore[misc]
        def __init__(self, model: str, args: list[str], **_: Any) -> None:
            server = shared.get(args)
            self.uds, self.host, self.port = None, "127.0.0.1", int(server.url.rpartition(":")[2])

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    utils.RemoteOpenAIServer = RemoteOpenAIServer
    Plugin.shared = shared


class Plugin:
    shared: Shared


def pytest_unconfigure() -> None:
    Plugin.shared.close()


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    why = crash.message if crash else str(report.longrepr or "")
    row = {"test": report.nodeid, "outcome": report.outcome, "when": report.when, "why": why[:2000]}
    with Path(os.environ[FOUND]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


# --- as a program ---------------------------------------------------------------------------------------------------


def copied(folder: Path, model: Path, to: Path) -> None:
    """Copies vLLM's tests with its models' names replaced."""
    shutil.copytree(folder / "tests", to / "tests")
    shutil.copytree(folder / "examples", to / "examples")
    shutil.copy(folder / "pyproject.toml", to)
    for path in (to / "tests").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if (replaced := HUB.sub(lambda _: json.dumps(str(model)), text)) != text:
            path.write_text(replaced, encoding="utf-8")


def run(
    side: Side,
    files: Sequence[str],
    folder: Path,
    model: Path,
    bundle: Path,
    found: Path,
    more: Sequence[str],
) -> None:
    """Writes each test's outcome to `found`, as it ends."""
    environment = {SIDE: side, GIVEN_MODEL: str(model), GIVEN_BUNDLE: str(bundle), FOUND: str(found)}
    environment |= {"PYTHONPATH": f"{folder}:{ROOT}", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.vllm_tests", "-p", "no:cacheprovider"]
    command += ["--tb=short", "-k", "not lora", *more, *files]
    subprocess.run(command, cwd=folder, env=os.environ | environment, check=False, stdout=sys.stderr)


def read(found: Path) -> Outcomes:
    """Returns the tests' last outcomes."""
    lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
    return {row["test"]: row for row in map(json.loads, lines)}


def table(outcomes: Mapping[Side, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Markdown: how many of each file pass, and each test that does not end alike on both."""
    counts: dict[str, Counter[tuple[str, str]]] = {}
    differ = []
    for test in dict.fromkeys([*outcomes["vllm"], *outcomes["candor"]]):
        pair = tuple(outcomes[side].get(test, {"outcome": "not run"})["outcome"] for side in SIDES)
        file = test.partition("::")[0].removeprefix(ENTRYPOINTS)
        counts.setdefault(file, Counter())[pair] += 1
        if pair[0] != pair[1]:
            differ.append((test, pair))
    columns = [("passed", "passed"), ("failed", "failed"), ("skipped", "skipped"), ("failed", "passed")]
    yield "| tests of vLLM | pass on both | fail on both | skipped on both | pass here alone | else |"
    yield "|---" * (len(columns) + 2) + "|"
    for file, count in [*counts.items(), ("**all**", sum(counts.values(), Counter()))]:
        shown = [count[one] for one in columns]
        yield f"| {file} | " + " | ".join(map(str, [*shown, count.total() - sum(shown)])) + " |"
    for test, pair in differ:
        yield f"\n{test}: {pair[0]} there, {pair[1]} here"
        for side in SIDES:
            if why := outcomes[side].get(test, {}).get("why"):
                yield f"    {side}: {why[:600]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="vLLM's sources")
    parser.add_argument("--file", action="append", help="of the chosen, by a part of its name; default: all")
    parser.add_argument("--side", choices=SIDES, action="append", help="default: both")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--out", type=Path, help="keeps every outcome in this folder, also of earlier runs")
    given, more = parser.parse_known_args()
    bind_all_cores()
    model, bundle = given.model.resolve(), given.bundle.resolve()
    files = [ENTRYPOINTS + one for one in FILES if not given.file or any(part in one for part in given.file)]
    with tempfile.TemporaryDirectory() as place:
        copied(given.folder, model, Path(place))
        out = (given.out or Path(place)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        for side in given.side or SIDES:
            run(side, files, Path(place), model, bundle, out / f"{side}.jsonl", more)
        print("\n".join(table({side: read(out / f"{side}.jsonl") for side in SIDES})))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
