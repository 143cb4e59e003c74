"""Keys: nobody gets in without one, none does more than its scopes, and the file that keeps them betrays none."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from candor.app.cli import cli
from candor.app.edge.keys import SCOPES, KeyFileError, KeyRing, make_key, read_keys
from candor.app.edge.middleware import OPEN, scope_of

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

    def test_a_removed_line_revokes_and_a_broken_file_changes_nothing(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "keys"
        secrets = write_keys(path, alice="answer", bob="answer")
        ring = KeyRing(path)
        path.write_text("nonsense")
        assert ring.find(secrets["bob"]) is not None
        assert "the keys that were read before stay" in caplog.text
        path.unlink()
        assert ring.find(secrets["bob"]) is not None
        again = write_keys(path, alice="answer")
        assert ring.find(secrets["bob"]) is None
        assert ring.find(secrets["alice"]) is None
        assert ring.find(again["alice"]) is not None


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
        "judge": 422,  # let in, and told what is missing
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
    assert set(SCOPES) == {"answer", "feedback", "operate"}


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
