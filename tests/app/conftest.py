"""A real server on a free port, with a real estimator behind it and, in the engine's place, a script.

The script decides what is said and which state comes with it. The estimator is a real one on 8 numbers,
fitted on two clusters, so every region is reached by a state and not by a stub.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import httpx
import psutil
import pytest
import torch
import uvicorn
from opentelemetry.trace import Tracer

from benchmarks.zoo.calibrated import calibrated
from candor.app.process.application import create_app
from candor.app.process.backend import Backend, Bundles
from candor.app.process.server import uvicorn_config
from candor.app.process.settings import Settings
from candor.engine.base import (
    AdapterIdentity,
    Delta,
    EngineDead,
    Generation,
    HiddenSummary,
    ModelIdentity,
    PromptReading,
    PromptStates,
    Representation,
    Sampling,
    TokenLogprob,
)
from candor.model_store.bundle import Bundle, Exemplar
from candor.model_store.manifest import Manifest
from candor.policy.cascade import CascadeTerms
from candor.policy.certificate import Certificate, RuleCertificate, RuleTerms
from candor.policy.conversation import Conversations, SystemPrompt
from candor.policy.judging import TwoGates
from candor.policy.policy import Policy
from candor.sdm.adaptor import ExemplarAdaptor
from candor.sdm.estimator import SDMEstimator
from candor.sdm.gate import PromptGate
from candor.sdm.rule import AnswerRule
from candor.sdm.score import AnswerScore
from tests.app.upstream import FakeUpstream, answers, fake_upstream

HIDDEN = 4
ALPHAS = (0.9, 0.95)
PER_CLASS = 400
VLLM = os.environ.get("CANDOR_ENGINE") == "vllm"  # read before tests take such variables away
TINY = os.environ.get("CANDOR_TINY", "")
State = Literal[
    "follows",
    "not_following",
    "thin",
    "edge",
    "far",
    "nan",
    "huge",
    "incomplete",
    "missing",
    "wrong_size",
]


def _clusters(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """h (2n, 8): class 0 around -2, class 1 around +2 in each number; labels (2n,)."""
    centres = torch.tensor([-2.0, 2.0]).repeat_interleave(PER_CLASS)
    h = centres.unsqueeze(1) + torch.randn(2 * PER_CLASS, 2 * HIDDEN, generator=generator)
    return h, (centres > 0).long()


def fitted() -> SDMEstimator:
    """h' = h, z' = (-s, s) with s = mean(h) / 2: the two clusters lie at s = -1 and 1."""
    width = 2 * HIDDEN
    adaptor = ExemplarAdaptor(torch.zeros(width), torch.ones(width), width, 2)
    with torch.no_grad():
        adaptor.exemplar.weight.copy_(torch.eye(width))
        adaptor.exemplar.bias.zero_()
        adaptor.head.weight.copy_(torch.tensor([[-1.0], [1.0]]) * torch.full((1, width), 0.5 / width))
        adaptor.head.bias.zero_()
    generator = torch.Generator().manual_seed(0)
    return SDMEstimator.fit(adaptor, _clusters(generator), _clusters(generator), ALPHAS)


@pytest.fixture(scope="session")
def estimator() -> SDMEstimator:
    return fitted()


IDENTITY = ModelIdentity("tiny", "TinyForCausalLM", HIDDEN, "float32", "d" * 64, "a" * 64, "b" * 64, "c" * 64)


@pytest.fixture(scope="session")
def identity() -> ModelIdentity:
    return IDENTITY


@pytest.fixture(scope="session")
def bundle(estimator: SDMEstimator, identity: ModelIdentity) -> Bundle:
    return bundle_of(estimator, identity)


def bundle_of(estimator: SDMEstimator, identity: ModelIdentity) -> Bundle:
    support = estimator.support
    rows = zip(support.labels.tolist(), support.predictions.tolist(), strict=True)
    exemplars = tuple(
        Exemplar(f"e{i}", label, prediction, ({"role": "user", "content": f"prompt {i}"},), f"response {i}")
        for i, (label, prediction) in enumerate(rows)
    )
    manifest = Manifest(
        name="tiny",
        created="2026-01-01T00:00:00+00:00",
        model=identity,
        representation=Representation(),
        policy=Policy(
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            max_tokens=16,
            conversations=Conversations(SystemPrompt.fixed("Be brief.")),
        ),
        alphas=ALPHAS,
        class_names=("does not follow", "follows"),
        provenance={},
    )
    report = {"reference_abstention_ratio": {"0.9": 0.25, "0.95": 0.5}}
    return Bundle(manifest, estimator, exemplars, report, "0123456789abcdef" * 4)


class LetterFormat:
    """Stands in for a chat format: one token a letter; turns are set off by control tokens above Unicode."""

    START, END = 0x110000, 0x110001
    longest_token = 4  # so that what a body's tokens refuse is not always known from its characters

    def encode_chat(
        self, messages: Sequence[dict[str, str]], template_arguments: dict[str, Any] | None = None
    ) -> list[int]:
        if any(message["role"] == "user" and "{% x %}" in message["content"] for message in messages):
            raise ValueError("the model's chat template refused these messages: no templates here")
        ids: list[int] = []
        for message in messages:
            ids += [self.START, *self.encode_text(f"{message['role']}:{message['content']}"), self.END]
        return [*ids, self.START]

    def encode_text(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    encode_response = encode_text

    def encode_endings(
        self,
        messages: Sequence[dict[str, str]],
        endings: Sequence[str],
        template_arguments: dict[str, Any] | None = None,
    ) -> list[list[int]]:
        *before, last = messages
        return [
            self.encode_chat([*before, {**last, "content": last["content"] + ending}]) for ending in endings
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) if i < self.START else "|" for i in ids)


@dataclass(frozen=True)
class Script:
    """What the engine says to a prompt that contains a given text.

    fails: raised after the pieces. hangs: nothing more comes after the pieces.
    """

    pieces: tuple[str, ...] = ("The", " answer", ".")
    state: State = "follows"
    kind: Literal["known", "stranger", "unpromising", "incomplete", "missing"] = "known"
    finish: Literal["stop", "length"] = "stop"
    completion_tokens: int = 3
    pause_s: float = 0.0
    fails: Exception | None = None
    hangs: bool = False
    queued_s: float | None = None


@dataclass
class ScriptedEngine:
    """An engine that follows scripts and keeps a record of what it was asked."""

    identity: ModelIdentity
    representation: Representation = field(default_factory=Representation)
    adapter: AdapterIdentity | None = None
    earlier_identity: ModelIdentity = None  # type: ignore[assignment]  # the same, unless a test says otherwise
    max_model_len: int = 512
    scripts: dict[str, Script] = field(default_factory=dict)
    known: dict[str, torch.Tensor] = field(default_factory=dict)  # h of the exemplars' pairs, by prompt
    asked: list[tuple[str, Sampling, bool]] = field(default_factory=list)
    read: list[tuple[str, str]] = field(default_factory=list)  # prompts, and the tokens asked about
    cancelled: list[str] = field(default_factory=list)
    summarised: int = 0
    running: int = 0
    most_running: int = 0
    dead: bool = False
    closed: bool = False

    def __post_init__(self) -> None:
        self.earlier_identity = self.earlier_identity or self.identity

    def script(self, prompt: str, **what: Any) -> str:
        """Sets what is said to prompts that contain `prompt`, and returns it."""
        self.scripts[prompt] = Script(**what)
        return prompt

    def samplings(self, prompt: str) -> list[Sampling]:
        """How prompts that contain `prompt` were sampled."""
        return [sampling for text, sampling, _ in self.asked if prompt in text]

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        capture: bool = True,
        prompt_states: bool = False,
    ) -> AsyncGenerator[PromptStates | Delta | Generation, None]:
        text = LetterFormat().decode(prompt_ids)
        script = next((script for key, script in self.scripts.items() if key in text), Script())
        self.asked.append((text, sampling, capture))
        self.running += 1
        try:
            if prompt_states and script.kind != "missing":
                yield _prompt(script.kind)
            for delta in self._deltas(script, sampling):
                await asyncio.sleep(script.pause_s)
                yield delta
            if script.hangs:
                await asyncio.Event().wait()
            if script.fails:
                raise script.fails
            generation = self._generation(script, prompt_ids, sampling, capture)
            if prompt_states and script.kind != "missing":
                generation = replace(generation, prompt=_prompt(script.kind))
            yield generation
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled.append(text)
            raise
        finally:
            self.running -= 1

    def _deltas(self, script: Script, sampling: Sampling) -> list[Delta]:
        if sampling.logprobs is None:
            return [Delta(piece) for piece in script.pieces]
        return [Delta(piece, (_logprob(piece),)) for piece in script.pieces]

    def _generation(
        self, script: Script, prompt_ids: Sequence[int], sampling: Sampling, capture: bool
    ) -> Generation:
        return Generation(
            text="".join(script.pieces),
            token_ids=tuple(range(script.completion_tokens)),
            finish_reason=script.finish,
            tagged=True,
            truncated=script.finish == "length",
            hidden=_hidden(script.state) if capture else None,
            prompt_tokens=len(prompt_ids),
            completion_tokens=script.completion_tokens,
            logprobs=tuple(delta.logprobs[0] for delta in self._deltas(script, sampling))
            if sampling.logprobs is not None
            else (),
            queued_s=script.queued_s,
        )

    async def summarise(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> HiddenSummary:
        text = LetterFormat().decode(prompt_ids)
        self.summarised += 1
        script = next((script for key, script in self.scripts.items() if key in text), Script())
        if script.fails:
            raise script.fails
        exemplar = re.search(r"user:(prompt \d+)\|", text)
        if exemplar and exemplar[1] in self.known:
            mean, last = self.known[exemplar[1]].split(HIDDEN)
            return HiddenSummary(mean, last, torch.empty(0), 10, complete=True)
        hidden = _hidden(script.state)
        assert hidden is not None
        return hidden

    async def prompt_states(self, prompt_ids: Sequence[int]) -> PromptStates:
        text = LetterFormat().decode(prompt_ids)
        script = next((script for key, script in self.scripts.items() if key in text), Script())
        return _prompt(script.kind)

    async def read_prompt(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> PromptReading:
        """The first option is the likeliest, each further one by a half less so."""
        text = LetterFormat().decode(prompt_ids)
        script = next((script for key, script in self.scripts.items() if key in text), Script())
        self.read.append((text, "".join(map(chr, token_ids))))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(script.pause_s)
            if script.hangs:
                await asyncio.Event().wait()
            if script.fails:
                raise script.fails
            exemplar = re.search(r"user:(prompt \d+)\n", text)
            if exemplar and exemplar[1] in self.known:
                states = PromptStates(*self.known[exemplar[1]].split(HIDDEN), complete=True)
            else:
                hidden = _hidden(script.state)
                assert hidden is not None
                states = PromptStates(hidden.mean, hidden.last, hidden.complete)
            return PromptReading(states, tuple(-1 - 0.5 * at for at in range(len(token_ids))))
        except asyncio.CancelledError:
            self.cancelled.append(text)
            raise
        finally:
            self.running -= 1

    async def check(self) -> None:
        if self.dead:
            raise EngineDead("the script ended")

    async def close(self) -> None:
        self.closed = True


def _logprob(piece: str) -> TokenLogprob:
    """With two alternatives, however many are asked for."""
    return TokenLogprob(1, piece, -0.5, ((1, piece, -0.5), (2, "other", float("-inf"))))


SCORE_MIN = 1.5
"""Between the score of the state "follows" (2) and that of "thin" (1), in the two-gate bundle."""


@pytest.fixture(scope="session")
def gates() -> TwoGates:
    """S = the mean of h; prompts near 0 are known. Certified at 0.9 alone; answers had 12.5 tokens on average."""
    draw = torch.Generator().manual_seed(0)
    width = 2 * HIDDEN
    states = [torch.randn(n, width, generator=draw) for n in (40, 60)]
    gate = PromptGate.fit(states[0], states[1], (HIDDEN, HIDDEN), 2, 1)
    weight = torch.cat([torch.zeros(width), torch.full((width,), 1 / width), torch.zeros(4)])
    one = torch.ones((), dtype=torch.float64)
    certificate = RuleCertificate(0.9, 0.9, 0.95, SCORE_MIN, 400, 200, 193, 300, 0.93)
    terms = RuleTerms("last", 0.02, 0.019, 0.95, 12.5, 0, (certificate,))
    return TwoGates(AnswerRule(gate, AnswerScore(weight, torch.tensor(0.0), one, one)), terms)


def _prompt(kind: str) -> PromptStates:
    """As the two-gate bundle's gate sees it: near its reference, or far off."""
    half = torch.full((HIDDEN,), {"stranger": 50.0, "unpromising": -0.3}.get(kind, 0.0))
    return PromptStates(half, half, complete=kind != "incomplete")


