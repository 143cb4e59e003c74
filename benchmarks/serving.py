"""What an answer with its region costs beside a plain one: Candor and vLLM's own OpenAI server, side by side.

    python -m benchmarks.serving                     the whole table, at most --minutes of load
    python -m benchmarks.serving --quick             concurrency 8, short prompts, for development
    python -m benchmarks.serving --form tools        with tools, a schema, or by vLLM's handlers alone
    python -m benchmarks.serving --vllm "--pipeline-parallel-size 2"   both servers with these of vLLM's options
    python -m benchmarks.serving --strangers         mode abstain, with 0, 10, 30 and 60 % strangers among the prompts

Both servers run at once on the same model, with the same settings and prompts, one under load at a time. The client
is vLLM's (`vllm bench serve`), called in this process so that it is imported once. In each round each server answers
every cell's prompts, which are new each round; who begins changes. A ratio is Candor's figure over vLLM's in the same
round and cell. Every answer of Candor has to be scored, else there is no table.

Both write the same tokens: plain vLLM is told to stop at the tag, where Candor ends an answer one step later (else it
would write the verdict and the end besides, four steps more). Steps are counted by the engines, and shown. With
--strangers Candor refuses what its first gate does not know when prefill ends, and plain vLLM writes everything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import random
import re
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.servers import Serving, bind_all_cores, plain_vllm, serving
from candor.model_store.bundle import load_bundle
from demo.task import LONGEST, completion, out_of_distribution, prompt

ROOT = Path(__file__).resolve().parents[1]
MODEL, BUNDLE = ROOT / "var/models/smollm2-135m-word-ordering", ROOT / "demo/bundle"
SOLVED = {"bare": 0, "short": 1, "long": 12}
"""Solved examples before the question. The demo's gate knows bare prompts alone."""
STRANGERS = (0.0, 0.1, 0.3, 0.6)

MAX_TOKENS = 64  # the demo's policy
LIMITS = {"max_model_len": 2048, "max_num_seqs": 64, "max_num_batched_tokens": 2048}
KV_CACHE = 1 << 30
BLOCK = 32
NAME = "word-ordering"

# name in the table -> figure of the client, or counted here
COLUMNS = {
    "answers/s": "request_throughput",
    "first token": "median_ttft_ms",
    "per token": "median_tpot_ms",
    "p50": "p50_e2el_ms",
    "p99": "p99_e2el_ms",
    "CPU an answer": "cpu_s",
    "of that, HTTP": "http_cpu_s",
}
HIGHER_IS_BETTER = {"answers/s"}


FORMS: Mapping[str, Mapping[str, Any]] = {
    "text": {},
    "handlers": {"cache_salt": "none"},
    "tools": {
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "look_up",
                    "description": "Looks a word up.",
                    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
                },
            }
        ],
    },
    "schema": {"structured_outputs": {"regex": r"<sentence>[^<]{1,200}</sentence>"}},
}
"""Fields of every request, to both servers. All but `text` are answered by vLLM's own handlers in Candor too."""
TOOLS = "--enable-auto-tool-choice --tool-call-parser=hermes"


@dataclass(frozen=True)
class Workload:
    """strangers: share of prompts that are not the task's, in mode abstain; None: none, in mode annotate.

    form: one of `FORMS`.
    """

    concurrency: int
    length: str
    shared: bool
    strangers: float | None = None
    form: str = "text"

    @property
    def requests(self) -> int:
        """The number of requests: enough to fill the pipeline three times, or to hold the share of strangers."""
        return max(6, 3 * self.concurrency) if self.strangers is None else max(40, 5 * self.concurrency)

    def __str__(self) -> str:
        length = self.length if self.strangers is None else f"{self.strangers:.0%} strangers"
        length += "" if self.form == "text" else f", {self.form}"
        return f"{self.concurrency} | {length} | {'yes' if self.shared else 'no'}"


