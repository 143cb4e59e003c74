"""Collecting answers: labels, faults, order, limits, and a cache that outlives a killed process."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from candor.calibration.cache import AnswerCache, CachedAnswer, cache_key
from candor.calibration.data import Record, load_records
from candor.calibration.errors import CacheError, CalibrationError, DataError
from candor.calibration.generate import Labelled, collect, count_faults, scorable
from candor.engine.base import AdapterIdentity, EngineDead, HiddenSummary, PromptTooLong, Representation
from candor.engine.prompt import ChatFormat
from candor.policy.conversation import Conversations, SystemPrompt
from candor.policy.policy import Policy

GREEDY = Policy(temperature=0.0, top_p=1.0, top_k=0, max_tokens=16)
SAMPLED = replace(GREEDY, temperature=0.7)

MakeEngine = Callable[..., Any]
Task = Callable[[Path, Sequence[int]], Path]


def gather(
    engine: Any,
    chat: ChatFormat,
    records: Sequence[Record],
    folder: Path,
    policy: Policy = GREEDY,
    representation: Representation | None = None,
    concurrency: int = 4,
    progress: Callable[[int], object] = lambda _: None,
    seed: int = 0,
    prompt_states: bool = True,
) -> list[Labelled]:
    with AnswerCache(folder) as cache:
        return asyncio.run(
            collect(
                engine,
                chat,
                records,
                policy,
                representation or engine.representation,
                cache,
                concurrency,
                progress,
                seed,
                prompt_states=prompt_states,
            )
        )


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def test_answers_come_in_order_labelled_with_their_states(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, hard: Callable[[int], float], tmp_path: Path
) -> None:
    engine = make_engine()
    done: list[int] = []
    records = load_records(task(tmp_path / "d.jsonl", range(30)))
    answers = gather(engine, chat, records, tmp_path, progress=done.append)
    assert [answer.id for answer in answers] == [f"r{i}" for i in range(30)]
    assert [answer.label for answer in answers] == [int(hard(i) <= 0.7) for i in range(30)]
    assert [answer.prompt for answer in answers] == [f"number {i}" for i in range(30)]
    assert sum(done) == 30
    u = torch.tensor([hard(i) for i in range(30)])
    h = torch.stack([answer.h for answer in answers])
    assert h.shape == (30, 8)
    assert h[:, 0].equal(u)
    assert h.dtype == torch.float32


def test_the_order_of_the_blocks_is_the_representations(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, hard: Callable[[int], float], tmp_path: Path
) -> None:
    records = load_records(task(tmp_path / "d.jsonl", [5]))
    (answer,) = gather(
        make_engine(), chat, records, tmp_path, representation=Representation(order=("last", "mean"))
    )
    assert float(answer.h[4]) == pytest.approx(hard(5))


def test_no_more_than_the_allowed_number_in_flight(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    engine = make_engine(delay=0.01)
    gather(engine, chat, load_records(task(tmp_path / "d.jsonl", range(20))), tmp_path, concurrency=3)
    assert engine.most_running == 3


def test_given_answers_are_summarised_not_generated(
    make_engine: MakeEngine, chat: ChatFormat, tmp_path: Path
) -> None:
    engine = make_engine()
    record = Record("g", user("number 7"), line=1, response="eight", label=0)
    (answer,) = gather(engine, chat, [record], tmp_path)
    assert engine.asked == [("<user>number 7<assistant>eight", None)]
    assert (answer.response, answer.label, answer.fault) == ("eight", 0, None)


def test_the_policy_reaches_the_engine(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    engine = make_engine()
    policy = Policy(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        max_tokens=12,
        conversations=Conversations(SystemPrompt.fixed("Count.")),
    )
    own_system = Record(
        "s",
        ({"role": "system", "content": "Own."}, *user("number 3")),
        line=3,
        reference="3",
        verifier="exact",
    )
    records = [*load_records(task(tmp_path / "d.jsonl", [1, 2])), own_system]
    gather(engine, chat, records, tmp_path, policy=policy, concurrency=1)
    prompts = [prompt for prompt, _ in engine.asked]
    assert prompts == [
        "<system>Count.<user>number 1<assistant>",
        "<system>Count.<user>number 2<assistant>",
        "<system>Own.<user>number 3<assistant>",
    ]
    samplings = [sampling for _, sampling in engine.asked]
    assert {(s.temperature, s.top_p, s.top_k, s.max_tokens) for s in samplings} == {(0.7, 0.9, 5, 12)}
    assert len({s.seed for s in samplings}) == 3


def test_greedy_takes_no_seed_and_sampling_repeats_with_its_own(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    records = load_records(task(tmp_path / "d.jsonl", [1]))
    seeds = []
    for name, policy, seed in [("a", GREEDY, 0), ("b", SAMPLED, 0), ("c", SAMPLED, 0), ("d", SAMPLED, 1)]:
        engine = make_engine()
        gather(engine, chat, records, tmp_path / name, policy=policy, seed=seed)
        seeds.append(engine.asked[0][1].seed)
    assert seeds[0] is None
    assert seeds[1] == seeds[2] != seeds[3]


def test_what_cannot_be_scored_keeps_its_reason(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    engine = make_engine()
    states = torch.ones(4)
    broken = torch.tensor([1.0, torch.inf, 0.0, 0.0])
    engine.overrides = {
        1: {"truncated": True, "finish_reason": "length"},
        2: {"hidden": None},
        3: {"hidden": HiddenSummary(states, states, torch.empty(0), 9, complete=False)},
        4: {"hidden": HiddenSummary(states, broken, torch.empty(0), 10, complete=True)},
        5: {"truncated": True, "hidden": None},
    }
    answers = gather(engine, chat, load_records(task(tmp_path / "d.jsonl", range(7))), tmp_path)
    expected = [None, "truncated", "incomplete", "incomplete", "non_finite", "truncated", None]
    assert [answer.fault for answer in answers] == expected
    assert count_faults(answers) == {"truncated": 2, "incomplete": 2, "non_finite": 1}
    assert [answer.id for answer in scorable(answers)] == ["r0", "r6"]


def test_lost_states_are_tried_again_and_everything_else_is_not(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    engine = make_engine()
    engine.overrides = {1: {"hidden": None}, 2: {"truncated": True}}
    records = load_records(task(tmp_path / "d.jsonl", range(5)))
    gather(engine, chat, records, tmp_path)
    again = make_engine()
    answers = gather(again, chat, records, tmp_path)
    assert [prompt for prompt, _ in again.asked] == ["<user>number 1<assistant>"]
    assert [answer.fault for answer in answers] == [None, None, "truncated", None, None]


@pytest.mark.parametrize(
    "change", ["weights", "template", "adapter", "policy", "representation", "prompt", "seed"]
)
def test_a_cached_answer_is_void_once_what_it_depends_on_changes(
    make_engine: MakeEngine, chat: ChatFormat, tmp_path: Path, change: str
) -> None:
    record = Record("x", user("number 1"), line=1, reference="1", verifier="exact")
    gather(make_engine(), chat, [record], tmp_path, policy=SAMPLED)
    engine, policy, representation, seed = make_engine(), SAMPLED, Representation(), 0
    if change == "weights":
        engine.identity = replace(engine.identity, weights_sha256="other")
    if change == "template":
        engine.identity = replace(engine.identity, chat_template_sha256="other")
    if change == "adapter":
        engine.adapter = AdapterIdentity("laid over", "a" * 64)
    if change == "policy":
        policy = replace(SAMPLED, max_tokens=15)
    if change == "representation":
        representation = Representation(tag="<checked>")
    if change == "prompt":
        record = replace(record, messages=user("number  1"))
    if change == "seed":
        seed = 1
    gather(engine, chat, [record], tmp_path, policy=policy, representation=representation, seed=seed)
    assert len(engine.asked) == 1


def test_a_cached_answer_outlives_another_verifier_and_another_name_of_the_model(
    make_engine: MakeEngine, chat: ChatFormat, tmp_path: Path
) -> None:
    record = Record("x", user("number 1"), line=1, reference="1", verifier="exact")
    gather(make_engine(), chat, [record], tmp_path)
    engine = make_engine()
    engine.identity = replace(engine.identity, name="renamed")
    (answer,) = gather(engine, chat, [replace(record, reference="no", verifier="regex", line=9)], tmp_path)
    assert engine.asked == []
    assert answer.label == 0


def test_a_prompt_that_does_not_fit_is_found_before_any_answer(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    engine = make_engine()
    records = load_records(task(tmp_path / "d.jsonl", [1]))
    turns = (*user("number 2"), {"role": "assistant", "content": "2"}, *user("number 3"))
    long = Record("long", user("x" * 180), line=2, reference="", verifier="exact")
    refused = Record("turns", turns, line=3, reference="", verifier="exact")
    with pytest.raises(DataError) as caught:
        gather(engine, chat, [*records, long, refused], tmp_path)
    assert "2 problems" in str(caught.value)
    assert 'line 2 (id "long"): 197 prompt tokens and 16 for the answer exceed the model\'s 200' in str(
        caught.value
    )
    assert 'line 3 (id "turns")' in str(caught.value)
    assert "knows no earlier answers" in str(caught.value)
    assert engine.asked == []


def test_a_prompt_that_the_engine_itself_refuses_names_its_line(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    engine = make_engine()
    engine.overrides = {1: {"raises": PromptTooLong("too long by 3")}}
    with pytest.raises(DataError, match=r'line 2 \(id "r1"\): too long by 3'):
        gather(engine, chat, load_records(task(tmp_path / "d.jsonl", range(4))), tmp_path)


def test_a_dead_engine_ends_the_run_and_keeps_what_was_finished(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    engine = make_engine()
    engine.overrides = {6: {"raises": EngineDead("gone")}}
    records = load_records(task(tmp_path / "d.jsonl", range(10)))
    with pytest.raises(EngineDead, match="gone"):
        gather(engine, chat, records, tmp_path, concurrency=1)
    again = make_engine()
    gather(again, chat, records, tmp_path)
    assert len(again.asked) == 4


def test_an_engine_that_ends_without_an_answer(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    class Silent:
        async def nothing(self, *_: Any, **__: Any) -> Any:
            return
            yield

    engine = make_engine()
    engine.generate = Silent().nothing
    with pytest.raises(CalibrationError, match='without an answer for "r0"'):
        gather(engine, chat, load_records(task(tmp_path / "d.jsonl", [0])), tmp_path)


def test_one_answer_with_two_labels_is_refused(
    make_engine: MakeEngine, chat: ChatFormat, tmp_path: Path
) -> None:
    right = Record("a", user("number 1"), line=4, reference="1", verifier="exact")
    wrong = Record("b", user("number 1"), line=9, reference="2", verifier="exact")
    with pytest.raises(DataError, match="lines 4 and 9: same prompt, same answer, but labels"):
        gather(make_engine(), chat, [right, wrong], tmp_path)


def test_a_killed_run_goes_on_where_it_was(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    path, log, cache = task(tmp_path / "d.jsonl", range(200)), tmp_path / "log", tmp_path / "cache"
    program = f"""
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import ScriptedEngine, scripted_chat
from candor.calibration.cache import AnswerCache
from candor.calibration.data import load_records
from candor.calibration.generate import collect
from candor.engine.base import Representation
from candor.policy.policy import Policy
asyncio.run(collect(
    ScriptedEngine(delay=0.02, log=Path({str(log)!r})), scripted_chat(), load_records(Path({str(path)!r})),
    Policy(max_tokens=16), Representation(), AnswerCache(Path({str(cache)!r})), 2, lambda _: None,
))
"""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not log.exists() or len(log.read_text().split()) < 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = set(log.read_text().split())
    assert 20 <= len(finished) < 200

    engine = make_engine()
    records = load_records(path)
    resumed = gather(engine, chat, records, cache)
    asked_again = {prompt.split()[1].removesuffix("<assistant>") for prompt, _ in engine.asked}
    # The engine logs an answer just before it is committed: at most the two in flight may be asked again.
    assert len(finished & asked_again) <= 2
    assert len(asked_again) <= 200 - len(finished) + 2

    whole = gather(make_engine(), chat, records, tmp_path / "other")
    for mine, reference in zip(resumed, whole, strict=True):
        nothing = {"h": None, "prompt_states": None}
        assert vars(mine) | nothing == vars(reference) | nothing
        assert mine.h.equal(reference.h)
        assert mine.prompt_states.equal(reference.prompt_states)


def test_the_cache_gives_back_every_bit(tmp_path: Path) -> None:
    h = torch.tensor([0.1, -0.0, torch.inf, torch.nan, 1e-45])
    with AnswerCache(tmp_path / "new" / "folder") as cache:
        cache.put("k", CachedAnswer("tëxt\n\0", True, h))
    with AnswerCache(tmp_path / "new" / "folder") as cache:
        found = cache.get("k")
        assert found is not None
        assert cache.get("other") is None
    assert (found.response, found.truncated) == ("tëxt\n\0", True)
    assert found.h.view(torch.int32).equal(h.view(torch.int32))


def test_a_file_that_is_no_cache_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 50)
    with pytest.raises(CacheError, match="delete the file to start anew"):
        AnswerCache(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="--hidden-cache"):
        AnswerCache(tmp_path / "file")


def test_keys_digest_every_part_and_ignore_the_order_of_keys() -> None:
    assert cache_key(a=1, b={"x": 1, "y": 2}) == cache_key(b={"y": 2, "x": 1}, a=1)
    assert len({cache_key(a=1), cache_key(a="1"), cache_key(b=1), cache_key(a=[1])}) == 4


def test_a_policy_that_resamples_makes_every_attempt_with_a_seed_of_its_own(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    records = load_records(task(tmp_path / "d.jsonl", [1, 2]))
    single, engine = make_engine(), make_engine()
    (alone, _) = gather(single, chat, records, tmp_path / "one", policy=SAMPLED)
    done: list[int] = []
    answers = gather(
        engine, chat, records, tmp_path / "three", policy=replace(SAMPLED, resample=3), progress=done.append
    )
    assert [len(answer.attempts) for answer in answers] == [3, 3]
    assert all(one.id == answer.id for answer in answers for one in answer.attempts)
    assert sum(done) == len(engine.asked) == 6
    seeds = {sampling.seed for _, sampling in engine.asked}
    assert len(seeds) == 6
    assert single.asked[0][1].seed in seeds  # the first attempt is the answer of the policy without more
    assert alone.tokens == len(alone.response) > 0
    again = make_engine()
    gather(again, chat, records, tmp_path / "three", policy=replace(SAMPLED, resample=3))
    assert again.asked == []


def test_given_responses_cannot_be_resampled(
    make_engine: MakeEngine, chat: ChatFormat, tmp_path: Path
) -> None:
    record = Record("g", user("number 7"), line=4, response="7", label=1)
    engine = make_engine()
    with pytest.raises(
        DataError, match=r'line 4 \(id "g"\): its response is given, but this policy resamples'
    ):
        gather(engine, chat, [record], tmp_path, policy=replace(SAMPLED, resample=2))
    assert engine.asked == []


def test_prompts_are_not_read_where_no_gate_asks_for_them(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    """The papers' region needs none; answers kept without them get them once gates do."""
    records = load_records(task(tmp_path / "d.jsonl", range(5)))
    for prompt_states, asked, read in ((False, 5, 0), (False, 0, 0), (True, 0, 5)):
        engine = make_engine()
        found = gather(engine, chat, records, tmp_path / "cache", prompt_states=prompt_states)
        assert (len(engine.asked), engine.read) == (asked, read)
        assert all(bool(one.prompt_states.numel()) is prompt_states for one in found)


