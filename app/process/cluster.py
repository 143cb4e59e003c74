"""Candor as a Ray Serve application: an ingress, and a deployment of replicas for each model.

    client -> Ray's proxy -> Ingress -> (by model, then by what prompts begin with, or by load) -> Replica
                                                       the whole server of `candor serve`, but for its socket

A replica answers with the bytes that `candor serve` would; the ingress passes them on as they come. Where a replica
dies, or says that it cannot answer now, before anything of its answer was passed on, another is asked. What replicas
agree on (bundle, rates, quotas, verdicts) goes through the store (`candor.app.process.replicas`).

`application` is for `candor deploy` and, by its import path, for Ray's own `serve deploy` and KubeRay's RayService.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import shlex
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import ray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from ray import serve
from ray.exceptions import RayActorError, RaySystemError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from candor.app.process.settings import Settings

logger = logging.getLogger("candor")

_TRIES = 4
_PAUSE_S = 0.25
"""Before an answer is asked for again; it doubles."""
_LARGEST_WHOLE = 1 << 22
"""Bytes of an answer that is held until it is whole, so that it can be asked for again."""
_ELSEWHERE = ("bundle_behind", "engine_dead", "shutting_down")
"""Codes of errors with which a replica sends a request to another."""
_LAST_WORDS_S = 1.0
"""Between an engine's end and its process's, for streams to say why they end."""
_METRICS_WITHIN_S = 10.0
_JOINED = ("/v1/models", "/bundles")
"""Lists that every model has a part of."""
_QUIET = {"enable_access_log": False}
"""The server logs each request itself."""
_PREFIX_ROUTER = (
    "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router.PrefixCacheAffinityRouter"
)
"""The class behind `ray.serve.llm.request_router`, whose module imports vLLM, and so takes 20 s in every process."""


class Shape(BaseModel):
    """What `application` takes, as RayService's `args` have it."""

    model_config = ConfigDict(extra="forbid")

    models: list[dict[str, str]] = Field(
        min_length=1,
        description="For each model its settings, as environment variables: CANDOR_MODEL, CANDOR_BUNDLE, ...",
    )
    replicas: PositiveInt = Field(1, description="Replicas of each model, at least.")
    most_replicas: PositiveInt | None = Field(
        None, description="At most, by the answers and tokens in flight. Without it, the number is fixed."
    )
    cpus: PositiveFloat = Field(
        1.0,
        description="Processor cores that Ray reserves for each process of a model; the CPU build uses as many.",
    )
    gpus: NonNegativeInt = Field(0, description="GPUs of each process of a model: 1, or 0 for the CPU build.")
    ingresses: PositiveInt | None = Field(
        None,
        description="Processes that requests pass through. Without it, two where there are several replicas.",
    )
    routing: Literal["prefix", "load"] = Field(
        "prefix",
        description="Who gets a request: whoever has seen what its prompt begins with, or the less busy.",
    )
    answers_per_replica: PositiveInt = Field(
        32, description="Answers in flight that a replica should have; more replicas beyond it."
    )
    tokens_per_replica: PositiveInt = Field(
        1 << 16,
        description="Tokens in flight that a replica should have, prompts and longest answers; likewise.",
    )