class Prompts:
    """Word-ordering questions after solved examples. No sentence is repeated until all were used."""

    def __init__(self, sentences: Path, seed: int) -> None:
        self._random = random.Random(seed)
        lines = sentences.read_text(encoding="utf-8").splitlines()
        self._lines = [line for line in lines if 5 <= len(line.split()) <= LONGEST]
        self._left: list[str] = []

    def draw(self, cell: Workload) -> list[str]:
        common = self._solved(cell)
        drawn = [
            (common if cell.shared else self._solved(cell)) + self._question()[0]
            for _ in range(cell.requests)
        ]
        strange = round((cell.strangers or 0) * cell.requests)
        others = out_of_distribution(self._random.sample(self._lines, strange), self._random)
        for at, other in zip(self._random.sample(range(cell.requests), strange), others, strict=True):
            drawn[at] = other["messages"][0]["content"]
        return drawn

    def _solved(self, cell: Workload) -> str:
        pairs = [self._question() for _ in range(SOLVED[cell.length])]
        return "".join(f"{question}\n{completion(sentence)}\n\n" for question, sentence in pairs)

    def _question(self) -> tuple[str, str]:
        if not self._left:
            self._left = self._random.sample(self._lines, len(self._lines))
        sentence = self._left.pop()
        words = sentence.split()
        return prompt(" ".join(words[:-3]), self._random.sample(words[-3:], 3)), sentence


def drive(
    server: Serving, model: Path, prompts: Sequence[str], concurrency: int, extra: Mapping[str, Any]
) -> dict[str, float]:
    """Runs one cell through `vllm bench serve`. extra: further fields of every request. Raises RuntimeError if a
    request failed."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    counted = counters(server)
    used = server.cpu_s()
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps({"prompt": one}) + "\n" for one in prompts)
        file.flush()
        arguments = (
            "--backend openai-chat --endpoint /v1/chat/completions --dataset-name custom --skip-chat-template "
            "--temperature 0 --percentile-metrics ttft,tpot,e2el --metric-percentiles 50,99 --disable-shuffle "
            f"--disable-tqdm --ready-check-timeout-sec 0 --dataset-path {file.name} --num-prompts {len(prompts)} "
            f"--custom-output-len {MAX_TOKENS} --max-concurrency {concurrency} --base-url {server.url} "
            f"--model {model} --served-model-name {NAME}"
        ).split()
        if extra:
            arguments += ["--extra-body", json.dumps(extra)]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            figures: dict[str, float] = asyncio.run(main_async(parser.parse_args(arguments)))
    if figures["completed"] != len(prompts):
        raise RuntimeError(f"{figures['completed']} of {len(prompts)} answers: {said.getvalue()[-2000:]}")
    for name, value in counters(server).items():
        figures[name] = value - counted.get(name, 0)
    for part, seconds in server.cpu_s().items():
        figures[f"{part}_cpu_s"] = (seconds - used[part]) / len(prompts)
    figures["cpu_s"] = figures["http_cpu_s"] + figures["engine_cpu_s"]
    return figures


def counters(server: Serving) -> dict[str, float]:
    """The server's counters since its start: tokens and requests of its engine, and scored answers."""
    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=60).text):
        for sample in family.samples:
            match sample.name:
                case (
                    "vllm:generation_tokens_total" | "vllm:prompt_tokens_total" | "vllm:request_success_total"
                ):
                    found[sample.name] += sample.value
                case "sdm_answers_total":
                    kind = "unscored" if sample.labels["region"] == "unavailable" else "scored"
                    found[kind] += sample.value
    return found


def require_scored(figures: dict[str, float], prompts: int) -> None:
    """Raises RuntimeError unless every answer has a region."""
    if (figures["scored"], figures["unscored"]) != (prompts, 0):
        raise RuntimeError(
            f"of {prompts} answers {figures['scored']:g} were scored and {figures['unscored']:g} were not"
        )


@contextlib.contextmanager
def both(model: Path, bundle: Path, eager: bool, options: str = "") -> Iterator[tuple[Serving, Serving]]:
    """Starts Candor and plain vLLM with the same settings and threads; vLLM's default threads would favour Candor.

    options: further ones of vLLM's, as on its command line.
    """
    sizes = re.findall(r"--(?:tensor|pipeline|data)-parallel-size[ =](\d+)", options)
    bind_all_cores(prod(map(int, sizes)))
    settings = {f"CANDOR_{name.upper()}": str(value) for name, value in LIMITS.items()}
    settings |= {"CANDOR_KV_CACHE_BYTES": str(KV_CACHE), "CANDOR_SERVED_MODEL_NAME": NAME}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in LIMITS.items()]
    arguments += ["--dtype=bfloat16", f"--kv-cache-memory-bytes={KV_CACHE}", f"--block-size={BLOCK}"]
    arguments += [f"--served-model-name={NAME}", "--seed=0", *TOOLS.split(), *shlex.split(options)]
    settings["CANDOR_VLLM"] = f"{TOOLS} {options}"
    if eager:
        settings["CANDOR_EAGER"] = "true"
        arguments.append("--enforce-eager")
    with plain_vllm(model, arguments) as plain, serving(model, bundle, settings) as candor:
        yield candor, plain


