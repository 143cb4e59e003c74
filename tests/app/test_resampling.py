"""A bundle whose policy resamples: attempts until one is reliable, told once, paid for all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from candor.policy.certificate import Certificate
from candor.policy.conversation import Conversations, SystemPrompt
from candor.policy.policy import Policy

POLICY = Policy(
    temperature=0.7,
    top_p=1.0,
    top_k=0,
    max_tokens=16,
    resample=3,
    conversations=Conversations(SystemPrompt.fixed("Be brief.")),
)


class InTurn(dict[str, Any]):
    """Scripts that follow each other: the n-th request is given the n-th, the last one stays."""

    def __init__(self, engine: Any, *states: str) -> None:
        engine.script("ask")
        base = engine.scripts["ask"]
        self._scripts = [replace(base, state=state, pieces=(state, "!")) for state in states]
        self._engine = engine

    def items(self) -> Any:
        number = min(len(self._engine.asked), len(self._scripts) - 1)
        return [("ask", self._scripts[number])]


def play(engine: Any, *states: str) -> None:
    engine.scripts = InTurn(engine, *states)
    engine.asked.clear()


def told(response: Any) -> tuple[str | None, Any, Any]:
    body = response.json()
    return body["choices"][0]["message"]["content"], body["reliability"]["results"][0], body["usage"]


@pytest.mark.parametrize(
    ("states", "served", "attempts", "region"),
    [
        (["follows", "far"], "follows!", 1, "high"),
        (["thin", "follows"], "follows!", 2, "high"),
        (["not_following", "missing", "follows"], "follows!", 3, "high"),
        (["thin", "far", "edge", "follows"], "edge!", 3, "low"),
    ],
)
def test_the_first_reliable_attempt_or_the_last_is_served(
    serve: Any, engine: Any, states: list[str], served: str, attempts: int, region: str
) -> None:
    with serve(policy=POLICY) as server:
        play(engine, *states)
        text, one, usage = told(server.chat("ask"))
        assert (text, one["attempts"], one["region"], one["calibrated"]) == (served, attempts, region, True)
        assert len(engine.asked) == attempts
        assert usage["completion_tokens"] == 3 * attempts
        metrics = server.client.get("/metrics").text
        assert sum(
            float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith("sdm_answers_total")
        ) == 1  # fmt: skip


def test_nothing_of_a_discarded_attempt_is_streamed(serve: Any, engine: Any) -> None:
    with serve(policy=POLICY) as server:
        play(engine, "thin", "follows")
        chunks = server.chunks("ask", reliability={"stream": "optimistic"})
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        assert text == "follows!"
        assert chunks[-1]["reliability"]["results"][0]["attempts"] == 2


def test_outside_the_policy_and_in_mode_off_the_first_answer_is_it(serve: Any, engine: Any) -> None:
    with serve(policy=POLICY) as server:
        play(engine, "thin", "follows")
        text, one, _ = told(server.chat("ask", temperature=0.2))
        assert (text, one["attempts"], one["calibrated"]) == ("thin!", 1, False)
        play(engine, "thin", "follows")
        body = server.chat("ask", reliability={"mode": "off"}).json()
        assert body["choices"][0]["message"]["content"] == "thin!"
        assert len(engine.asked) == 1


def test_attempts_of_a_seeded_request_differ_and_repeat(serve: Any, engine: Any) -> None:
    with serve(policy=POLICY) as server:
        seeds = []
        for _ in range(2):
            play(engine, "thin")
            server.chat("ask", seed=2**63 - 1, n=2)
            seeds.append([sampling.seed for _, sampling, _ in engine.asked])
        assert sorted(seeds[0]) == sorted(seeds[1])
        assert len(set(seeds[0])) == 6
        assert all(-(2**63) <= seed < 2**63 for seed in seeds[0])


def test_each_choice_has_its_own_attempts(serve: Any, engine: Any) -> None:
    with serve(policy=POLICY) as server:
        play(engine, "follows")
        results = server.chat("ask", n=2).json()["reliability"]["results"]
        assert [one["attempts"] for one in results] == [1, 1]


def test_an_answer_in_the_region_ends_it_also_where_no_certificate_covers_it(serve: Any, engine: Any) -> None:
    """The policy that was certified stops at the region; stopping later would be another policy."""
    strict = Certificate(0.9, "lower", 0.95, 0.95, 500.0, 400, 120, 119, 0.961)
    with serve(policy=POLICY, certificates=[strict], certified_only=True) as server:
        play(engine, "follows")
        _, one, _ = told(server.chat("ask"))
        assert (one["attempts"], one["reason"]) == (1, "not_certified")


def test_a_long_answer_is_no_reliable_one_and_is_tried_again(serve: Any, engine: Any) -> None:
    with serve(policy=POLICY) as server:
        play(engine, "follows", "follows")
        scripts = engine.scripts._scripts
        scripts[0] = replace(scripts[0], finish="length")
        _, one, _ = told(server.chat("ask"))
        assert (one["attempts"], one["region"], one["calibrated"]) == (2, "high", True)