def test_two_runs_may_open_an_old_cache_at_once(tmp_path: Path) -> None:
    """The second finds the column missing until the first has added it."""
    with AnswerCache(tmp_path) as cache:
        cache.put("k", CachedAnswer("text", False, torch.ones(2)))
    first = sqlite3.connect(tmp_path / "answers.sqlite", isolation_level=None)
    first.execute("ALTER TABLE answers DROP COLUMN prompt")
    first.execute("BEGIN IMMEDIATE")
    first.execute("ALTER TABLE answers ADD COLUMN prompt BLOB NOT NULL DEFAULT x''")
    with ThreadPoolExecutor(1) as pool:

        def second() -> CachedAnswer | None:
            with AnswerCache(tmp_path) as cache:
                return cache.get("k")

        opened = pool.submit(second)
        time.sleep(0.5)
        first.execute("COMMIT")
        found = opened.result()
    first.close()
    assert found is not None
    assert found.response == "text"


def test_answers_kept_before_prompt_states_were_get_them_without_being_written_again(
    make_engine: MakeEngine, chat: ChatFormat, task: Task, tmp_path: Path
) -> None:
    records = load_records(task(tmp_path / "d.jsonl", range(5)))
    first = gather(make_engine(), chat, records, tmp_path / "cache")
    database = sqlite3.connect(tmp_path / "cache" / "answers.sqlite")
    database.execute("ALTER TABLE answers DROP COLUMN prompt")
    database.commit()
    database.close()
    for read in (5, 0):  # filled once, then kept
        engine = make_engine()
        again = gather(engine, chat, records, tmp_path / "cache")
        assert (engine.asked, engine.read) == ([], read)
        for mine, before in zip(again, first, strict=True):
            assert mine.prompt_states.equal(before.prompt_states)
            assert mine.h.equal(before.h)
