"""Shares and places: what is too fast waits, what is too much is refused, what takes too long frees its place."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import HTTPException
from hypothesis import given
from hypothesis import strategies as st

from candor.app.answering.preparing import Preparing
from candor.app.edge.keys import make_key
from candor.app.edge.limits import Admission, Overloaded, RateLimit, Refused, TooFast
from candor.app.edge.middleware import BodyLimit


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class TestRate:
    def test_a_minutes_worth_at_once_then_at_the_rate(self) -> None:
        clock = Clock()
        rate = RateLimit(6, "requests", clock)
        for _ in range(6):
            rate.take("alice")
        with pytest.raises(TooFast, match="6 requests a minute") as refused:
            rate.take("alice")
        assert refused.value.retry_after_s == 10  # 60 / 6
        clock.now += 9.9
        with pytest.raises(TooFast) as refused:
            rate.take("alice")
        assert refused.value.retry_after_s == 1
        clock.now += 0.1
        rate.take("alice")
        with pytest.raises(TooFast):
            rate.take("alice")

    def test_callers_do_not_share(self) -> None:
        rate = RateLimit(1, "requests", Clock())
        rate.take("alice")
        rate.take("bob")
        with pytest.raises(TooFast):
            rate.take("alice")

    def test_more_than_a_minutes_worth_is_a_debt(self) -> None:
        clock = Clock()
        rate = RateLimit(60, "tokens", clock)
        rate.take("alice", 100)  # 40 in debt
        with pytest.raises(TooFast) as refused:
            rate.take("alice", 5)
        assert refused.value.retry_after_s == 41  # to -40 + 41 = 1
        clock.now += 41
        rate.take("alice", 5)

    def test_idle_time_saves_up_no_more_than_a_minute(self) -> None:
        clock = Clock()
        rate = RateLimit(2, "requests", clock)
        clock.now += 10_000
        rate.take("alice")
        rate.take("alice")
        with pytest.raises(TooFast):
            rate.take("alice")

    def test_no_limit(self) -> None:
        rate = RateLimit(None, "requests", Clock())
        for _ in range(1000):
            rate.take("alice", 10**9)


class TestAdmission:
    def test_places_and_tokens_come_back(self) -> None:
        admission = Admission(3, 100)
        with admission.admit("alice", 2, 60):
            assert (admission.in_flight, admission.tokens) == (2, 60)
            for choices, tokens in ((2, 1), (1, 41)):
                with pytest.raises(Overloaded), admission.admit("alice", choices, tokens):
                    pass
            with admission.admit("bob", 1, 40):
                assert (admission.in_flight, admission.tokens) == (3, 100)
        assert (admission.in_flight, admission.tokens) == (0, 0)

    def test_what_never_fits_is_not_told_to_come_back(self) -> None:
        with pytest.raises(Refused, match="at most 100"), Admission(3, 100).admit("alice", 1, 101):
            pass


class TestShares:
    """Half of the places is shared out by weight and kept; the other half is for whoever comes first."""

    def test_one_key_cannot_take_what_is_kept_for_another(self) -> None:
        admission = Admission(16, 1600, lambda: {"alice": 1.0, "bob": 1.0})
        with ExitStack() as places:
            for _ in range(12):  # 4 of her own, 8 for whoever comes first
                places.enter_context(admission.admit("alice", 1, 1))
            with pytest.raises(TooFast, match="kept for others"):
                admission.check("alice", 1, 1)
            for _ in range(4):
                places.enter_context(admission.admit("bob", 1, 1))
            with pytest.raises(Overloaded) as full:
                admission.check("bob", 1, 1)
            assert not isinstance(full.value, TooFast)
        admission.check("alice", 12, 1)

    def test_by_weight(self) -> None:
        admission = Admission(16, 1600, lambda: {"alice": 1.0, "bob": 3.0})
        with admission.admit("bob", 14, 14):  # 6 of his own and all 8
            with pytest.raises(TooFast):
                admission.check("bob", 1, 1)
            admission.check("alice", 2, 2)

    def test_tokens_are_shared_too(self) -> None:
        admission = Admission(1600, 16, lambda: {"alice": 1.0, "bob": 1.0})
        with admission.admit("alice", 1, 12):
            with pytest.raises(TooFast, match="12 tokens"):
                admission.check("alice", 1, 1)
            admission.check("bob", 1, 4)

    def test_who_is_alone_gets_everything(self) -> None:
        for weights in ({}, {"alice": 1.0}):
            Admission(16, 16, lambda weights=weights: weights).check("alice", 16, 16)

    @given(
        weights=st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0]), min_size=2),
        asked=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 8)), max_size=60),
    )
    def test_whatever_others_hold_a_keys_share_is_there(
        self, weights: dict[str, float], asked: list[tuple[str, int]]
    ) -> None:
        """The law: a key that holds less than its share gets the rest of it, in any state that can be reached."""
        most = 64
        admission = Admission(most, 10**6, lambda: weights)
        held: Counter[str] = Counter()
        with ExitStack() as places:
            for name, choices in asked:
                if name in weights:
                    with suppress(Overloaded):
                        places.enter_context(admission.admit(name, choices, 1))
                        held[name] += choices
            for name, weight in weights.items():
                rest = int(most / 2 * weight / sum(weights.values())) - held[name]
                if rest > 0:
                    admission.check(name, rest, 1)


def test_a_key_that_takes_all_leaves_another_its_share(serve: Any, tmp_path: Path, wait_until: Any) -> None:
    """S5: sixteen requests of sixteen answers by one key, and another key is answered at once."""
    made = {name: make_key(name, ["answer"]) for name in ("greedy", "modest")}
    (tmp_path / "keys").write_text("".join(key.line() for _, key in made.values()))
    headers = {name: {"authorization": f"Bearer {secret}"} for name, (secret, _) in made.items()}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "slow"}], "n": 16, "stream": True}
    with serve(keys=tmp_path / "keys") as server, ExitStack() as streams:
        server.engine.script("slow", hangs=True)
        statuses = [
            streams.enter_context(
                server.client.stream("POST", "/v1/chat/completions", json=body, headers=headers["greedy"])
            ).status_code
            for _ in range(16)
        ]
        assert Counter(statuses) == {200: 12, 429: 4}
        server.client.headers.update(headers["modest"])
        assert server.chat("ask", n=16).status_code == 200
    wait_until(lambda: server.engine.running == 0)


class TestPreparing:
    """What is tokenised waits in turn: by caller, and bounded by its length."""

    def test_callers_take_turns(self) -> None:
        async def main() -> list[str]:
            preparing, done = Preparing(1000), list[str]()
            held, gate = threading.Event(), asyncio.Event()
            loop = asyncio.get_running_loop()

            def first() -> None:
                loop.call_soon_threadsafe(gate.set)
                held.wait()

            work = [asyncio.create_task(preparing.run("greedy", 1, first))]
            await gate.wait()
            for name in ("greedy", "greedy", "greedy", "modest"):
                work.append(asyncio.create_task(preparing.run(name, 1, partial(done.append, name))))
                await asyncio.sleep(0)
            held.set()
            await asyncio.gather(*work)
            preparing.close()
            return done

        assert asyncio.run(main()) == ["greedy", "modest", "greedy", "greedy"]

    def test_what_waits_is_bounded_in_all_and_for_each(self) -> None:
        async def main() -> None:
            for alone, most in ((True, 100), (False, 50)):
                preparing = Preparing(100, lambda alone=alone: alone)
                held = threading.Event()
                first = asyncio.create_task(preparing.run("alice", most, held.wait))
                await asyncio.sleep(0)
                with pytest.raises(Overloaded):
                    await preparing.run("alice", 1, lambda: None)
                if not alone:
                    second = asyncio.create_task(preparing.run("bob", 50, lambda: None))
                    await asyncio.sleep(0)
                    with pytest.raises(Overloaded):
                        await preparing.run("carol", 1, lambda: None)
                held.set()
                await first
                if not alone:
                    await second
                await preparing.run("alice", 1000, lambda: None)  # where nothing waits, it may be longer
                preparing.close()

        asyncio.run(main())

    def test_work_that_nobody_waits_for_is_dropped(self) -> None:
        async def main() -> None:
            preparing, held, done = Preparing(100), threading.Event(), list[int]()
            first = asyncio.create_task(preparing.run("a", 1, held.wait))
            dropped = asyncio.create_task(preparing.run("a", 1, partial(done.append, 1)))
            await asyncio.sleep(0)
            dropped.cancel()
            held.set()
            await first
            await preparing.run("a", 1, partial(done.append, 2))
            assert done == [2]
            with pytest.raises(ZeroDivisionError):
                await preparing.run("a", 1, lambda: 1 // 0)
            preparing.close()

        asyncio.run(main())


def test_bodies_that_are_held_at_once_are_bounded() -> None:
    """Many that send most of a body and then wait: together they may take 64 bodies' memory."""

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass

    async def main() -> None:
        limit, statuses = BodyLimit(reads, 100), list[int]()
        waits = asyncio.Event()

        async def client() -> None:
            messages = [b"x" * 99]

            async def receive() -> dict[str, Any]:
                if messages:
                    return {"type": "http.request", "body": messages.pop(), "more_body": True}
                await waits.wait()
                return {"type": "http.disconnect"}

            async def send(_: Any) -> None: ...

            try:
                await limit({"type": "http", "headers": []}, receive, send)
            except HTTPException as refused:
                statuses.append(refused.status_code)

        clients = [asyncio.create_task(client()) for _ in range(70)]
        await asyncio.sleep(0.05)
        assert statuses == [503] * 6
        waits.set()
        await asyncio.gather(*clients)
        await client()
        assert statuses == [503] * 6

    asyncio.run(main())