def _hidden(state: State) -> HiddenSummary | None:
    """A state that the fitted estimator judges as the name says (`test_scoring` checks that it does)."""
    if state == "missing":
        return None
    size = HIDDEN + 1 if state == "wrong_size" else HIDDEN
    value = {
        "follows": 2.0,
        "not_following": -2.0,
        "thin": 1.0,
        "edge": 0.75,
        "far": 40.0,
        "nan": float("nan"),
        "huge": 3e38,  # finite, but its distances are not
    }
    half = torch.full((size,), value.get(state, 2.0))
    return HiddenSummary(half, half, torch.empty(0), 10, complete=state != "incomplete")


@pytest.fixture
def engine(identity: ModelIdentity, bundle: Bundle) -> ScriptedEngine:
    return scripted(identity, bundle)


def scripted(identity: ModelIdentity, bundle: Bundle) -> ScriptedEngine:
    """An engine that gives the exemplars' states as they were calibrated: h' = h in this estimator."""
    rows = zip(bundle.exemplars, bundle.estimator.support.h_prime, strict=True)
    return ScriptedEngine(identity, known={exemplar.prompt: h for exemplar, h in rows})


@pytest.fixture
def hidden() -> Callable[[State], HiddenSummary | None]:
    return _hidden


@pytest.fixture
def backend(engine: ScriptedEngine, bundle: Bundle) -> Backend:
    return Backend(engine, LetterFormat(), bundle)  # type: ignore[arg-type]


