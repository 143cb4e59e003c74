"""schemathesis against the server's own OpenAPI document: no 5xx, nothing the document does not say.

A real server over HTTP with keys; in the engine's place the tests' script, which answers at once, so that many
cases are asked. Run by hand, the whole or one operation of it:

    pytest -m slow tests/app/test_schema_fuzz.py [-k completions]

CANDOR_FUZZ_CASES=200 has a quick look; other cases come with another CANDOR_FUZZ_SEED.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

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

from app.security import make_key

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("CANDOR_FUZZ_CASES", "20000"))
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
    "/v1/reliability": 15,
    "/v1/reliability/feedback": 20,
}


@pytest.fixture(scope="module")
def fuzzed(
    tmp_path_factory: pytest.TempPathFactory, identity: Any, bundle: Any, start_scripted: Any
) -> Iterator[Any]:
    """A server with keys and feedback, and its document."""
    folder = tmp_path_factory.mktemp("fuzz")
    secret, key = make_key("fuzz", ["answer", "feedback", "operate"])
    (folder / "keys").write_text(key.line())
    with start_scripted(keys=folder / "keys", feedback=folder / "feedback.db") as server:
        server.client.headers["authorization"] = f"Bearer {secret}"
        document = server.client.get("/openapi.json").json()
        yield server, document, secret


def served(document: dict[str, Any]) -> dict[str, Any]:
    """The document with what this server's operator has set filled in: else most valid requests were refused for
    another model's name or a number beyond its limits, which no document can know.
    """
    narrowed: dict[str, Any] = copy.deepcopy(document)
    known = {
        "model": {"const": "tiny"},
        "n": {"type": "integer", "minimum": 1, "maximum": 3},
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": 64},
        "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 64},
        "alpha": {"enum": [None, 0.9, 0.95]},
        "exemplars": {"type": "integer", "minimum": 0, "maximum": 10},
    }
    for name, schema in narrowed["components"]["schemas"].items():
        properties = schema.get("properties", {}) if name.endswith(("Request", "Options")) else {}
        properties.update({field: known[field] for field in known.keys() & properties.keys()})
    return narrowed


def operations(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [(path, method) for path, methods in document["paths"].items() for method in methods]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("path", [*POSTS, "others"])
def test_as_documented(fuzzed: Any, path: str, mode: GenerationMode, record_property: Any) -> None:
    server, document, secret = fuzzed
    schema = schemathesis.openapi.from_dict(served(document) if mode is GenerationMode.POSITIVE else document)
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
            response = case.call(base_url=server.url, headers={"authorization": f"Bearer {secret}"})
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
