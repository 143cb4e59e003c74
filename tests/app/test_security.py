"""Keys: nobody gets in without one, none does more than its scopes, and the file that keeps them betrays none."""

from __future__ import annotations

import json
import os
import re
import resource
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from candor.app.cli import cli
from candor.app.edge.keys import SCOPES, KeyFileError, KeyRing, make_key, read_keys
from candor.app.edge.limits import TooFast
from candor.app.edge.middleware import OPEN, scope_of
from candor.app.edge.quotas import QuotaFileError, Quotas
from candor.app.telemetry.audit import AuditFileError

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "ask"}]}


def write_keys(path: Path, **scopes: str) -> dict[str, str]:
    """A file with a key of each name and comma-separated scopes; the keys."""
    made = {name: make_key(name, given.split(",")) for name, given in scopes.items()}  # type: ignore[arg-type]
    path.write_text("# who\n\n" + "".join(key.line() for _, key in made.values()))
    return {name: secret for name, (secret, _) in made.items()}


class TestFile:
    def test_it_is_read_as_written(self, tmp_path: Path) -> None:
        secrets = write_keys(tmp_path / "keys", alice="answer", bob="feedback,operate")
        ring = KeyRing(tmp_path / "keys")
        for name, secret in secrets.items():
            key = ring.find(secret)
            assert key is not None
            assert key.name == name
            assert secret not in (tmp_path / "keys").read_text()
        assert ring.find(secrets["bob"]).scopes == {"feedback", "operate"}  # type: ignore[union-attr]

    def test_what_is_no_key(self, tmp_path: Path) -> None:
        [secret] = write_keys(tmp_path / "keys", alice="answer").values()
        ring = KeyRing(tmp_path / "keys")
        [key] = read_keys(tmp_path / "keys")
        for other in ("", secret[:-1], secret + " ", secret.upper(), key.sha256, "alice", "é\udcff"):
            assert ring.find(other) is None

    def test_keys_are_long_and_all_different(self) -> None:
        made = {make_key("a", ["answer"])[0] for _ in range(100)}
        assert len(made) == 100
        assert all(len(key) == len("candor-") + 43 for key in made)  # 256 bits in base64

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", "no key"),
            ("# nothing\n", "no key"),
            ("alice answer\n", "line 1"),
            ("alice answer 00\n", "line 1"),
            ("alice  " + "0" * 64, "line 1"),
            ("alice all " + "0" * 64, "line 1"),
            ("alice answer, " + "0" * 64, "line 1"),
            ("a/b answer " + "0" * 64, "line 1"),
            (f"a answer {'0' * 64}\na operate {'1' * 64}", "twice"),
            ("ok answer candor-SECRET", "line 1"),
        ],
    )
    def test_a_malformed_file(self, tmp_path: Path, text: str, complaint: str) -> None:
        path = tmp_path / "keys"
        path.write_text(text)
        with pytest.raises(KeyFileError, match=complaint) as refused:
            read_keys(path)
        assert "SECRET" not in str(refused.value)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(KeyFileError, match="candor key"):
            KeyRing(tmp_path / "none")

    def test_a_removed_line_revokes(self, tmp_path: Path) -> None:
        path = tmp_path / "keys"
        secrets = write_keys(path, alice="answer", bob="answer")
        ring = KeyRing(path)
        again = write_keys(path, alice="answer")
        assert ring.find(secrets["bob"]) is None
        assert ring.find(secrets["alice"]) is None
        assert ring.find(again["alice"]) is not None

    @pytest.mark.parametrize("text", ["", "\n", "# nobody\n"])
    def test_an_empty_file_locks_everybody_out_at_once(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "keys"
        [secret] = write_keys(path, alice="answer").values()
        ring = KeyRing(path)
        path.write_text(text)
        assert ring.find(secret) is None
        assert ring.weights() == {}
        [again] = write_keys(path, alice="answer").values()
        assert ring.find(again) is not None

    @pytest.mark.parametrize("harm", ["nonsense", "absent", "a directory", "bad UTF-8"])
    def test_a_file_that_cannot_be_read_keeps_its_keys_for_a_while(
        self, tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        path, clock = tmp_path / "keys", Clock()
        [secret] = write_keys(path, alice="answer").values()
        ring = KeyRing(path, grace_s=60.0, clock=clock)
        whole = path.read_bytes()
        path.unlink()
        if harm == "a directory":
            path.mkdir()
        elif harm != "absent":
            path.write_bytes(b"nonsense" if harm == "nonsense" else b"\xff\xfe")
        assert ring.find(secret) is not None
        assert "the keys that were read before stay for 60 s" in caplog.text
        clock.now += 59
        assert ring.find(secret) is not None
        assert ring.stale_s() == 59
        clock.now += 2
        assert ring.find(secret) is None
        assert "everybody is locked out" in caplog.text
        path.rmdir() if harm == "a directory" else path.unlink(missing_ok=True)
        path.write_bytes(whole)
        assert ring.find(secret) is not None
        assert ring.stale_s() == 0

    def test_a_reread_that_failed_once_is_tried_again(self, tmp_path: Path) -> None:
        """No file could be opened (EMFILE) just when a key was revoked; then it can, and the file is as it was."""
        path, clock = tmp_path / "keys", Clock()
        secrets = write_keys(path, alice="answer", bob="answer")
        ring = KeyRing(path, grace_s=60.0, clock=clock)
        alice = path.read_text().splitlines()[2]
        path.write_text(alice + "\n")
        files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            assert ring.find(secrets["bob"]) is not None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
        clock.now += 1
        assert ring.find(secrets["bob"]) is None
        assert ring.find(secrets["alice"]) is not None

    def test_options_of_a_line(self, tmp_path: Path) -> None:
        path = tmp_path / "keys"
        line = f"alice answer {'0' * 64}"
        path.write_text(f"{line} weight=2.5 models=tiny,org/legal tokens-per-day=1000\n")
        [key] = read_keys(path)
        assert (key.weight, key.models, key.tokens_per_day) == (2.5, {"tiny", "org/legal"}, 1000)
        for option in (
            "weight=0",
            "weight=-1",
            "weight=x",
            "weight",
            "models=",
            "models=a,,b",
            "tokens-per-day=1e3",
        ):
            path.write_text(f"{line} {option}\n")
            with pytest.raises(KeyFileError, match="tokens-per-day=NUMBER"):
                read_keys(path)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class TestCommand:
    def test_a_key_is_shown_once_and_its_hash_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "keys"
        made = CliRunner().invoke(cli, ["key", "alice", "--file", str(path)])
        assert made.exit_code == 0
        secret = made.stdout.strip()
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert secret not in path.read_text()
        path.write_text(path.read_text().rstrip("\n"))  # as an editor may leave it
        more = ["key", "bob", "--file", str(path), "--scope", "operate", "--scope", "feedback"]
        assert CliRunner().invoke(cli, more).exit_code == 0
        ring = KeyRing(path)
        assert ring.find(secret).scopes == {"answer"}  # type: ignore[union-attr]
        assert {key.name: key.scopes for key in read_keys(path)}["bob"] == {"operate", "feedback"}

    @pytest.mark.parametrize("arguments", [["alice"], ["a b"], ["carol", "--scope", "all"]])
    def test_what_it_refuses(self, tmp_path: Path, arguments: list[str]) -> None:
        path = tmp_path / "keys"
        write_keys(path, alice="answer")
        before = path.read_bytes()
        refused = CliRunner().invoke(cli, ["key", *arguments, "--file", str(path)])
        assert refused.exit_code == 1
        assert refused.stderr.startswith("candor: ")
        assert path.read_bytes() == before


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    return write_keys(path, asker="answer", judge="feedback", operator="operate") | {"path": str(path)}


@pytest.fixture
def guarded(serve: Any, secrets: dict[str, str]) -> Iterator[Any]:
    with serve(keys=Path(secrets["path"])) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_no_route_is_open_but_those_that_are_meant(guarded: Any, secrets: dict[str, str]) -> None:
    document = guarded.client.get("/openapi.json", headers=bearer(secrets["asker"])).json()
    paths = {path.replace("{model}", "tiny"): set(methods) for path, methods in document["paths"].items()}
    paths |= {"/openapi.json": {"get"}, "/nowhere": {"get"}, "/metrics/": {"get"}, "/v1/x": {"put"}}
    assert len(paths) > 12
    for path, methods in paths.items():
        for method in methods:
            status = guarded.client.request(method, path).status_code
            assert (status != 401) is (path in OPEN), (method, path, status)
    assert guarded.client.get("/readyz?deep=true").status_code == 401
    assert guarded.client.get("/readyz?%64eep=1").status_code == 401


def test_a_path_of_a_proxy_opens_nothing(serve: Any, secrets: dict[str, str]) -> None:
    with serve(keys=Path(secrets["path"]), root_path="/livez") as server:
        assert server.client.get("/livez/livez").status_code == 200
        for path in (
            "/livez/v1/models",
            "/v1/models",
            "/livez/v1/health/live/../../models",
            "/livez/metrics",
        ):
            assert server.client.get(path).status_code == 401, path


def test_anthropics_clients_give_their_key(guarded: Any, secrets: dict[str, str]) -> None:
    for key, status in ((secrets["asker"], 200), ("candor-wrong", 401), ("", 401)):
        assert guarded.client.get("/v1/models", headers={"x-api-key": key}).status_code == status


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer candor-wrong",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer {key} {key}",
        b"Bearer \xff\xfe",
    ],
)
def test_what_does_not_let_in(guarded: Any, secrets: dict[str, str], header: str | bytes | None) -> None:
    if isinstance(header, str):
        header = header.replace("{key}", secrets["asker"])
    headers = {} if header is None else {"authorization": header}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/reliability"):
        response = guarded.client.post(path, json=ASK, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert guarded.engine.asked == []


def test_each_scope_does_its_own_and_no_more(guarded: Any, secrets: dict[str, str]) -> None:
    asked = {
        "asker": guarded.client.post("/v1/chat/completions", json=ASK, headers=bearer(secrets["asker"])),
        "judge": guarded.client.post("/v1/reliability/feedback", json={}, headers=bearer(secrets["judge"])),
        "operator": guarded.client.get("/metrics", headers=bearer(secrets["operator"])),
    }
    assert {name: response.status_code for name, response in asked.items()} == {
        "asker": 200,
        "judge": 400,  # let in, and told what is missing
        "operator": 200,
    }
    doors = [
        ("POST", "/v1/chat/completions", "asker"),
        ("POST", "/v1/reliability/feedback", "judge"),
        ("GET", "/metrics", "operator"),
        ("GET", "/load", "operator"),
        ("GET", "/readyz?deep=true", "operator"),
    ]
    for method, path, owner in doors:
        for name in {"asker", "judge", "operator"} - {owner}:
            response = guarded.client.request(method, path, json=ASK, headers=bearer(secrets[name]))
            assert response.status_code == 403, (path, name)
            assert response.json()["error"]["code"] == "insufficient_scope"


def test_a_body_without_a_key_is_not_even_read(serve: Any, secrets: dict[str, str]) -> None:
    with serve(keys=Path(secrets["path"]), max_body_bytes=10) as server:
        assert server.chat("x" * 1000).status_code == 401
        assert server.client.post("/v1/chat/completions", content=b"{").status_code == 401


def test_the_stock_client_gives_its_key(guarded: Any, secrets: dict[str, str]) -> None:
    import openai

    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=secrets["asker"], max_retries=0) as client:
        assert client.models.list().data[0].id == "tiny"
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_the_document_says_that_keys_are_taken(guarded: Any, server: Any, secrets: dict[str, str]) -> None:
    document = guarded.client.get("/openapi.json", headers=bearer(secrets["asker"])).json()
    assert document["paths"]["/v1/chat/completions"]["post"]["security"] == [{"HTTPBearer": []}]
    assert "securitySchemes" not in server.client.get("/openapi.json").json()["components"]