def test_rates_through_http(serve: Any) -> None:
    with serve(requests_per_minute=2) as server:
        assert [server.chat("ask").status_code for _ in range(3)] == [200, 200, 429]
        refused = server.client.post("/v1/completions", content=b"{")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert server.client.get("/v1/models").status_code == 200  # costs nothing


def test_token_rates_through_http(serve: Any) -> None:
    with serve(tokens_per_minute=60) as server:  # a chat here: 30 letters, and up to 16 of the answer
        assert [server.chat("ask").status_code for _ in range(3)] == [200, 200, 429]
        assert server.chat("ask", stream=True).status_code == 429
        pair = {"prompt": "a", "response": "b"}
        assert server.client.post("/v1/reliability", json=pair).status_code == 429
        assert len(server.engine.asked) == 2


def test_who_is_not_served_is_not_charged(serve: Any, wait_until: Any) -> None:
    with serve(tokens_per_minute=100, max_in_flight=1, max_choices=1) as server:
        server.engine.script("slow", hangs=True)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "slow"}], "stream": True}
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            assert [server.chat("ask").status_code for _ in range(5)] == [503] * 5
        wait_until(lambda: server.engine.running == 0)
        assert server.chat("ask").status_code == 200


def test_tokens_in_flight(serve: Any, wait_until: Any) -> None:
    with serve(max_in_flight_tokens=200) as server:
        server.engine.script("slow", hangs=True)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "slow"}], "stream": True}
        with server.client.stream(
            "POST", "/v1/chat/completions", json=body | {"max_tokens": 150}
        ) as response:
            assert response.status_code == 200
            refused = server.chat("ask")
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "overloaded"
        wait_until(lambda: server.engine.running == 0)
        assert server.chat("ask").status_code == 200
        never = server.chat("ask", max_tokens=190)
        assert (never.status_code, never.json()["error"]["code"]) == (400, "too_large")


