"""A language model as verifier, over real HTTP: what it is asked, what it says, and every way in which it fails."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from candor.calibration.cache import AnswerCache
from candor.calibration.data import Record, load_records
from candor.calibration.early import try_verifiers
from candor.calibration.errors import DataError, VerifierError
from candor.calibration.generate import Labelled, collect
from candor.calibration.judge import JudgeModel, JudgeSettings, read_verdict
from candor.calibration.kept import KeptAnswers, NotKept
from candor.calibration.labels import verifier_of
from candor.calibration.verifiers import Question, load_verifier
from candor.engine.prompt import ChatFormat
from candor.policy.policy import Policy

MakeEngine = Callable[..., Any]


@dataclass
class Endpoint:
    """An endpoint that listens. say: the reply to a request's body, a text, or a status with its headers.

    asked: the bodies. keys: the authorization headers. most: requests at once.
    """

    url: str = ""
    say: Callable[[dict[str, Any]], str | tuple[int, dict[str, str]]] = lambda _: "right"
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    delay: float = 0
    running: int = 0
    most: int = 0


@contextmanager
def listening() -> Iterator[Endpoint]:
    endpoint, lock = Endpoint(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                endpoint.asked.append(body)
                endpoint.keys.append(self.headers["authorization"])
                endpoint.times.append(time.monotonic())
                endpoint.running += 1
                endpoint.most = max(endpoint.most, endpoint.running)
                said = endpoint.say(body)
            time.sleep(endpoint.delay)
            status, headers = (200, {}) if isinstance(said, str) else said
            reply = {
                "choices": [{"message": {"content": said}}],
                "usage": {"prompt_tokens": 50, "completion_tokens": 1},
            }
            content = json.dumps(reply).encode()
            with lock:
                endpoint.running -= 1
            self.send_response(status)
            for name, value in {"content-length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with listening() as one:
        yield one


def settings(path: Path, endpoint: Endpoint, **more: Any) -> Path:
    given = {"url": endpoint.url, "model": "m", "rubric": "Right if the number is the same.", **more}
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items()))
    return path


def task(folder: Path, endpoint: Endpoint, numbers: Sequence[int], **more: Any) -> list[Record]:
    settings(folder / "judge.toml", endpoint, **more)
    rows = [
        {"id": f"r{i}", "prompt": f"number {i}", "reference": str(i), "verifier": "judge(judge.toml)"}
        for i in numbers
    ]
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_verifier.cache_clear()
    return load_records(path)


def gather(
    engine: Any, chat: ChatFormat, records: Sequence[Record], folder: Path, **more: Any
) -> list[Labelled]:
    with AnswerCache(folder / "cache") as cache:
        return asyncio.run(
            collect(
                engine,
                chat,
                records,
                Policy(max_tokens=16),
                engine.representation,
                cache,
                8,
                lambda _: None,
                **more,
            )
        )


def by_reference(body: dict[str, Any]) -> str:
    """Says right exactly where answer and reference are the same text."""
    content = body["messages"][1]["content"]
    answer = content.split("<answer>\n")[1].split("\n</answer>")[0]
    reference = content.split("<reference>\n")[1].split("\n</reference>")[0]
    return "Right." if answer == reference else "wrong"


def test_labels_are_what_the_judge_says_and_are_paid_once(
    endpoint: Endpoint,
    make_engine: MakeEngine,
    chat: ChatFormat,
    hard: Callable[[int], float],
    tmp_path: Path,
) -> None:
    endpoint.say = by_reference
    records = task(tmp_path, endpoint, range(30))
    answers = gather(make_engine(), chat, records, tmp_path)
    assert [answer.label for answer in answers] == [int(hard(i) <= 0.7) for i in range(30)]
    assert len(endpoint.asked) == 30
    verifier = verifier_of(records[0])
    assert verifier is not None
    assert verifier.costs is not None
    assert verifier.costs() == "judge(judge.toml) was asked 30 times: 1500 tokens read, 30 written"
    assert gather(make_engine(), chat, records, tmp_path)[3].label == answers[3].label
    assert len(endpoint.asked) == 30
    gather(make_engine(), chat, records, tmp_path, relabel=True)
    assert len(endpoint.asked) == 60


def test_it_sees_rubric_question_reference_and_answer(endpoint: Endpoint, tmp_path: Path) -> None:
    verify = load_verifier(f"judge({settings(tmp_path / 'judge.toml', endpoint, max_tokens=4)})")
    asked = Question("4", {"value": 4}, ({"role": "user", "content": "2 + 2?"},))

    async def ask() -> Any:
        try:
            return await verify.label(asked)
        finally:
            assert verify.close is not None
            await verify.close()

    assert asyncio.run(ask()) is True
    (body,) = endpoint.asked
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 4)
    system, user = body["messages"]
    assert "Right if the number is the same." in system["content"]
    assert user["content"] == (
        '<question>\n2 + 2?\n</question>\n\n<reference>\n{"value": 4}\n</reference>\n\n<answer>\n4\n</answer>'
    )
    assert endpoint.keys == [None]


def test_a_key_comes_from_the_environment(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANDOR_JUDGE_KEY", "s3cret")
    assert load_verifier(f"judge({settings(tmp_path / 'judge.toml', endpoint)})")("4", "4") is True
    assert endpoint.keys == ["Bearer s3cret"]


@pytest.mark.parametrize(
    ("content", "verdict"),
    [("right", True), ("Wrong.", False), ("INCORRECT", False), ("It is not right.", False), ("not wrong", "unknown"),
     ("First it seemed right.\nwrong", False), ("unknown", "unknown"), ("Paris", "unknown"), ("", "unknown"),
     (None, "unknown"), ("a brightly correct one", True)],
)  # fmt: skip
def test_what_counts_as_a_verdict(content: Any, verdict: Any) -> None:
    assert read_verdict({"choices": [{"message": {"content": content}}]}) == verdict


@pytest.mark.parametrize("reply", [{}, {"choices": []}, {"choices": [{}]}, {"choices": [3]}])
def test_a_reply_without_a_text_is_unknown(reply: Any) -> None:
    assert read_verdict(reply) == "unknown"


def test_unknown_is_kept_and_counts_as_no_label(
    endpoint: Endpoint, make_engine: MakeEngine, chat: ChatFormat, tmp_path: Path
) -> None:
    endpoint.say = lambda body: "I cannot say" if "number 1\n" in body["messages"][1]["content"] else "right"
    records = task(tmp_path, endpoint, [1, 2])
    first, second = gather(make_engine(), chat, records, tmp_path)
    assert (first.label, first.unknown, second.label, second.unknown) == (0, True, 1, False)
    gather(make_engine(), chat, records, tmp_path)
    assert len(endpoint.asked) == 2


def test_it_is_asked_again_while_it_is_busy(endpoint: Endpoint, tmp_path: Path) -> None:
    replies: list[Any] = [(503, {}), (429, {"retry-after": "1"}), "right"]
    endpoint.say = lambda _: replies.pop(0)
    verify = load_verifier(f"judge({settings(tmp_path / 'judge.toml', endpoint)})")
    assert verify("4", "4") is True
    assert len(endpoint.asked) == 3
    assert endpoint.times[2] - endpoint.times[1] >= 1


def test_what_it_refuses_is_said_at_once(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.say = lambda _: (401, {})
    verify = load_verifier(f"judge({settings(tmp_path / 'judge.toml', endpoint)})")
    with pytest.raises(VerifierError, match=r"refused the question: 401 .*; set CANDOR_JUDGE_KEY"):
        verify("4", "4")
    assert len(endpoint.asked) == 1


def test_one_that_is_not_there_is_said_before_any_model_starts(tmp_path: Path) -> None:
    with listening() as gone:
        pass
    records = task(tmp_path, gone, [1], patience_s=1)
    with pytest.raises(
        DataError, match=r'line 1 \(id "r1"\), tried before any answer: .* gave no verdict for 1 s'
    ):
        try_verifiers(records)


def test_the_trial_is_paid_once_too(endpoint: Endpoint, tmp_path: Path) -> None:
    records = task(tmp_path, endpoint, [1, 2])
    for _ in range(3):
        try_verifiers(records, tmp_path / "cache")
    assert len(endpoint.asked) == 1


def test_nobody_is_asked_while_it_is_found_out_what_is_kept(
    endpoint: Endpoint, make_engine: MakeEngine, chat: ChatFormat, tmp_path: Path
) -> None:
    class Kept(KeptAnswers):
        def __init__(self) -> None:
            engine = make_engine()
            self.identity, self.adapter = engine.identity, None
            self.representation, self.max_model_len = engine.representation, engine.max_model_len

    records = task(tmp_path, endpoint, range(4))
    gather(make_engine(), chat, records[:3], tmp_path)
    with AnswerCache(tmp_path / "cache") as cache:
        cache._database.execute("DELETE FROM labels")
    endpoint.asked.clear()
    with pytest.raises(NotKept, match='the answer to "r3" is not in the cache'):
        gather(Kept(), chat, records, tmp_path)
    assert endpoint.asked == []
    assert len(gather(Kept(), chat, records[:3], tmp_path)) == 3
    assert len(endpoint.asked) == 3


def test_one_that_goes_away_leaves_its_verdicts(
    endpoint: Endpoint, make_engine: MakeEngine, chat: ChatFormat, tmp_path: Path
) -> None:
    endpoint.say = lambda _: "right" if len(endpoint.asked) <= 5 else (500, {})
    records = task(tmp_path, endpoint, range(8), patience_s=0.2, concurrency=1)
    with pytest.raises(VerifierError, match="Verdicts so far are kept: the same command goes on from here"):
        gather(make_engine(), chat, records, tmp_path)
    endpoint.asked.clear()
    endpoint.say = lambda _: "right"
    engine = make_engine()
    assert all(answer.label for answer in gather(engine, chat, records, tmp_path))
    assert len(endpoint.asked) == 3
    assert len(engine.asked) < 8


def test_no_more_at_once_and_no_faster_than_allowed(
    endpoint: Endpoint, make_engine: MakeEngine, chat: ChatFormat, tmp_path: Path
) -> None:
    endpoint.delay = 0.02
    gather(make_engine(), chat, task(tmp_path, endpoint, range(12), concurrency=3), tmp_path)
    assert endpoint.most == 3
    endpoint.times.clear()
    gather(make_engine(), chat, task(tmp_path, endpoint, range(100, 104), requests_per_minute=1200), tmp_path)
    assert endpoint.times[-1] - endpoint.times[0] >= 3 * 0.05 * 0.9


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("url = ", "is not TOML"),
        ('url = "http://a/v1"', "missing ['model', 'rubric']"),
        ('url = "a"\nmodel = "m"\nrubric = "r"', "expected url"),
        ('url = "http://a"\nmodel = "m"\nrubric = "r"\nkey = "k"', "wrong or unknown ['key']"),
        (
            'url = "http://a"\nmodel = "m"\nrubric = "r"\nconcurrency = "4"',
            "wrong or unknown ['concurrency']",
        ),
        (
            'url = "http://a"\nmodel = "m"\nrubric = "r"\nconcurrency = 0',
            "concurrency and max_tokens at least 1",
        ),
    ],
)
def test_settings_that_cannot_be_used(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "judge.toml"
    path.write_text(text)
    with pytest.raises(VerifierError) as caught:
        load_verifier(f"judge({path})")
    assert says in str(caught.value)
    with pytest.raises(VerifierError, match="was not found in"):
        load_verifier("judge(none.toml)", tmp_path)


def test_another_rubric_or_model_is_another_judge() -> None:
    def key(**more: Any) -> str | None:
        return (
            JudgeModel(JudgeSettings(**({"url": "http://a", "model": "m", "rubric": "r"} | more)))
            .verifier()
            .key
        )

    assert key() == key(url="http://b", concurrency=2, patience_s=1)
    assert len({key(), key(model="n"), key(rubric="s"), key(temperature=1), key(max_tokens=2)}) == 5