def test_without_keys_everybody_may(server: Any) -> None:
    for path in ("/v1/models", "/metrics", "/load", "/version"):
        assert server.client.get(path).status_code == 200


def test_scopes_of_paths() -> None:
    assert scope_of("/readyz") is None
    assert scope_of("/readyz", deep=True) == "operate"
    assert scope_of("/console/app.js") is None
    assert scope_of("/consoles") == "operate"
    assert scope_of("/v1/reliability") == "answer"
    assert scope_of("/v1/reliability/feedback") == "feedback"
    assert scope_of("/debug") == "operate"
    assert {scope_of(f"/v1/reliability/{path}") for path in ("queue", "labels")} == {"review"}
    assert scope_of("/v1/reliability/answers/x") == "answer"
    assert set(SCOPES) == {"answer", "feedback", "review", "operate"}


def test_a_key_is_not_logged(guarded: Any, secrets: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        for key in (secrets["asker"], "candor-mistyped"):
            httpx.get(f"{guarded.url}/v1/models", headers=bearer(key))
            httpx.post(f"{guarded.url}/v1/chat/completions", json=ASK, headers=bearer(key))
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name == "candor")
    assert "/v1/models 200" in ours
    assert "for asker" in ours
    assert secrets["asker"] not in ours
    assert "mistyped" not in ours