class TestDeadline:
    @pytest.mark.parametrize("where", ["header", "setting"])
    @pytest.mark.parametrize("n", [1, 3])
    def test_it_frees_the_place(self, serve: Any, where: str, n: int) -> None:
        settings = {"request_timeout_s": 0.2} if where == "setting" else {}
        with serve(**settings) as server:
            server.engine.script("slow", hangs=True)
            server.client.headers["x-request-timeout"] = "0.2" if where == "header" else "1e9"
            refused = server.chat("slow", n=n)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "deadline_exceeded"
            assert "retry-after" in refused.headers
            assert server.engine.running == 0  # before the answer, not some time after
            assert server.client.get("/load").json() == {"server_load": 0}

    def test_a_stream_ends_with_the_error(self, serve: Any) -> None:
        with serve(request_timeout_s=0.2) as server:
            server.engine.script("slow", hangs=True)
            *_, last, end = server.chat("slow", stream=True).text.split("\n\n")
            assert end == ""
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
            assert server.engine.running == 0

    def test_a_client_that_does_not_read_is_cut_off(self, serve: Any, wait_until: Any) -> None:
        with serve(request_timeout_s=0.5) as server:
            server.engine.script("slow", pieces=("x" * 1000,) * 20_000)
            body = {"model": "tiny", "messages": [{"role": "user", "content": "slow"}], "stream": True}
            with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                wait_until(lambda: server.engine.running == 0)

    @pytest.mark.parametrize("value", ["0", "-1", "nan", "soon", "", "1 s"])
    def test_a_header_that_is_no_time(self, server: Any, value: str) -> None:
        headers = {"x-request-timeout": value}
        body = {"model": "tiny", "messages": [{"role": "user", "content": "ask"}]}
        refused = server.client.post("/v1/chat/completions", json=body, headers=headers)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "x-request-timeout"
        pair = {"prompt": "a", "response": "b"}
        assert server.client.post("/v1/reliability", json=pair, headers=headers).status_code == 400

    def test_infinity_is_the_servers_most(self, server: Any) -> None:
        server.client.headers["x-request-timeout"] = "inf"
        try:
            assert server.chat("ask").status_code == 200
        finally:
            del server.client.headers["x-request-timeout"]


