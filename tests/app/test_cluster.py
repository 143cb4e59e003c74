"""What Ray Serve adds, without a cluster: requests pass through whole, and are asked again where nothing was sent.

`python -m benchmarks.replicas` runs it on a real one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from starlette.requests import Request
from typer.testing import CliRunner

pytest.importorskip("ray", reason="install candor[ray]")

from ray.exceptions import ActorDiedError

from candor.app.cli import cli
from candor.app.commands.deploy import require_shared
from candor.app.process import cluster
from candor.app.process.cluster import Call, Head, Ingress, MoreOrFewer, Replica, merged

JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream")]
Pieces = list[Head | bytes | Exception]


class Handle:
    """In place of Ray's: what each call in turn yields or raises."""

    def __init__(self, *calls: Pieces) -> None:
        self.calls = list(calls)
        self.asked: list[Call] = []

    def options(self, **_: Any) -> Handle:
        return self

    async def remote(self, call: Call) -> AsyncGenerator[Head | bytes, None]:
        self.asked.append(call)
        for piece in self.calls.pop(0):
            if isinstance(piece, Exception):
                raise piece
            yield piece


def request(body: dict[str, Any] | None, path: str = "/v1/chat/completions", method: str = "POST") -> Request:
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer k")],
        "client": ("127.0.0.1", 1),
        "scheme": "http",
    }

    came = [{"type": "http.request", "body": json.dumps(body).encode() if body is not None else b""}]

    async def receive() -> dict[str, Any]:
        return came.pop() if came else await asyncio.Future()

    return Request(scope, receive)


