"""The simulated fleet, where its figures can be reckoned by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("simpy")

from benchmarks.fleet import Times, Traffic, service_times, shared_parts, simulate

TIMES = Times(
    prefill=0.001,
    step=0.02,
    each=0.005,
    ingress=1e-6,
    tree=1e-6,
    row=1e-4,
    exchange=1e-3,
    beat=1e-3,
    page=0.01,
    series=1000,
)
TRAFFIC = Traffic(own=50, answers=(24,))


def run(replicas: int, clients: int, traffic: Traffic = TRAFFIC, *, prefix: bool = False) -> dict[str, float]:
    return simulate(TIMES, traffic, replicas, clients, prefix=prefix, ingresses=4, seconds=200)


def test_one_client_waits_for_prefill_and_its_steps() -> None:
    wait = 50 * TIMES.prefill + 24 * (TIMES.step + TIMES.each)
    found = run(1, 1)
    assert found["p50_s"] == pytest.approx(wait, rel=0.01)
    assert found["answers_per_s"] == pytest.approx(1 / wait, rel=0.02)


def test_answers_of_several_lengths_make_a_tail() -> None:
    found = run(1, 1, replace(TRAFFIC, answers=(4, 44)))
    waits = [50 * TIMES.prefill + tokens * (TIMES.step + TIMES.each) for tokens in (4, 44)]
    assert found["p95_s"] == pytest.approx(waits[1], rel=0.01)
    assert found["answers_per_s"] == pytest.approx(2 / sum(waits), rel=0.1)


def test_many_clients_share_the_steps() -> None:
    """n at once: each answer costs its prefill and its own part of every step, and an nth of the rest."""
    found = run(1, 16)
    cost = 50 * TIMES.prefill + 24 * (TIMES.step / 16 + TIMES.each)
    assert found["answers_per_s"] == pytest.approx(1 / cost, rel=0.1)


def test_replicas_that_share_nothing_scale() -> None:
    one, ten = run(1, 16), run(10, 160)
    assert ten["answers_per_s"] == pytest.approx(10 * one["answers_per_s"], rel=0.05)


def test_an_ingress_that_is_too_slow_is_the_bound() -> None:
    slow = replace(TIMES, ingress=0.1)
    found = simulate(slow, TRAFFIC, 10, 160, prefix=False, ingresses=1, seconds=200)
    assert found["answers_per_s"] == pytest.approx(10, rel=0.05)


def test_strangers_cost_their_prefill_alone() -> None:
    found = run(1, 16, replace(TRAFFIC, strangers=1.0))
    assert found["answers_per_s"] == 0
    assert found["requests_per_s"] == pytest.approx(1 / (50 * TIMES.prefill), rel=0.05)


def test_prefixes_are_found_where_they_were_sent_before() -> None:
    shared = replace(TRAFFIC, shared=400, groups=100, cached=20)
    blind, aware = run(10, 160, shared), run(10, 160, shared, prefix=True)
    assert blind["hits"] == pytest.approx(0.2, abs=0.05)  # 20 of 100 lie in each cache
    assert aware["hits"] > 3 * blind["hits"]  # not 1: a home that is much busier than another gives way
    assert aware["answers_per_s"] > 1.5 * blind["answers_per_s"]


def test_what_is_shared_grows_with_requests_and_with_replicas() -> None:
    needed = shared_parts(TIMES, 100.0, 10)
    assert needed["cores_of_the_store"] == pytest.approx(100 * 1e-4 + 10 * (4 * 1e-3 + 1e-3))
    assert needed["reviewers"] == pytest.approx(100 * 0.05 * 3600 / 180)


def test_times_come_back_from_the_rates_that_they_give() -> None:
    own, answer = 50, 24
    rates = {
        str(n): n / (own * TIMES.prefill * n + answer * (TIMES.step + TIMES.each * n))
        for n in (1, 2, 4, 8, 16)
    }
    found = {
        "answers_per_s": rates,
        "prefill_s_per_token": TIMES.prefill,
        "prompt_tokens": own,
        "answer_tokens": [answer],
    }
    assert service_times(found) == pytest.approx((TIMES.prefill, TIMES.step, TIMES.each))
