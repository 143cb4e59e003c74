"""schemathesis against the server's own OpenAPI document: no 5xx, nothing the document does not say.

A real server over HTTP with keys; in the engine's place the tests' script, which answers at once, so that many
cases are asked. Run by hand, the whole or one operation of it; or beside vLLM, with a tiny model:

    pytest -m slow tests/app/test_schema_fuzz.py [-k completions]
    CANDOR_ENGINE=vllm CANDOR_FUZZ_CASES=2000 pytest -m slow tests/app/test_schema_fuzz.py

CANDOR_FUZZ_CASES=200 has a quick look; other cases come with another CANDOR_FUZZ_SEED.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.servers import serving
from benchmarks.zoo.calibrated import calibrated
from candor.app.edge.keys import make_key

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("CANDOR_FUZZ_CASES", "20000"))
VLLM = os.environ.get("CANDOR_ENGINE") == "vllm"
SEED = int(os.environ.get("CANDOR_FUZZ_SEED", "0"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
POSTS = {  # share of the cases, in hundredths; the rest goes to the others evenly
    "/v1/chat/completions": 10,
    "/v1/completions": 8,
    "/v1/decisions": 10,
    "/v1/reliability": 15,
    "/v1/reliability/feedback": 20,
}


@dataclass(frozen=True)
class Fuzzed:
    """The server. alphas: those of its bundle."""

    url: str
    key: str
    model: str
    alphas: tuple[float, ...]
    document: dict[str, Any]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory, start_scripted: Any) -> Iterator[Fuzzed]:
    """A server with keys and feedback, and its document."""
    folder = tmp_path_factory.mktemp("fuzz")
    secret, key = make_key("fuzz", ["answer", "feedback", "operate"])
    (folder / "keys").write_text(key.line())

    def ask(url: str, path: str) -> Any:
        return httpx.get(f"{url}{path}", headers={"authorization": f"Bearer {secret}"}, timeout=30).json()

    def describe(url: str) -> Fuzzed:
        [model] = ask(url, "/v1/models")["data"]
        alphas = tuple(model["reliability"]["alphas"])
        return Fuzzed(url, secret, model["id"], alphas, ask(url, "/openapi.json"))

    if VLLM:
        settings = {"CANDOR_KEYS": str(folder / "keys"), "CANDOR_STORE": str(folder / "feedback.db")}
        settings |= {
            "CANDOR_EAGER": "true",
            "CANDOR_MAX_MODEL_LEN": "1024",
            "CANDOR_KV_CACHE_BYTES": str(1 << 26),
        }
        model, bundle = calibrated(Path(os.environ.get("CANDOR_TINY", folder / "tiny")))
        with serving(model, bundle, settings) as real:
            before = real.memory_by_process()
            yield describe(real.url)
            print(f"\nresident bytes: {before} -> {real.memory_by_process()}")
            metrics = httpx.get(
                f"{real.url}/metrics", headers={"authorization": f"Bearer {secret}"}, timeout=30
            )
            print(re.findall(r"candor_event_loop_lag_seconds[^#\n]*", metrics.text))
    else:
        with start_scripted(keys=folder / "keys", store=str(folder / "feedback.db")) as scripted:
            yield describe(scripted.url)


def served(server: Fuzzed) -> dict[str, Any]:
    """The document with what this server's operator has set filled in: else most valid requests were refused for
    another model's name or a number beyond its limits, which no document can know.
    """
    narrowed: dict[str, Any] = copy.deepcopy(server.document)
    known = {
        "model": {"const": server.model},
        "n": {"type": "integer", "minimum": 1, "maximum": 3},
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": 64},
        "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 64},
        "alpha": {"enum": [None, *server.alphas]},
        "exemplars": {"type": "integer", "minimum": 0, "maximum": 10},
    }
    for name, schema in narrowed["components"]["schemas"].items():
        properties = (
            schema.get("properties", {}) if name.endswith(("Request", "Options", "Reliability")) else {}
        )
        properties.update({field: known[field] for field in known.keys() & properties.keys()})
    return narrowed


def operations(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [(path, method) for path, methods in document["paths"].items() for method in methods]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("path", [*POSTS, "others"])
def test_as_documented(fuzzed: Fuzzed, path: str, mode: GenerationMode) -> None:
    document = fuzzed.document
    schema = schemathesis.openapi.from_dict(served(fuzzed) if mode is GenerationMode.POSITIVE else document)
    schema.config.generation.update(modes=[mode])
    known = operations(document)
    chosen = [one for one in known if one[0] == path and one[1] == "post"] or [
        one for one in known if one[0] not in POSTS or one[1] != "post"
    ]
    share = POSTS.get(path, 100 - sum(POSTS.values())) / 100 / 2  # half valid, half not
    each = -(-int(CASES * share) // len(chosen))
    statuses: Counter[int] = Counter()
    for where, method in chosen:
        operation = schema[where][method]

        @seed(SEED)
        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=each,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: Any) -> None:
            headers = {"authorization": f"Bearer {fuzzed.key}"}
            response = case.call(base_url=fuzzed.url, headers=headers, timeout=300)  # vLLM may be slow
            statuses[response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        try:
            ask()
        except Exception as error:
            if (
                "Unsatisfiable" not in type(error).__name__
            ):  # nothing can be wrong with a request without parameters
                raise
    print(f"\n{path} {mode.value}: {sum(statuses.values())} cases, {dict(sorted(statuses.items()))}")
    assert sum(statuses.values()) >= min(each, 1)
    assert not [status for status in statuses if status >= 500]