Rounds = dict[Workload, list[tuple[dict[str, float], dict[str, float]]]]  # Candor's figures, vLLM's


def measure(
    candor: Serving,
    plain: Serving,
    model: Path,
    tag: str,
    cells: Sequence[Workload],
    prompts: Prompts,
    minutes: float,
) -> Rounds:
    """Runs whole rounds while there is time for another as long as the longest; at least one."""
    rounds: Rounds = defaultdict(list)
    for server in (candor, plain):
        drive(server, model, prompts.draw(cells[-1]), cells[-1].concurrency, {})  # warms up
    end, longest, number = time.monotonic() + 60 * minutes, 0.0, 0
    while number == 0 or time.monotonic() + longest < end:
        began = time.monotonic()
        for cell in cells:
            asked = prompts.draw(cell)
            form = FORMS[cell.form]
            ours: dict[str, Any] = {} if cell.strangers is None else {"reliability": {"mode": "abstain"}}
            fields = {candor.pid: {**form, **ours}, plain.pid: {**form, "stop": [tag]}}
            figures = {}
            for server in (candor, plain) if number % 2 else (plain, candor):
                figures[server.pid] = drive(server, model, asked, cell.concurrency, fields[server.pid])
            require_scored(figures[candor.pid], len(asked))
            rounds[cell].append((figures[candor.pid], figures[plain.pid]))
            print(f"round {number + 1}: {cell}", file=sys.stderr)
        longest, number = max(longest, time.monotonic() - began), number + 1
    return rounds


def table(rounds: Rounds) -> str:
    """Markdown of ratios, Candor over vLLM: median [lowest, highest] of the rounds."""
    heads = [
        "concurrency",
        "prompts",
        "shared prefix",
        *COLUMNS,
        "engine requests an answer",
        "steps an answer",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for cell, pairs in rounds.items():
        shown = [str(cell)]
        for figure in COLUMNS.values():
            ratios = [candor[figure] / vllm[figure] for candor, vllm in pairs]
            shown.append(f"{median(ratios):.3f} [{min(ratios):.2f}, {max(ratios):.2f}]")
        total = {
            name: [sum(pair[side][name] for pair in pairs) / len(pairs) / cell.requests for side in (0, 1)]
            for name in ("vllm:request_success_total", "vllm:generation_tokens_total")
        }
        shown.append(f"{total['vllm:request_success_total'][0]:.2f}")
        shown.append("{:.1f} beside {:.1f}".format(*total["vllm:generation_tokens_total"]))
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of load, servers' start not counted")
    parser.add_argument("--concurrency", type=int, action="append", help="default: 1, 8 and 32")
    parser.add_argument("--prompts", choices=SOLVED, action="append", help="default: short and long")
    parser.add_argument(
        "--strangers", action="store_true", help="mode abstain, with strangers among bare prompts"
    )
    parser.add_argument(
        "--form", choices=FORMS, action="append", help="of the requests; default: text, this server's own"
    )
    parser.add_argument("--quick", action="store_true", help="concurrency 8, short prompts, no shared prefix")
    parser.add_argument("--eager", action="store_true", help="neither server compiles")
    parser.add_argument("--vllm", default="", help="options of vLLM's for both servers, in one word")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--json", action="store_true", help="every round's figures in place of the table")
    given = parser.parse_args()
    forms = given.form or ["text"]
    quick = [Workload(8, "short", False, form=form) for form in forms]
    concurrencies, lengths = given.concurrency or (1, 8, 32), given.prompts or ("short", "long")
    cells = [
        Workload(*one, form=form) for one in product(concurrencies, lengths, (False, True)) for form in forms
    ]
    if given.strangers:
        cells = [
            Workload(concurrency, "bare", False, share)
            for concurrency, share in product(given.concurrency or (8, 32), STRANGERS)
        ]
    prompts = Prompts(ROOT / "demo/sentences.txt", given.seed)
    with both(given.model, given.bundle, given.eager, given.vllm) as (candor, plain):
        print(f"ready after {candor.start_s:.1f} s (vLLM: {plain.start_s:.1f} s)", file=sys.stderr)
        tag = load_bundle(given.bundle).manifest.representation.tag
        rounds = measure(
            candor, plain, given.model, tag, quick if given.quick else cells, prompts, given.minutes
        )
    if given.json:
        rows = [
            {"cell": vars(cell), "candor": ours, "vllm": theirs}
            for cell, pairs in rounds.items()
            for ours, theirs in pairs
        ]
        print(json.dumps(rows, default=float))
    else:
        print(table(rounds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