@dataclass(frozen=True)
class Call:
    """One request on its way to a replica. prompt: text that the router compares with earlier ones."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    scheme: str
    body: bytes
    prompt: str


@dataclass(frozen=True)
class Head:
    """Status and headers of a response."""

    status: int
    headers: list[tuple[bytes, bytes]]

    def header(self, name: bytes) -> bytes:
        return next((value for key, value in self.headers if key.lower() == name), b"")


class Replica:
    """A server without a socket. environment: its settings."""

    async def __init__(self, environment: Mapping[str, str]) -> None:  # type: ignore[misc]  # Ray awaits it
        from candor.app.process.application import create_app
        from candor.app.process.backend import start_backend
        from candor.app.process.ending import Leaving
        from candor.app.process.server import prove
        from candor.app.telemetry import logs

        settings = settings_of(environment)
        logs.configure(settings.log_format)
        if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
            # vLLM's CPU build would take the whole machine, and each replica on it the same cores.
            reserved = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
            os.environ |= {
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(max(1, int(reserved))),
            }
        self._name = str(serve.get_replica_context().replica_id.unique_id).encode()
        self._leaving = Leaving()
        backend = await start_backend(settings, adapters_of(environment), vllm_of(environment, settings))
        try:
            for one in (backend, *backend.adapted):
                await prove(one, settings.engine_stall_timeout_s)
            self._app = create_app(settings, backend, self._died, leaving=self._leaving)
        except BaseException:
            await backend.engine.close()
            raise
        self._lifespan = self._app.router.lifespan_context(self._app)
        self._state: Any = await self._lifespan.__aenter__()

    def _died(self) -> None:
        # As `candor serve` does. A router would go on choosing a replica whose process lives.
        last_resort = threading.Timer(_LAST_WORDS_S, os._exit, [1])
        last_resort.daemon = True
        last_resort.start()

    async def answer(self, call: Call) -> AsyncGenerator[Head | bytes, None]:
        """Yields the response's head, then its body in pieces, as the application sends them."""
        sent: asyncio.Queue[Head | bytes | None] = asyncio.Queue()
        gone = asyncio.Event()
        came: list[MutableMapping[str, Any]] = [
            {"type": "http.request", "body": call.body, "more_body": False}
        ]

        async def receive() -> MutableMapping[str, Any]:
            if came:
                return came.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                sent.put_nowait(
                    Head(message["status"], [*message["headers"], (b"x-sdm-replica", self._name)])
                )
            elif message["type"] == "http.response.body":
                if message.get("body"):
                    sent.put_nowait(message["body"])
                if not message.get("more_body", False):
                    sent.put_nowait(None)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": call.method,
            "path": call.path,
            "raw_path": call.path.encode(),
            "query_string": call.query,
            "headers": call.headers,
            "client": call.client,
            "server": None,
            "scheme": call.scheme,
            "root_path": "",
            "state": dict(self._state),
        }
        running = asyncio.create_task(self._app(scope, receive, send))
        running.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (piece := await sent.get()) is not None:
                yield piece
        finally:
            gone.set()  # as a socket that is closed would say
            with suppress(Exception):
                await running

    async def answer_whole(self, call: Call) -> tuple[Head, bytes]:
        """As `answer`, whole; for what every replica is asked."""
        pieces = [piece async for piece in self.answer(call)]
        head = next((piece for piece in pieces if isinstance(piece, Head)), Head(500, []))
        return head, b"".join(piece for piece in pieces if isinstance(piece, bytes))

    async def check_health(self) -> None:
        """Ray asks this, and replaces a replica for which it raises: one that cannot follow the others."""
        for slot in self._state["services"].slots.values():
            if slot.behind is not None:
                raise RuntimeError(slot.behind)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `MoreOrFewer` goes by, beside Ray's own count of requests."""
        return {"tokens": float(self._state["services"].admission.tokens)}

    async def __del__(self) -> None:
        self._leaving.begun = True
        await self._lifespan.__aexit__(None, None, None)


