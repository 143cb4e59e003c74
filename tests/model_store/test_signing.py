"""Signatures, by real keys; the package model-signing is an extra."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from candor.app.cli import cli
from candor.app.process.backend import Bundles
from candor.app.process.settings import Settings
from candor.model_store.signing import BundleUnsigned, load_signed, require_signed, sign

pytest.importorskip("model_signing", reason="candor[signing] is not installed")


def key(folder: Path, name: str) -> tuple[Path, Path]:
    """A new pair of keys, (private, public)."""
    private, public = folder / name, folder / f"{name}.pub"
    subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private], check=True
    )
    subprocess.run(
        ["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True
    )
    return private, public


@pytest.fixture
def published(tmp_path: Path, write: Any, files: dict[str, bytes]) -> Path:
    folder: Path = write(tmp_path / "demo", files)
    return folder


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return key(tmp_path, "key")


def test_what_was_signed_is_loaded(published: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    signature = sign(published, keys[0])
    assert signature == published.with_name(published.name + ".sig")
    assert load_signed(published, keys[1]).digest
    moved = tmp_path / "elsewhere"
    shutil.copytree(published, moved)
    shutil.copy(signature, tmp_path / "elsewhere.sig")
    assert load_signed(moved, keys[1]).digest


def test_what_was_not_signed_is_refused(published: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleUnsigned, match="not signed"):
        load_signed(published, keys[1])
    signature = sign(published, keys[0])
    with pytest.raises(BundleUnsigned, match="no signature by"):
        load_signed(published, key(tmp_path, "other")[1])
    with pytest.raises(BundleUnsigned, match="no signature by"):
        load_signed(published, tmp_path / "no key")
    whole = signature.read_text()
    for text in ("", "{}", whole[:-20], whole.replace("payload", "payloae")):
        signature.write_text(text)
        with pytest.raises(BundleUnsigned):
            load_signed(published, keys[1])


def test_another_statement_under_the_signature_is_refused(published: Path, keys: tuple[Path, Path]) -> None:
    import base64

    signature = sign(published, keys[0])
    content = json.loads(signature.read_text())
    envelope = content["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    for one in statement["predicate"]["resources"]:
        one["digest"] = "0" * 64
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    signature.write_text(json.dumps(content))
    with pytest.raises(BundleUnsigned, match="no signature by"):
        load_signed(published, keys[1])


def test_the_signature_must_be_of_what_was_loaded(published: Path, keys: tuple[Path, Path]) -> None:
    """A directory that is exchanged between loading and checking: the bytes in memory are another bundle's."""
    sign(published, keys[0])
    with pytest.raises(BundleUnsigned, match="another bundle's"):
        require_signed(published, "0" * 64, keys[1])


def test_a_server_refuses_at_start(published: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    settings = Settings(model=tmp_path, bundle=published, bundle_key=keys[1])
    with pytest.raises(BundleUnsigned):
        Bundles.read(settings)
    sign(published, keys[0])
    assert Bundles.read(settings).first[1].digest
    shutil.copytree(published, tmp_path / "second")
    with pytest.raises(BundleUnsigned):
        Bundles.read(settings.model_copy(update={"shadow": tmp_path / "second"}))


def test_the_commands(published: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    def call(*words: Any) -> Any:
        return CliRunner().invoke(cli, ["bundle", *map(str, words)])

    assert call("verify", published, "--key", keys[1]).exit_code == 1
    assert call("sign", published, "--key", keys[0]).exit_code == 0
    assert "signed with" in call("verify", published, "--key", keys[1]).stdout
    wrong = call("sign", published, "--key", tmp_path / "none")
    assert wrong.exit_code == 1
    assert "openssl ecparam" in wrong.stderr