def make_settings(**given: Any) -> Settings:
    return Settings(**{"model": Path("model"), "bundle": Path("bundle"), **given})


@pytest.fixture
def settings() -> Callable[..., Settings]:
    """Settings of a test: given values over defaults."""
    return make_settings


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_outside() -> None:
    for name in [name for name in os.environ if name.startswith("CANDOR_")]:
        del os.environ[name]


@dataclass(frozen=True)
class Running:
    """A server that listens. ended: set when the engine's death was reported."""

    url: str
    engine: ScriptedEngine
    client: httpx.Client
    ended: threading.Event

    def chat(self, prompt: str, **more: Any) -> httpx.Response:
        messages = [{"role": "user", "content": prompt}]
        return self.client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, **more})

    def chunks(self, prompt: str, **more: Any) -> list[dict[str, Any]]:
        """A streamed chat's chunks; the last must be [DONE]."""
        return events(self.chat(prompt, stream=True, **more).text)


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of each event of a stream that ends as it should."""
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@contextmanager
def running(
    engine: ScriptedEngine,
    bundle: Bundle,
    settings: Settings,
    tracer: Tracer | None = None,
    adapted: Sequence[Backend] = (),
    chat: LetterFormat | None = None,
) -> Iterator[Running]:
    """A server in a thread; afterwards, everything that the engine was asked for must have ended."""
    backend = Backend(engine, chat or LetterFormat(), bundle, tuple(adapted))  # type: ignore[arg-type]
    with listening(engine, backend, settings, tracer) as server:
        yield server


@contextmanager
def listening(
    engine: ScriptedEngine, backend: Backend, settings: Settings, tracer: Tracer | None = None
) -> Iterator[Running]:
    ended = threading.Event()
    app = create_app(settings, backend, ended.set, tracer)
    server = uvicorn.Server(uvicorn_config(app, settings.model_copy(update={"drain_timeout_s": 2})))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started, 30)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=30) as client:
                yield Running(url, engine, client, ended)
        finally:
            server.should_exit = True
            thread.join(10)
    assert engine.closed
    assert engine.running == 0


Serve = Callable[..., AbstractContextManager[Running]]


@pytest.fixture
def serve(engine: ScriptedEngine, bundle: Bundle) -> Serve:
    """`with serve(alpha=0.95) as server`: a server with these settings; `policy`, `report`, `certificates`,
    `gates`, `cascade` go into the bundle."""

    def start(
        policy: Policy | None = None,
        report: dict[str, Any] | None = None,
        tracer: Tracer | None = None,
        certificates: Sequence[Certificate] = (),
        gates: TwoGates | None = None,
        adapted: Sequence[Backend] = (),
        chat: LetterFormat | None = None,
        cascade: CascadeTerms | None = None,
        exemplars: tuple[Exemplar, ...] | None = None,
        **given: Any,
    ) -> AbstractContextManager[Running]:
        terms = gates.terms if gates else None
        manifest = replace(bundle.manifest, certificates=tuple(certificates), rule=terms, cascade=cascade)
        served = replace(bundle, manifest=manifest, rule=gates, exemplars=exemplars or bundle.exemplars)
        if policy is not None:
            served = replace(served, manifest=replace(manifest, policy=policy))
        if report is not None:
            served = replace(served, report=report)
        return running(
            engine, served, make_settings(**{"engine_check_interval_s": 0.02, **given}), tracer, adapted, chat
        )

    return start


@pytest.fixture
def serve_from(engine: ScriptedEngine) -> Serve:
    """`with serve_from(directory, shadow=other) as server`: reads bundles from the disk as a server does at start."""
    return serving_from(engine)


def serving_from(engine: ScriptedEngine) -> Serve:
    def start(
        directory: Path, engine: ScriptedEngine = engine, **given: Any
    ) -> AbstractContextManager[Running]:
        settings = make_settings(bundle=directory, engine_check_interval_s=0.02, **given)
        read = Bundles.read(settings)
        path, bundle = read.first
        backend = Backend(
            engine,
            LetterFormat(),  # type: ignore[arg-type]
            bundle,
            path=path,
            shadow=read.shadow,
            promotions=read.promotions,
        )
        engine.closed = False
        return listening(engine, backend, settings)

    return start


@pytest.fixture
def make_engine(identity: ModelIdentity, bundle: Bundle) -> Callable[[], ScriptedEngine]:
    """For a further replica."""
    return lambda: scripted(identity, bundle)


@pytest.fixture(scope="session")
def _shared_server(identity: ModelIdentity, bundle: Bundle) -> Iterator[Running]:
    with running(scripted(identity, bundle), bundle, make_settings()) as server:
        yield server


@pytest.fixture
def server(_shared_server: Running) -> Iterator[Running]:
    """A server with default settings, whose engine knows no script. Its metrics are those of all tests."""
    engine = _shared_server.engine
    engine.scripts.clear()
    engine.asked.clear()
    engine.cancelled.clear()
    yield _shared_server
    until(lambda: engine.running == 0)


def until(holds: Callable[[], bool], within_s: float = 5.0) -> None:
    """Waits for something that another thread does; fails if it does not come."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def hostile() -> SimpleNamespace:
    """The corpus in hostile.py."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("hostile.py"))))


@pytest.fixture
def kinds() -> SimpleNamespace:
    """The corpus in kinds.py."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("kinds.py"))))


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    """An upstream on a loopback port that answers "Theirs."."""
    with fake_upstream() as fake:
        fake.behaves(answers())
        yield fake