def with_options(path: Path, **options: str) -> dict[str, str]:
    """A file with a key of each name and what stands behind its line; the keys."""
    made = {name: make_key(name, ["answer", "operate"]) for name in options}
    path.write_text("".join(f"{made[name][1].line().strip()} {more}\n" for name, more in options.items()))
    return {name: secret for name, (secret, _) in made.items()}


def test_a_revoked_key_is_refused_and_its_file_is_in_the_metrics(serve: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    secrets = with_options(path, alice="", bob="")
    with serve(keys=path, keys_grace_s=0.3) as server:

        def status(name: str) -> int:
            return int(server.client.get("/metrics", headers=bearer(secrets[name])).status_code)

        assert (status("alice"), status("bob")) == (200, 200)
        path.write_text("nonsense")
        assert status("alice") == 200
        metrics = server.client.get("/metrics", headers=bearer(secrets["alice"])).text
        assert re.search(r"^candor_keys_stale_seconds 0\.\d*[1-9]", metrics, re.MULTILINE)
        time.sleep(1.1)  # the next try to read it
        assert status("alice") == 401
        path.write_text("")
        assert status("alice") == 401
        again = with_options(path, alice="")
        assert server.client.get("/metrics", headers=bearer(again["alice"])).status_code == 200


def test_a_key_asks_for_its_models_alone(serve: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    secrets = with_options(path, all="", tiny="models=tiny", other="models=other")
    with serve(keys=path) as server:
        for name, status, listed in (("all", 200, ["tiny"]), ("tiny", 200, ["tiny"]), ("other", 404, [])):
            server.client.headers.update(bearer(secrets[name]))
            assert server.chat("ask").status_code == status
            assert [one["id"] for one in server.client.get("/v1/models").json()["data"]] == listed
            assert server.client.get("/v1/models/tiny").status_code == status
            assert server.client.get("/v1/reliability").status_code == status
            pair = server.client.post("/v1/reliability", json={"prompt": "a", "response": "b"})
            assert pair.status_code == status
            assert "tiny" not in pair.text or status == 200
            assert server.client.get("/metrics").status_code == 200
        assert len(server.engine.asked) == 2


class TestQuotas:
    def test_a_quota_outlives_the_server(self, serve: Any, tmp_path: Path) -> None:
        secrets = with_options(tmp_path / "keys", alice="tokens-per-day=60", bob="")
        given = {"keys": tmp_path / "keys", "quotas": tmp_path / "quotas.db"}
        with serve(**given) as server:  # a chat here: 30 letters, and up to 16 of the answer
            server.client.headers.update(bearer(secrets["alice"]))
            assert [server.chat("ask").status_code for _ in range(3)] == [200, 200, 429]
            refused = server.chat("ask")
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert 0 < int(refused.headers["retry-after"]) <= 86_400
        with serve(**given) as server:
            server.client.headers.update(bearer(secrets["alice"]))
            assert server.chat("ask").status_code == 429
            server.client.headers.update(bearer(secrets["bob"]))
            assert server.chat("ask").status_code == 200

    def test_the_next_day_begins_anew(self) -> None:
        clock = Clock()
        quotas = Quotas(None, clock)
        quotas.take("alice", 10, 5)
        with pytest.raises(TooFast) as refused:
            quotas.take("alice", 1, 5)
        assert refused.value.retry_after_s == 86_400 - 100
        quotas.take("alice", 1, None)
        clock.now += 86_300
        quotas.take("alice", 1, 5)

    def test_what_cannot_be_written_is_written_later(self, tmp_path: Path) -> None:
        path = tmp_path / "quotas.db"
        quotas = Quotas(path)
        quotas.take("alice", 7, None)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            quotas.write()
            quotas.settle("alice", -2)
            other.execute("ROLLBACK")
        quotas.write()
        with pytest.raises(TooFast):
            Quotas(path).take("alice", 1, 5)
        Quotas(path).take("alice", 1, 6)

    def test_a_file_that_cannot_be_used(self, tmp_path: Path) -> None:
        with pytest.raises(QuotaFileError, match="CANDOR_QUOTAS"):
            Quotas(tmp_path / "none" / "quotas.db")


class TestHosts:
    @pytest.mark.parametrize(
        ("host", "status"),
        [
            ("127.0.0.1:1", 200),
            ("localhost", 200),
            ("LocalHost.:8000", 200),
            ("[::1]:8000", 200),
            ("evil.example", 421),
            ("evil.example:8000", 421),
            ("127.0.0.1.evil.example", 421),
            ("localhost.evil.example", 421),
            ("", 421),
        ],
    )
    def test_a_server_without_keys_takes_local_names_alone(self, server: Any, host: str, status: int) -> None:
        for method, path in (("GET", "/v1/models"), ("GET", "/console/"), ("GET", "/metrics")):
            response = server.client.request(method, path, headers={"host": host})
            assert response.status_code == status, path
        assert server.client.get("/livez", headers={"host": host}).status_code == 200  # a probe names the pod

    def test_the_operator_names_others(self, serve: Any, tmp_path: Path) -> None:
        [secret] = with_options(tmp_path / "keys", alice="").values()
        for given, allowed in (
            ({"allowed_hosts": "a.example, B.example"}, {"a.example", "b.example"}),
            ({"allowed_hosts": "*"}, {"a.example", "b.example", "c.example", "localhost"}),
            ({"keys": tmp_path / "keys"}, {"a.example", "b.example", "c.example", "localhost"}),
        ):
            with serve(**given) as server:
                server.client.headers.update(bearer(secret))
                for name in ("a.example", "b.example", "c.example", "localhost"):
                    status = server.client.get("/v1/models", headers={"host": name}).status_code
                    assert (status == 200) is (name in allowed), name

    def test_pages_from_elsewhere_may_not_ask_unless_they_are_named(self, serve: Any) -> None:
        preflight = {"origin": "https://app.example", "access-control-request-method": "POST"}
        with serve() as server:
            refused = server.client.options("/v1/chat/completions", headers=preflight)
            assert refused.status_code == 405
            assert not [name for name in refused.headers if name.startswith("access-control")]
        with serve(cors_origins="https://app.example") as server:
            taken = server.client.options("/v1/chat/completions", headers=preflight)
            assert taken.headers["access-control-allow-origin"] == "https://app.example"
            sdk = {"access-control-request-headers": "authorization,x-stainless-lang"}
            assert server.client.options("/v1/chat/completions", headers=preflight | sdk).status_code == 200
            other = preflight | {"origin": "https://evil.example"}
            refused = server.client.options("/v1/chat/completions", headers=other)
            assert "access-control-allow-origin" not in refused.headers


class TestAudit:
    def test_who_asked_what_and_got_which_verdict(
        self, serve: Any, tmp_path: Path, secrets: dict[str, str]
    ) -> None:
        path = tmp_path / "audit.jsonl"
        with serve(keys=Path(secrets["path"]), audit_log=path) as server:
            server.engine.script("far", state="far")
            server.client.headers.update(bearer(secrets["asker"]) | {"x-request-id": "one"})
            server.chat("ask SECRET", n=2)
            server.chunks("far SECRET")
            pair = {"prompt": "SECRET", "response": "SECRET"}
            server.client.post("/v1/reliability", json=pair)
            server.chat("ask SECRET", temperature=9)
            server.client.get("/v1/SECRET")
            server.client.get("/livez")
            server.client.headers.update(bearer("candor-SECRET"))
            server.chat("ask SECRET")
        text = path.read_text()
        assert "SECRET" not in text
        assert secrets["asker"] not in text
        lines = [json.loads(line) for line in text.splitlines()]
        assert [(one["caller"], one["route"], one["status"]) for one in lines] == [
            ("asker", "/v1/chat/completions", 200),
            ("asker", "/v1/chat/completions", 200),
            ("asker", "/v1/reliability", 200),
            ("asker", "/v1/chat/completions", 400),
            ("asker", None, 404),
            ("unknown", None, 401),
        ]
        assert [[one["region"] for one in line["verdicts"]] for line in lines] == [
            ["high", "high"],
            ["ood"],
            ["low"],
            [],
            [],
            [],
        ]
        assert lines[0]["model"] == "tiny"
        assert {one["request_id"] for one in lines} == {"one"}
        assert {one["address"] for one in lines} == {"127.0.0.1"}

    def test_a_file_that_was_moved_away_is_begun_anew(
        self, serve: Any, tmp_path: Path, wait_until: Any
    ) -> None:
        path, old = tmp_path / "audit.jsonl", tmp_path / "audit.1"
        with serve(audit_log=path) as server:
            server.chat("ask")
            wait_until(lambda: path.read_text().count("\n") == 1)
            path.rename(old)
            server.chat("ask")
            wait_until(path.exists)
        assert (old.read_text().count("\n"), path.read_text().count("\n")) == (1, 1)

    def test_a_file_that_cannot_be_used(self, serve: Any, tmp_path: Path) -> None:
        with (
            pytest.raises(AuditFileError, match="CANDOR_AUDIT_LOG"),
            serve(audit_log=tmp_path / "no" / "log"),
        ):
            pass