def answered(ingress: Ingress, asked: Request) -> tuple[int, bytes]:
    async def run() -> tuple[int, bytes]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        response = await ingress(asked)
        await response(asked.scope, asked.receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_PAUSE_S", 0.001)


def test_a_request_goes_to_the_model_that_it_names() -> None:
    first, second = Handle([Head(200, JSON), b"1"]), Handle([Head(200, JSON), b"2"])
    ingress = Ingress({"one": first, "two": second}, 10_000)  # type: ignore[dict-item]
    messages = [
        {"role": "user", "content": "Say "},
        {"role": "user", "content": [{"type": "text", "text": "it"}]},
    ]
    assert answered(ingress, request({"model": "two", "messages": messages})) == (200, b"2")
    call = second.asked[0]
    assert (call.prompt, call.headers) == ("Say it", [(b"authorization", b"Bearer k")])
    assert answered(ingress, request({"prompt": "x"})) == (200, b"1")
    assert answered(ingress, request({"prompt": "x" * 20_000}))[0] == 413


@pytest.mark.parametrize(
    "first",
    [
        [ActorDiedError()],
        [Head(200, JSON), b'{"id": "half', ActorDiedError()],
        [Head(200, EVENTS), ActorDiedError()],
        [Head(503, JSON), b'{"error": {"code": "bundle_behind"}}'],
        [Head(503, JSON), b'{"error": {"code": "shutting_down"}}'],
    ],
)
def test_what_was_not_begun_is_asked_again(first: Pieces) -> None:
    handle = Handle(first, [Head(200, JSON), b"whole"])
    ingress = Ingress({"one": handle}, 10_000)  # type: ignore[dict-item]
    assert answered(ingress, request({"model": "one"})) == (200, b"whole")
    assert len(handle.asked) == 2


def test_a_stream_that_has_begun_is_cut_and_not_written_twice() -> None:
    handle = Handle([Head(200, EVENTS), b"data: 1\n\n", ActorDiedError()])
    ingress = Ingress({"one": handle}, 10_000)  # type: ignore[dict-item]
    with pytest.raises(ActorDiedError):
        answered(ingress, request({"model": "one", "stream": True}))
    assert len(handle.asked) == 1


@pytest.mark.parametrize("status", [200, 400, 429, 503])
def test_an_answer_of_its_own_is_not_asked_again(status: int) -> None:
    body = b'{"error": {"code": "overloaded"}}'
    handle = Handle([Head(status, JSON), body])
    assert answered(Ingress({"one": handle}, 10_000), request({})) == (status, body)  # type: ignore[dict-item]


def test_whoever_finds_nobody_is_told() -> None:
    handle = Handle(*([ActorDiedError()] for _ in range(9)))
    status, body = answered(Ingress({"one": handle}, 10_000), request({}))  # type: ignore[dict-item]
    assert (status, json.loads(body)["error"]["code"]) == (503, "replica_lost")
    assert len(handle.asked) == 4


def test_lists_have_every_model() -> None:
    handles = [
        Handle([Head(200, JSON), json.dumps({"object": "list", "data": [name]}).encode()]) for name in "ab"
    ]
    ingress = Ingress(dict(zip("ab", handles, strict=True)), 10_000)  # type: ignore[arg-type]
    status, body = answered(ingress, request(None, "/v1/models", "GET"))
    assert (status, json.loads(body)["data"]) == (200, ["a", "b"])


def test_a_replica_gives_the_bytes_of_the_application_and_hears_who_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(Replica, "__del__")  # Ray awaits it
    heard: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"asked"
        await send({"type": "http.response.start", "status": 201, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        if scope["path"] == "/long":
            heard.append((await receive())["type"])
            return
        await send({"type": "http.response.body", "body": b"two"})

    replica = Replica.__new__(Replica)
    vars(replica).update(_app=app, _state={}, _name=b"r1")

    def call(path: str) -> Call:
        return Call("POST", path, b"", [], None, "http", b"asked", "p")

    head, body = asyncio.run(replica.answer_whole(call("/")))
    assert (head, body) == (Head(201, [(b"a", b"b"), (b"x-sdm-replica", b"r1")]), b"onetwo")

    async def leave() -> None:
        pieces = replica.answer(call("/long"))
        assert isinstance(await anext(pieces), Head)
        assert await anext(pieces) == b"one"
        await pieces.aclose()

    asyncio.run(leave())
    assert heard == ["http.disconnect"]


def test_one_page_of_metrics_says_whose_each_sample_is(server: Any) -> None:
    server.chat("ask")
    page = server.client.get("/metrics").text
    both = merged({"r1": page, "r2": page})
    alone, together = (list(text_string_to_metric_families(text)) for text in (page, both))
    assert [family.name for family in alone] == [family.name for family in together]
    for one, two in zip(alone, together, strict=True):
        assert (one.type, one.documentation) == (two.type, two.documentation)
        for name in ("r1", "r2"):
            mine = [sample for sample in two.samples if sample.labels["replica"] == name]
            assert [(s.name, s.value) for s in mine] == [(s.name, s.value) for s in one.samples]


def test_more_replicas_for_answers_and_for_tokens() -> None:
    def wanted(requests: float, tokens: float) -> int:
        context = SimpleNamespace(
            total_num_requests=requests,
            aggregated_metrics={"tokens": {"r1": tokens / 2, "r2": tokens / 2}},
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=5,
        )
        return MoreOrFewer(10, 1000)(context)[0]

    assert [wanted(0, 0), wanted(11, 0), wanted(11, 2500), wanted(500, 0)] == [1, 2, 3, 5]


def test_deployments_ask_for_what_the_model_is_split_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "names_of", lambda *_: ["tiny"])
    monkeypatch.setattr(
        cluster, "vllm_of", lambda *_: {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    )
    model = {"CANDOR_MODEL": "m", "CANDOR_BUNDLE": "b", "CANDOR_MAX_IN_FLIGHT": "40"}
    shape = cluster.Shape(models=[model], gpus=1, most_replicas=4)
    bound = cluster._deployment("model-0", shape, cluster.settings_of(model), model)
    deployment = bound._bound_deployment
    assert deployment._replica_config.placement_group_bundles == [{"CPU": 1.0, "GPU": 1.0}] * 4
    assert deployment.max_ongoing_requests == 56
    assert deployment._deployment_config.autoscaling_config.max_replicas == 4
    with pytest.raises(ValueError, match="a name of its own"):
        cluster.application({"models": [model, model]})
    with pytest.raises(ValidationError):
        cluster.application({"models": [model], "replica": 2})


@pytest.mark.parametrize("store", [None, "store.db"])
def test_several_replicas_need_one_store(store: str | None) -> None:
    require_shared(store, 1)
    with pytest.raises(ValueError, match="PostgreSQL"):
        require_shared(store, 2)
    require_shared("postgresql://h/n", 2)


def test_the_command_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Callable[..., Any] = CliRunner().invoke
    gone = run(cli, ["deploy", str(tmp_path / "gone.env")])
    assert (gone.exit_code, "there is no" in gone.output) == (2, True)
    (tmp_path / "a.env").write_text("CANDOR_MODEL=m\n")
    unset = run(cli, ["deploy", str(tmp_path / "a.env")])
    assert (unset.exit_code, "bundle" in unset.output) == (2, True)