class Replica:
    """replica.py: a server in a process of its own."""

    def __init__(self, log: Path, port: int = 0, real: Sequence[Path] = (), **environment: str) -> None:
        """real: a model's directory and its bundle's, for a real engine in the script's place."""
        self._log = log
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CANDOR_")}
        root = Path(__file__).resolve().parents[2]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("replica.py"), str(port), *real],
                stdout=output,
                stderr=output,
                cwd=root,
                env={**clean, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment},
            )

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def ready(self) -> bool:
        assert self.process.poll() is None, self.output
        return "ready url=" in self.output

    @property
    def url(self) -> str:
        found = re.search(r"ready url=(\S+)", self.output)
        assert found is not None
        return found[1]

    @property
    def memory(self) -> int:
        """Resident bytes of the process that serves HTTP."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def held(self) -> list[float]:
        """What was printed since the server was ready, but for the quarter of a second of its start."""
        after = self.output.split("ready url=")[1]
        return [float(value) for value in re.findall(r"held ([0-9.]+)", after)][1:]


@pytest.fixture
def start_replica(tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    """Starts replicas, waits until they are ready, and ends them with the test.

    With CANDOR_ENGINE=vllm their engine is a real one, with a tiny model (benchmarks.zoo.calibrated).
    """
    started: list[Replica] = []
    real: Sequence[Path] = ()
    settings: dict[str, str] = {}
    if VLLM:
        real = calibrated(Path(TINY or tmp_path / "tiny"))
        settings = {
            "CANDOR_EAGER": "true",
            "CANDOR_MAX_MODEL_LEN": "1024",
            "CANDOR_SERVED_MODEL_NAME": "tiny",
        }
        settings["CANDOR_KV_CACHE_BYTES"] = str(1 << 25)

    def start(port: int = 0, *, wait: bool = True, **environment: str) -> Replica:
        one = Replica(tmp_path / f"replica.{len(started)}", port, real, **settings | environment)
        started.append(one)
        if wait:
            until(lambda: one.ready, 600 if VLLM else 180)
        return one

    yield start
    for one in started:
        with suppress(psutil.NoSuchProcess):  # most tests end it themselves
            for child in psutil.Process(one.process.pid).children(recursive=True):
                child.kill()
        one.process.kill()
        one.process.wait()


@pytest.fixture
def wait_until() -> Callable[..., None]:
    return until


@pytest.fixture(scope="module")
def start_scripted(identity: ModelIdentity, bundle: Bundle) -> Callable[..., AbstractContextManager[Running]]:
    """`with start_scripted(keys=...) as server`: for a whole module, on an engine of its own."""

    def start(**given: Any) -> AbstractContextManager[Running]:
        return running(scripted(identity, bundle), bundle, make_settings(**given))

    return start


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A real PostgreSQL (tests/app/postgres.py); `.database()` makes a database and returns its URL."""
    made = runpy.run_path(str(Path(__file__).with_name("postgres.py")))
    try:
        with made["running"]() as server:
            yield server
    except LookupError as error:
        pytest.skip(str(error))
