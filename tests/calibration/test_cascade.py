"""A cascade as one policy: who is asked what, once; the certificate's counts and bounds, and that they hold."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats

from candor.calibration import rule_certificate
from candor.calibration.agreement import Agreement
from candor.calibration.answering import AnsweringOptions, Inputs, answer_inputs
from candor.calibration.cache import KeptReply
from candor.calibration.cascade import Escalating, _certificate, certify_cascade, try_upstream
from candor.calibration.certificate import Claim
from candor.calibration.errors import CalibrationError
from candor.calibration.rule_certificate import certify_rule
from candor.calibration.rule_settings import RuleSettings
from candor.calibration.run import Certifying, Made, make_bundle
from candor.engine.prompt import ChatFormat
from candor.model_store.bundle import load_bundle
from candor.policy.policy import Policy
from candor.policy.upstream import Upstream
from tests.app import upstream as fakes
from tests.calibration.test_commands import ENGINE, FIT, candor, tiny_model
from tests.calibration.test_rule_certificate import fitted_rule, rows
from tests.calibration.test_run import POLICY, SETTINGS, MakeEngine, Task

DELTA = 0.1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def upstream() -> Iterator[Any]:
    with fakes.fake_upstream() as fake:
        yield fake


def number(body: dict[str, Any]) -> int:
    return int(body["messages"][-1]["content"].removeprefix("number "))


def says(of: Callable[[int], str | None]) -> fakes.Behaviour:
    """By the prompt's number; None: it refuses."""

    async def behave(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        said = of(number(body))
        behaviour = fakes.whole(None, refusal="No.") if said is None else fakes.whole(said)
        await behaviour(writer, body)

    return behave


def by_sevens(i: int) -> str | None:
    """It refuses one in seven, and is wrong of one in five others."""
    return None if i % 7 == 0 else f"{i}!" if i % 5 == 0 else str(i)


def calibrated(
    engine: Any,
    chat: ChatFormat,
    inputs: Inputs,
    folder: Path,
    upstream: Any,
    policy: Policy = POLICY,
    **how: Any,
) -> Made:
    answers = asyncio.run(
        answer_inputs(engine, chat, inputs, policy, AnsweringOptions(folder / "cache", concurrency=8))
    )
    escalating = Escalating(Upstream(upstream.url, "big"), folder / "cache", **how)
    return make_bundle(
        inputs,
        answers,
        SETTINGS,
        folder / "bundle",
        "scripted",
        Certifying(None, DELTA, 0.4),
        RuleSettings(),
        escalating,
    )


def exact(hits: int, of: int, tail: float) -> float:
    return float(stats.beta.ppf(tail, hits, of - hits + 1)) if hits else 0.0


@pytest.mark.parametrize("resample", [1, 2])
def test_counts_and_bounds_of_what_clients_get(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path, upstream: Any, resample: int
) -> None:
    upstream.behaves(says(by_sevens))
    inputs = Inputs.load(task(tmp_path / "d.jsonl", range(500)), [])
    policy = POLICY if resample == 1 else replace(POLICY, temperature=0.7, resample=2)
    made = calibrated(make_engine(), chat, inputs, tmp_path, upstream, policy)
    rule, cascade = made.outcome.rule, made.outcome.cascade
    assert rule is not None
    assert cascade is not None
    assert load_bundle(tmp_path / "bundle").manifest.cascade == cascade.terms
    assert [one.alpha for one in cascade.terms.certificates] == [0.8, 0.9]
    assert (cascade.terms.model, cascade.terms.max_tokens) == ("big", 16)
    every: set[int] = set()
    for search, one in zip(rule.searches, cascade.terms.certificates, strict=True):
        assert search.certificate is not None
        withheld = [int(id[1:]) for id in rule.withheld(search)]
        every |= set(withheld)
        assert len(set(withheld)) == len(search.prompts) - search.certificate.answered == one.escalated > 20
        said = [by_sevens(i) for i in withheld]
        assert one.answered == search.certificate.answered + sum(text is not None for text in said)
        right = sum(text == str(i) for text, i in zip(said, withheld, strict=True))
        assert one.right == search.certificate.right + right
        tail = DELTA / (search.thresholds + 1)
        assert search.thresholds >= len(search.steps)
        assert one.lower_bound == pytest.approx(exact(one.right, one.answered, tail), abs=1e-6)
        let_through = len(search.prompts) - one.escalated
        assert one.escalated_at_most == pytest.approx(
            1 - exact(let_through, len(search.prompts), tail), abs=1e-6
        )
    # Each is asked once for all alphas, as the server would ask it.
    assert sorted(number(asked.body) for asked in upstream.asked) == sorted(every)
    assert upstream.asked[0].body == {
        "model": "big",
        "messages": [{"role": "user", "content": f"number {number(upstream.asked[0].body)}"}],
        "max_tokens": 16,
        "stream": False,
    }
    report = load_bundle(tmp_path / "bundle").report["cascade"]
    assert report["asked"] == len(every)
    assert report["right"] == sum(by_sevens(i) == str(i) for i in every)
    refused = sum(by_sevens(i) is None for i in every)
    assert report["answered"] == len(every) - refused
    assert cascade.prompt_tokens == 7 * report["answered"]
    assert (cascade.terms.prompt_tokens, cascade.terms.completion_tokens) == (7, 3)
    assert "as one policy" in str(cascade)
    assert f"{7 * report['answered']} tokens read" in str(cascade)


def test_a_stopped_run_pays_for_nothing_twice(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path, upstream: Any
) -> None:
    """The upstream goes away after twenty answers."""
    inputs = Inputs.load(task(tmp_path / "d.jsonl", range(500)), [])
    upstream.behaves(*[says(by_sevens)] * 20, fakes.reply(402, b"{}"))
    with pytest.raises(CalibrationError, match=r"rejected, status 402\. Answers so far are kept"):
        calibrated(make_engine(), chat, inputs, tmp_path, upstream)
    assert not (tmp_path / "bundle").exists()
    answered = [number(asked.body) for asked in upstream.asked[:20]]
    upstream.asked.clear()
    upstream.behaves(says(by_sevens))
    made = calibrated(make_engine(), chat, inputs, tmp_path, upstream)
    asked = [number(asked.body) for asked in upstream.asked]
    assert not set(asked) & set(answered)
    assert made.outcome.cascade is not None
    assert len(asked) == len(set(asked)) == made.outcome.cascade.asked - 20
    upstream.asked.clear()
    (tmp_path / "bundle").rename(tmp_path / "before")
    again = calibrated(make_engine(), chat, inputs, tmp_path, upstream)
    assert again.outcome.cascade == made.outcome.cascade
    assert not upstream.asked


def test_what_is_busy_is_asked_again(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path, upstream: Any
) -> None:
    inputs = Inputs.load(task(tmp_path / "d.jsonl", range(300)), [])
    upstream.behaves(fakes.reply(429, b""), fakes.raw(b""), says(by_sevens))
    made = calibrated(make_engine(), chat, inputs, tmp_path, upstream)
    assert made.outcome.cascade is not None
    assert len(upstream.asked) == made.outcome.cascade.asked + 2
    upstream.behaves(fakes.reply(503, b""))
    [record, *_] = inputs.fitting.records
    patient = Escalating(Upstream(upstream.url, "big"), tmp_path / "other", patience_s=1)
    with pytest.raises(CalibrationError, match="unavailable, status 503"):
        try_upstream(record, POLICY, patient)


def test_without_a_certificate_of_the_rule_the_upstream_answers_everything(upstream: Any) -> None:
    scores = torch.linspace(0, 1, 100)
    labels = (torch.arange(100) % 2).tolist()
    search = certify_rule(
        fitted_rule(scores, torch.tensor(labels)), rows(scores.tolist(), labels), Claim(0.9, DELTA)
    )
    assert search.certificate is None
    assert len(search.withheld) == 100
    told = [(KeptReply("x", 1, 1), i > 9) for i in range(100)]
    one = _certificate(search, told, DELTA, None)
    assert one is not None
    assert (one.escalated, one.answered, one.right, one.escalated_at_most) == (100, 100, 90, 1.0)
    assert one.lower_bound == pytest.approx(exact(90, 100, DELTA / (search.thresholds + 1)), abs=1e-6)
    assert _certificate(search, [(KeptReply(None, None, None), None)] * 100, DELTA, None) is None


def test_by_peoples_labels_the_verifiers_errors_are_taken_off() -> None:
    scores = torch.linspace(0, 1, 200)
    labels = [1] * 200
    search = certify_rule(
        fitted_rule(scores, torch.tensor(labels)), rows(scores.tolist(), labels), Claim(0.9, DELTA)
    )
    told = [(KeptReply("x", 1, 1), True) for _ in search.withheld]
    agreement = Agreement("judge", 100, 3, 100, 0, 0)
    one = _certificate(search, told, DELTA, agreement)
    assert one is not None
    error = 1 - exact(97, 100, DELTA / 2)
    right = exact(one.right, one.answered, DELTA / 2 / (search.thresholds + 1))
    assert one.lower_bound == pytest.approx((1 - error) * right, abs=1e-6)


def test_the_bounds_hold_though_the_same_records_chose_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are uniform, the rule is right with probability 0.7 + 0.3 s at score s, the upstream with 0.85: so the
    truth at each threshold is known. Of 300 certificates at most a tenth may be false, each kind by itself."""
    monkeypatch.setattr(rule_certificate, "outlook", lambda *_: ())  # it takes time, and changes nothing
    draw = torch.Generator().manual_seed(0)

    def drawn(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.rand(n, generator=draw)
        return scores, (torch.rand(n, generator=draw) < 0.7 + 0.3 * scores).long()

    false_accuracy = false_share = issued = 0
    for _ in range(300):
        fitted = fitted_rule(*drawn(200))
        scores, y = drawn(200)
        search = certify_rule(fitted, rows(scores.tolist(), y.tolist()), Claim(0.88, DELTA))
        right = torch.rand(len(search.withheld), generator=draw) < 0.85
        one = _certificate(search, [(KeptReply("x", 1, 1), bool(it)) for it in right], DELTA, None)
        assert one is not None
        threshold = search.certificate.score_min if search.certificate else 1.0
        issued += search.certificate is not None
        truth = 0.85 * threshold + 0.7 * (1 - threshold) + 0.15 * (1 - threshold**2)
        false_accuracy += one.lower_bound > truth
        false_share += one.escalated_at_most < threshold
    assert issued > 150
    most = stats.binom.ppf(0.999, 300, DELTA)
    assert false_accuracy <= most
    assert false_share <= most


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {
        "prompt": f"number {i}",
        "response": ("." if i % 3 else "!") * 6,
        "reference": "......",
        "verifier": "exact",
    }
    for i in range(200)
]


def test_killed_while_it_is_asked_the_same_command_goes_on(
    model: Path,
    tmp_path: Path,
    upstream: Any,
) -> None:
    """The whole command, with a tiny model whose answers are given; some thirty are withheld and go upstream."""

    async def slowly(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        await asyncio.sleep(0.1)
        await fakes.whole("......" if number(body) % 4 else "!")(writer, body)

    upstream.behaves(slowly)
    key = tmp_path / "key"
    key.write_text("sk-1")
    arguments = [
        "calibrate", "--model", model, "--data", lines(tmp_path / "d.jsonl", ROWS), "--out", tmp_path / "bundle",
        *FIT, *ENGINE, "--max-tokens", 8, "--dtype", "float32", "--json",
        "--escalate-to", upstream.url, "--escalate-model", "big", "--escalate-key-file", key,
    ]  # fmt: skip
    script = [sys.executable, "-c", "from candor.app.cli import main; main()", *map(str, arguments)]
    process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(upstream.asked) < 10:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = len(upstream.asked)
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["report"]["cascade"]
    # The first record is asked about before the engine starts; it need not be one that is withheld.
    assert report["asked"] <= len(upstream.asked) <= report["asked"] + 1 + 8
    assert len(upstream.asked) > before
    assert {asked.headers["authorization"] for asked in upstream.asked} == {"Bearer sk-1"}
    assert load_bundle(tmp_path / "bundle").manifest.cascade.model == "big"  # type: ignore[union-attr]
    assert upstream.url not in json.dumps(report)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--escalate-to", "http://127.0.0.1:9/v1"), "go together"),
        (("--escalate-model", "big"), "go together"),
        (("--escalate-to", "nowhere", "--escalate-model", "big"), "http"),
        (
            ("--escalate-to", "http://127.0.0.1:9/v1", "--escalate-model", "big", "--rule", "sdm"),
            "sdm has none",
        ),
        (
            (
                "--escalate-to",
                "http://127.0.0.1:9/v1",
                "--escalate-model",
                "b",
                "--escalate-key-file",
                "none",
            ),
            "No such file",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_read(tmp_path: Path, more: tuple[str, ...], says: str) -> None:
    told = candor(
        "calibrate", "--model", "m", "--data", "d", "--out", tmp_path / "b", "--alpha", "0.9", *more
    )
    assert told.exit_code == 2
    assert says in " ".join(told.stderr.replace("│", " ").split())


def test_given_labels_are_refused_before_the_engine_starts(
    model: Path,
    tmp_path: Path,
    upstream: Any,
) -> None:
    rows = [
        {"prompt": f"number {i}", "response": "." * (1 + i % 3), "label": int(i % 3 > 0)} for i in range(200)
    ]
    told = candor(
        "calibrate", "--model", model, "--data", lines(tmp_path / "d.jsonl", rows), "--out", tmp_path / "b",
        *FIT, *ENGINE, "--max-tokens", 8, "--escalate-to", upstream.url, "--escalate-model", "big",
    )  # fmt: skip
    assert told.exit_code == 1
    assert "another model's answer" in told.stderr or "give a reference and a verifier" in told.stderr
    assert not upstream.asked


def test_records_of_one_prompt_are_asked_about_once(upstream: Any, tmp_path: Path) -> None:
    """A rule that was certified on its first record alone."""
    upstream.behaves(says(by_sevens))
    records = {record.id: record for record in Inputs.load(lines(tmp_path / "d.jsonl", [
        {"id": "a", "prompt": "number 1", "reference": "1", "verifier": "exact"},
        {"id": "b", "prompt": "number 1", "reference": "1", "verifier": "exact"},
    ]), []).fitting.records}  # fmt: skip
    search = certify_rule(
        fitted_rule(torch.tensor([0.1, 0.9]), torch.tensor([0, 1])),
        rows([0.1, 0.1], [0, 0], digests=["same", "same"]),
        Claim(0.9, DELTA),
    )
    rule = SimpleNamespace(
        searches=(search,), withheld=lambda one: [("a", "b")[index] for index in one.withheld]
    )
    how = Escalating(Upstream(upstream.url, "big"), tmp_path / "cache")
    cascade = certify_cascade(rule, records, POLICY, how, DELTA)  # type: ignore[arg-type]
    assert (cascade.asked, cascade.right, len(upstream.asked)) == (1, 1, 1)