class Ingress:
    """Sends each request to a replica of the model that it names. models: by each name; the first is the default."""

    def __init__(self, models: Mapping[str, DeploymentHandle], most_bytes: int) -> None:
        self._models = models
        self._most_bytes = most_bytes
        self._all = list({id(handle): handle for handle in models.values()}.values())

    async def __call__(self, request: Request) -> Response:
        body = bytearray()
        async for piece in request.stream():
            body.extend(piece)
            if len(body) > self._most_bytes:
                return _error(
                    413, f"the body may have {self._most_bytes} bytes here, this one has more", "too_large"
                )
        call, model = _call(request, bytes(body))
        if request.url.path == "/metrics":
            return await self._metrics(call)
        if request.method == "GET" and request.url.path in _JOINED and len(self._all) > 1:
            return await self._joined(call)
        return await self._answer(self._handle(model), call)

    def _handle(self, model: str | None) -> DeploymentHandle:
        # A name that nobody has gets its 404 from whoever is the default.
        return self._models.get(model or "") or self._all[0]

    async def _answer(self, handle: DeploymentHandle, call: Call) -> Response:
        pause_s, why = _PAUSE_S, ""
        for tried in range(1, _TRIES + 1):
            pieces = _pieces(handle, call)
            try:
                response = await self._begun(pieces)
            except BackPressureError:
                return _error(503, "every replica has all that it can hold; try later", "overloaded")
            except (RayActorError, RaySystemError, DeploymentUnavailableError) as error:
                why = type(error).__name__
            else:
                if tried == _TRIES or not _elsewhere(response):
                    return response
                why = "it sends requests elsewhere"
            logger.warning("asked again (%d of %d): %s %s: %s", tried, _TRIES, call.method, call.path, why)
            await asyncio.sleep(pause_s)
            pause_s *= 2
        return _error(
            503, "the replica that was asked has ended, and so did others; try again", "replica_lost"
        )

    async def _begun(self, pieces: AsyncIterator[Head | bytes]) -> Response:
        """Returns the response once it is whole or, of a stream, once it has begun."""
        head = await anext(pieces, Head(500, []))
        assert isinstance(head, Head)
        streams = head.header(b"content-type").startswith(b"text/event-stream")
        body = bytearray()
        async for piece in pieces:
            assert isinstance(piece, bytes)
            body.extend(piece)
            if streams or len(body) > _LARGEST_WHOLE:
                response: Response = StreamingResponse(_rest(bytes(body), pieces), head.status)
                break
        else:
            response = Response(bytes(body), head.status)
        # Ray's proxy adds the request's id itself.
        response.raw_headers = [one for one in head.headers if one[0] != b"x-request-id"]
        return response

    async def _metrics(self, call: Call) -> Response:
        pages: dict[str, str] = {}
        plain = [(name, value) for name, value in call.headers if name.lower() != b"accept"]
        call = replace(call, headers=plain)
        for handle in self._all:
            asked = handle.broadcast("answer_whole", call)
            for found in await asked.results_async(timeout_s=_METRICS_WITHIN_S, return_exceptions=True):
                if isinstance(found, Exception):  # it has just died
                    continue
                head, body = found
                if head.status != 200:
                    response = Response(body, head.status)
                    response.raw_headers = [*head.headers]
                    return response
                pages[head.header(b"x-sdm-replica").decode()] = body.decode()
        page = await asyncio.to_thread(merged, pages)
        return Response(page, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _joined(self, call: Call) -> Response:
        responses = [await self._answer(handle, call) for handle in self._all]
        if any(response.status_code != 200 for response in responses):
            return next(response for response in responses if response.status_code != 200)
        lists = [json.loads(bytes(response.body)) for response in responses]
        return JSONResponse({**lists[0], "data": [one for some in lists for one in some["data"]]})


def merged(pages: Mapping[str, str]) -> str:
    """Returns several replicas' pages of metrics as one, in which each sample says whose it is. pages: by replica."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for replica, page in pages.items():
        comments: list[str] = []
        samples: list[str] = []
        for line in page.splitlines():
            if line.startswith("# HELP ") or (line.startswith("# TYPE ") and line.split()[2] not in families):
                comments, samples = families.setdefault(line.split()[2], ([], []))
            if line.startswith("#"):
                comments.extend([line] if line not in comments else [])
            elif line:
                name, _, rest = line.partition("{" if "{" in line else " ")
                label = f'{name}{{replica="{replica}"'
                samples.append(f"{label},{rest}" if "{" in line else f"{label}}} {rest}")
    return "".join(f"{line}\n" for parts in families.values() for part in parts for line in part)


class MoreOrFewer:
    """How many replicas there should be for what is in flight. answers, tokens: that one should have."""

    def __init__(self, answers: int, tokens: int) -> None:
        self._each = (answers, tokens)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """context: Ray's AutoscalingContext. Returns the number, within what Ray allows, and no state."""
        held = sum((context.aggregated_metrics or {}).get("tokens", {}).values())
        wanted = max(context.total_num_requests / self._each[0], held / self._each[1])
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(least, min(most, math.ceil(wanted))), {}


def application(args: Mapping[str, Any]) -> serve.Application:
    """Returns the application to deploy. args: fields of `Shape`.

    Raises pydantic's ValidationError, or OptionError for an option of vLLM's that cannot be given.
    """
    shape = Shape.model_validate(args)
    models: dict[str, Any] = {}
    most_bytes = 0
    for number, environment in enumerate(shape.models):
        settings = settings_of(environment)
        most_bytes = max(most_bytes, settings.max_body_bytes)
        names = names_of(settings, adapters_of(environment))
        taken = [name for name in names if name in models]
        if taken:
            raise ValueError(f"each model served needs a name of its own, got {', '.join(taken)} twice")
        bound = _deployment(f"model-{number}", shape, settings, environment)
        models |= dict.fromkeys(names, bound)
    ingress = serve.deployment(Ingress).options(
        name="ingress",
        logging_config=_QUIET,
        num_replicas=shape.ingresses or min(2, shape.replicas),
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.options(**_version(dict.fromkeys(models, "ingress"))).bind(models, most_bytes)


def _deployment(name: str, shape: Shape, settings: Settings, environment: Mapping[str, str]) -> Any:
    processes = _processes(environment, settings)
    environment = dict(environment)
    actor: dict[str, Any] = {"num_cpus": shape.cpus, "num_gpus": shape.gpus}
    options: dict[str, Any] = {}
    if processes > 1:  # each of vLLM's workers in a bundle of its own, on one node if it can be
        actor = {"num_cpus": shape.cpus}
        worker = {"CPU": shape.cpus, **({"GPU": float(shape.gpus)} if shape.gpus else {})}
        options["placement_group_bundles"] = [worker] * processes
        options["placement_group_strategy"] = "PACK"
    if shape.most_replicas is None:
        options["num_replicas"] = shape.replicas
    else:
        options["autoscaling_config"] = {
            "min_replicas": shape.replicas,
            "max_replicas": max(shape.replicas, shape.most_replicas),
            "policy": {
                "policy_function": "candor.app.process.cluster:MoreOrFewer",
                "policy_kwargs": {"answers": shape.answers_per_replica, "tokens": shape.tokens_per_replica},
            },
        }
    if shape.routing == "prefix":
        options["request_router_config"] = {
            "request_router_class": _PREFIX_ROUTER,
            # Beyond it the less busy gets the request, whatever its prompt begins with.
            "request_router_kwargs": {"imbalanced_threshold": max(2, settings.max_num_seqs // 8)},
        }
    return (
        serve.deployment(Replica)
        .options(
            name=name,
            max_ongoing_requests=settings.max_in_flight + 16,  # beyond it, its own 503; some for probes
            health_check_period_s=5,
            logging_config=_QUIET,
            graceful_shutdown_timeout_s=settings.drain_timeout_s,
            ray_actor_options=actor,
            **options,
        )
        .options(**_version(environment))
        .bind(environment)
    )


def settings_of(environment: Mapping[str, str]) -> Settings:
    """Returns the settings that these variables give. Raises pydantic's ValidationError."""
    given = {name.removeprefix("CANDOR_").lower(): value for name, value in environment.items() if value}
    return Settings.model_validate(
        {name: value for name, value in given.items() if name in Settings.model_fields}
    )


def adapters_of(environment: Mapping[str, str]) -> list[tuple[Path, Path]]:
    """Returns the adapters and their bundles. Raises ValueError."""
    pairs = [pair.partition("=") for pair in environment.get("CANDOR_ADAPTERS", "").split()]
    if not all(adapter and bundle for adapter, _, bundle in pairs):
        raise ValueError("expected CANDOR_ADAPTERS as DIR=BUNDLE DIR=BUNDLE")
    return [(Path(adapter), Path(bundle)) for adapter, _, bundle in pairs]


def vllm_of(environment: Mapping[str, str], settings: Settings) -> dict[str, Any]:
    """Returns vLLM's options. Raises OptionError."""
    from candor.engine.vllm_options import VARIABLE, read

    given = environment.get(VARIABLE, "")
    return read(shlex.split(given), settings.engine) if given else {}


def names_of(settings: Settings, adapters: Sequence[tuple[Path, Path]]) -> list[str]:
    """Returns the names that requests may give. Raises BundleError."""
    from candor.model_store.directory import read_manifest

    name = read_manifest(settings.bundle)[0].name
    return [*settings.model_names(name), *(read_manifest(bundle)[0].name for _, bundle in adapters)]


def from_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns what belongs to a model's settings."""
    return {name: value for name, value in environment.items() if name.startswith("CANDOR_") and value}


def _version(environment: Mapping[str, str]) -> dict[str, Any]:
    """The option that names program and settings: as long as it stays, replicas that answer go on when others are
    added. Ray draws a new one at each deployment, unless it is told otherwise in this way."""
    said = json.dumps([version("candor"), sorted(environment.items())])
    return {"version": hashlib.sha256(said.encode()).hexdigest()[:16], "_internal": True}


def _processes(environment: Mapping[str, str], settings: Settings) -> int:
    """How many processes vLLM splits the model over."""
    options = vllm_of(environment, settings)
    return int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1))


async def _pieces(handle: DeploymentHandle, call: Call) -> AsyncGenerator[Head | bytes, None]:
    async for piece in handle.options(method_name="answer", stream=True).remote(call):
        yield piece


async def _rest(begun: bytes, pieces: AsyncIterator[Head | bytes]) -> AsyncGenerator[bytes, None]:
    yield begun
    async for piece in pieces:
        assert isinstance(piece, bytes)
        yield piece


def _call(request: Request, body: bytes) -> tuple[Call, str | None]:
    """Returns the call, and the model that it names, if any."""
    scope = request.scope
    model, prompt = None, ""
    if body:
        with suppress(ValueError):
            given = json.loads(body)
            if isinstance(given, dict):
                model = given.get("model")
                prompt = _text(given.get("messages") or given.get("prompt") or given.get("input"))
    elif request.url.path.startswith("/v1/models/"):
        model = request.url.path.removeprefix("/v1/models/")
    call = Call(
        scope["method"],
        scope["path"],
        scope["query_string"],
        list(scope["headers"]),
        tuple(scope["client"]) if scope.get("client") else None,
        scope.get("scheme", "http"),
        body,
        prompt or scope["path"],  # the router divides by its length
    )
    return call, model if isinstance(model, str) else None


def _text(given: Any) -> str:
    """Returns the texts of a conversation or prompt, one after the other."""
    if isinstance(given, str):
        return given
    if isinstance(given, list):
        return "".join(map(_text, given))
    return _text(given.get("content") or given.get("text")) if isinstance(given, dict) else ""


def _elsewhere(response: Response) -> bool:
    if response.status_code != 503 or isinstance(response, StreamingResponse):
        return False
    return any(f'"{code}"'.encode() in bytes(response.body) for code in _ELSEWHERE)


def _error(status: int, message: str, code: str) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status, headers={"Retry-After": "1"} if status == 503 else {})