def test_a_body_that_trickles_is_given_up() -> None:
    """The limit on the time, shortened: an application that only reads, and a client that sends no end."""

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass

    async def main() -> None:
        waits = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if waits.is_set():
                await asyncio.sleep(10)
            waits.set()
            return {"type": "http.request", "body": b"{", "more_body": True}

        async def send(_: Any) -> None:
            raise AssertionError("nothing is sent from here")

        with pytest.raises(HTTPException) as refused:
            await BodyLimit(reads, 100, timeout_s=0.05)({"type": "http", "headers": []}, receive, send)
        assert refused.value.status_code == 408

    asyncio.run(main())


def test_waiting_for_an_answer_is_not_limited_by_the_bodys_time(serve: Any) -> None:
    """The same channel then tells whether the client leaves: that wait has no limit of the body's."""

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        assert (await receive())["type"] == "http.disconnect"

    async def main() -> None:
        messages = [(0.0, {"type": "http.request", "body": b"{}"}), (0.2, {"type": "http.disconnect"})]

        async def receive() -> dict[str, Any]:
            pause, message = messages.pop(0)
            await asyncio.sleep(pause)
            return message

        async def send(_: Any) -> None: ...

        await BodyLimit(waits, 100, timeout_s=0.05)({"type": "http", "headers": []}, receive, send)

    asyncio.run(main())


def test_a_dying_clients_share_is_its_own(serve: Any) -> None:
    with serve(requests_per_minute=1) as server:
        assert httpx.post(f"{server.url}/v1/completions", content=b"nonsense").status_code in (400,)
        assert (
            server.chat("ask").status_code == 429
        )  # what was refused for its content was asked all the same
