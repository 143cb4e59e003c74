"""Starting and ending: what is refused before anything runs, exit codes, and what is not imported."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from benchmarks.zoo.tiny import save, small
from candor.app.edge.limits import Refused
from candor.app.process.backend import Backend, _load
from candor.app.process.server import run
from candor.app.process.settings import Settings
from candor.engine.base import EngineError, IdentityMismatch, Representation
from candor.engine.identity import identify
from candor.engine.prompt import ChatFormat
from candor.model_store.bundle import Bundle
from candor.model_store.identity import check_identity, check_model, check_options
from candor.model_store.manifest import AdapterIdentity
from candor.policy.conversation import Conversations

ROOT = Path(__file__).resolve().parents[2]


def candor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CANDOR_")}
    return subprocess.run(
        [sys.executable, "-c", "from candor.app.cli import main; main()", *arguments],
        cwd=ROOT,
        env={**clean, **environment, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_neither_vllm_nor_transformers_is_imported() -> None:
    code = (
        "import sys, candor.app.process.application, candor.app.process.server\n"
        "heavy = {'vllm', 'transformers', 'tokenizers', 'candor.calibration', 'candor.finetune'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_adapters_come_from_the_environment_too() -> None:
    done = candor(
        "serve", CANDOR_MODEL="somewhere", CANDOR_BUNDLE="somewhere", CANDOR_ADAPTERS="legal=bundle medical"
    )
    assert done.returncode == 2
    assert "--adapter" in done.stderr
    assert "'medical'" in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, candor.app.cli; print(sorted({'torch', 'fastapi', 'uvicorn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    shown = candor("--help")
    assert shown.returncode == 0
    for command in ("serve", "calibrate", "evaluate", "bundle"):
        assert command in shown.stdout


def test_serve_without_what_it_needs() -> None:
    done = candor("serve", "--port", "70000", CANDOR_ESTIMATOR="best")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    for name in ("model", "bundle", "port", "estimator"):
        assert any(line.startswith(f"candor: --{name} or CANDOR_{name.upper()}: ") for line in lines)


@pytest.mark.parametrize("command", ["serve", "calibrate", "evaluate"])
def test_vllms_options_are_read_before_anything_starts(command: str, tmp_path: Path) -> None:
    needed = {
        "serve": ("--model", "m", "--bundle", "b"),
        "calibrate": ("--model", "m", "--data", "d", "--out", str(tmp_path / "o"), "--alpha", "0.9"),
        "evaluate": ("--model", "m", "--bundle", "b", "--data", "d"),
    }[command]
    refused = candor(command, *needed, "--worker-cls", "mine.Worker", CANDOR_VLLM="--seed 1")
    assert refused.returncode == 2
    assert refused.stderr == (
        "candor: --worker-cls cannot be given: Candor's own worker and scheduler take the hidden states; "
        "leave it out\n"
    )
    other = candor(command, *needed, "--engine", "transformers", CANDOR_VLLM="--seed 1")
    assert other.returncode == 2
    assert "--engine transformers takes none of vLLM's" in other.stderr


def test_serve_without_a_bundle(tmp_path: Path) -> None:
    done = candor("serve", "--model", str(tmp_path), "--port", "0", CANDOR_BUNDLE=str(tmp_path / "none"))
    assert done.returncode == 1
    assert "candor: there is no bundle" in done.stderr
    assert "candor calibrate" in done.stderr
    assert "Traceback" not in done.stderr


class TestSettings:
    def test_environment_and_options(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CANDOR_MODEL", "m")
        monkeypatch.setenv("CANDOR_PORT", "8123")
        monkeypatch.setenv("CANDOR_MAX_MODEL_LEN", "")
        settings = Settings(bundle=Path("b"), port=9)
        assert (settings.model, settings.bundle, settings.port) == (Path("m"), Path("b"), 9)
        assert settings.max_model_len == 2048

    def test_every_setting_says_what_it_is(self) -> None:
        for name, field in Settings.model_fields.items():
            assert field.description, name
            assert field.description.endswith("."), name

    def test_a_certificate_needs_its_key(self, settings: Any) -> None:
        with pytest.raises(ValidationError, match="go together"):
            settings(tls_certificate=Path("x"))

    def test_a_request_that_could_never_be_let_in(self, settings: Any) -> None:
        with pytest.raises(ValidationError, match="could never be let in"):
            settings(max_choices=10, max_in_flight=9)


def tiny_model(directory: Path) -> Path:
    from transformers import LlamaConfig

    return save(directory, LlamaConfig(**small(num_hidden_layers=1)), "LlamaForCausalLM")


class TestIdentity:
    def test_the_same(self, backend: Backend) -> None:
        check_identity(backend.engine, backend.bundle)

    def test_all_differences_at_once(self, backend: Backend, engine: Any, identity: Any) -> None:
        engine.identity = replace(identity, dtype="bfloat16", hidden_size=6, weights_sha256="f" * 64)
        engine.representation = Representation(order=("last", "mean"))
        with pytest.raises(IdentityMismatch) as refused:
            check_identity(engine, backend.bundle)
        message = str(refused.value)
        for part in ("float32", "bfloat16", "a" * 64, "f" * 64, "hidden_size", "representation", "8", "12"):
            assert part in message
        assert "candor calibrate" in message

    def test_the_name_alone_does_not_matter(self, backend: Backend, engine: Any, identity: Any) -> None:
        engine.identity = replace(identity, name="moved")
        check_identity(engine, backend.bundle)

    def test_vllms_options_that_change_h(self, backend: Backend) -> None:
        model = replace(backend.bundle.manifest.model, engine_options={"quantization": "awq"})
        bundle = replace(backend.bundle, manifest=replace(backend.bundle.manifest, model=model))
        check_options(bundle, {"quantization": "awq", "tensor_parallel_size": 4})
        for vllm, have in (({}, "none"), ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8")):
            with pytest.raises(IdentityMismatch) as refused:
                check_options(bundle, vllm)
            assert str(refused.value).splitlines()[1] == (
                f"  engine_options: the bundle was made for --quantization awq, this model has {have}"
            )
        with pytest.raises(IdentityMismatch, match="engine_options"):
            check_identity(backend.engine, bundle)

    def test_what_grammars_let_through_matters_where_answers_are_held_to_one(self, backend: Backend) -> None:
        @dataclass
        class Grammars:  # as vLLM's parser gives them
            disable_any_whitespace: bool = False

        manifest = backend.bundle.manifest
        held = Conversations(template_arguments={"structured_outputs": {"regex": "yes|no"}})
        policy = replace(manifest.policy, conversations=held)
        bundle = replace(backend.bundle, manifest=replace(manifest, policy=policy))
        check_options(bundle, {})
        check_options(bundle, {"structured_outputs_config": Grammars()})
        with pytest.raises(IdentityMismatch, match="this model has --structured-outputs-config"):
            check_options(bundle, {"structured_outputs_config": Grammars(True)})
        check_options(backend.bundle, {"structured_outputs_config": Grammars(True)})

    def test_another_model_is_told_by_its_files_alone(
        self, backend: Backend, identity: Any, tmp_path: Path
    ) -> None:
        model, chat = tiny_model(tmp_path), ChatFormat.from_directory(tmp_path)
        with pytest.raises(IdentityMismatch, match="weights_sha256: the bundle was made for"):
            check_model(backend.bundle, model, chat, 512, {})
        same = replace(backend.bundle.manifest, model=identify(model, chat, "float32", 512))
        check_model(replace(backend.bundle, manifest=same), model, chat, 512, {"seed": 1})

    def test_an_adapter_that_is_not_served(self, backend: Backend) -> None:
        manifest = replace(backend.bundle.manifest, adapter=AdapterIdentity("lora", "d" * 64))
        with pytest.raises(IdentityMismatch, match="lora"):
            check_identity(backend.engine, replace(backend.bundle, manifest=manifest))


@pytest.fixture
def _sigterm_is_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def started(
    port: int, *, scheme: str = "http", verify: ssl.SSLContext | bool = False
) -> Iterator[httpx.Client]:
    """A client of the server, once it listens."""
    with httpx.Client(base_url=f"{scheme}://127.0.0.1:{port}", timeout=30, verify=verify) as client:
        for _ in range(3000):
            try:
                client.get("/readyz")
                break
            except httpx.ConnectError:
                time.sleep(0.01)
        yield client


@pytest.mark.usefixtures("_sigterm_is_restored")
class TestRun:
    """`candor serve` from its settings to its exit code, with a script in the engine's place."""

    def test_a_dead_engine_ends_the_server_with_1(self, settings: Any, backend: Backend, engine: Any) -> None:
        port = free_port()

        async def start(_: Settings) -> Backend:
            return backend

        def kill() -> int:
            try:
                with started(port) as client:
                    return client.get("/readyz").status_code
            finally:
                engine.dead = True

        with ThreadPoolExecutor() as pool:
            killer = pool.submit(kill)
            assert run(settings(port=port, engine_check_interval_s=0.02), start) == 1
            assert killer.result() == 200
        assert engine.closed

    def test_sigterm_finishes_what_is_running_and_ends_with_0(
        self, settings: Any, backend: Backend, engine: Any
    ) -> None:
        port = free_port()
        engine.script("slow", pieces=("a",) * 10, pause_s=0.05)

        async def start(_: Settings) -> Backend:
            return backend

        def ask() -> list[str]:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "slow"}], "stream": True}
            try:
                with (
                    started(port) as client,
                    client.stream("POST", "/v1/chat/completions", json=body) as response,
                ):
                    lines = response.iter_lines()
                    first = next(lines)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return [first, *lines]
            except BaseException:
                os.kill(os.getpid(), signal.SIGTERM)
                raise

        with ThreadPoolExecutor() as pool:
            asker = pool.submit(ask)
            with pytest.raises(SystemExit) as ended:
                run(settings(port=port, shutdown_delay_s=0), start)
            answers = asker.result()
        assert ended.value.code == 0
        assert answers[-2:] == ["data: [DONE]", ""]
        assert sum('"content":"a"' in line for line in answers) == 10
        assert engine.closed

    @pytest.mark.parametrize(
        "failure", [EngineError("no memory"), IdentityMismatch("dtype differs"), Refused("alpha", None)]
    )
    def test_what_fails_at_start_is_one_message(
        self, settings: Any, failure: Exception, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async def start(_: Settings) -> Backend:
            raise failure

        assert run(settings(port=0), start) == 1
        assert capsys.readouterr().err == f"candor: {failure}\n"

    def test_a_taken_port_is_known_before_the_engine_starts(
        self, settings: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async def start(_: Settings) -> Backend:
            raise AssertionError("too late")

        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert run(settings(port=port), start) == 1
        assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err

    def test_somebody_else_listens_by_then(
        self, settings: Any, backend: Backend, engine: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Both bound the port before either listened; the engine that was started is closed."""
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", 0))

            async def start(_: Settings) -> Backend:
                other.listen()
                return backend

            assert run(settings(port=other.getsockname()[1]), start) == 1
        assert "cannot listen" in capsys.readouterr().err
        assert engine.closed

    def test_an_engine_with_other_states_is_not_served(
        self, settings: Any, backend: Backend, engine: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async def start(_: Settings) -> Backend:
            return backend

        engine.known.update({prompt: -h for prompt, h in engine.known.items()})
        assert run(settings(port=0), start) == 1
        assert "does not give the states that were calibrated" in capsys.readouterr().err
        assert engine.closed

    def test_an_engine_that_does_not_answer_is_not_served(
        self, settings: Any, backend: Backend, engine: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async def start(_: Settings) -> Backend:
            return backend

        engine.script("prompt", pieces=(), hangs=True)
        assert run(settings(port=0, engine_stall_timeout_s=0.1), start) == 1
        assert "CANDOR_ENGINE_STALL_TIMEOUT_S" in capsys.readouterr().err
        assert engine.closed

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
    def test_without_keys_only_this_machine_is_listened_to(
        self, settings: Any, host: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async def start(_: Settings) -> Backend:
            raise AssertionError("too late")

        assert run(settings(host=host, port=0), start) == 1
        message = capsys.readouterr().err
        assert "without API keys" in message
        assert "candor key" in message

    @pytest.mark.parametrize("wanted", [{"keys": True}, {"open_to_all": True}])
    def test_with_keys_or_on_purpose_it_may_listen_elsewhere(
        self, settings: Any, wanted: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        from candor.app.edge.keys import make_key

        if "keys" in wanted:
            wanted = {"keys": tmp_path / "keys"}
            wanted["keys"].write_text(make_key("alice", ["answer"])[1].line())

        async def start(_: Settings) -> Backend:
            raise EngineError("so far, and no further")

        with caplog.at_level("INFO"):
            assert run(settings(host="0.0.0.0", port=0, **wanted), start) == 1
        assert ("keys of alice" in caplog.text) is ("keys" in wanted)
        assert ("no API keys: whoever reaches 0.0.0.0 may ask" in caplog.text) is ("keys" not in wanted)

    def test_it_says_that_it_has_no_keys(self, settings: Any, caplog: pytest.LogCaptureFixture) -> None:
        async def start(_: Settings) -> Backend:
            raise EngineError("so far, and no further")

        with caplog.at_level("INFO"):
            run(settings(port=0), start)
        assert "no API keys: listening on 127.0.0.1 alone" in caplog.text

    @pytest.mark.parametrize(
        "given", [{"keys": Path("none")}, {"tls_certificate": "none", "tls_key": "none"}]
    )
    def test_a_file_that_is_missing_is_known_before_the_engine_starts(
        self, settings: Any, given: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        async def start(_: Settings) -> Backend:
            raise AssertionError("too late")

        assert run(settings(port=0, **given), start) == 1
        assert capsys.readouterr().err.startswith("candor: cannot ")

    def test_a_key_with_a_passphrase_is_refused_and_nobody_asked(
        self, settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
        made = "openssl req -x509 -newkey rsa:2048 -days 1 -subj /CN=localhost -passout pass:secret"
        files = ["-keyout", str(key), "-out", str(certificate)]
        subprocess.run([*made.split(), *files], check=True, capture_output=True)

        async def start(_: Settings) -> Backend:
            raise AssertionError("too late")

        assert run(settings(port=0, tls_certificate=certificate, tls_key=key), start) == 1
        assert "the TLS key has a passphrase" in capsys.readouterr().err

    @pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
    def test_one_address_for_both_protocols(self, settings: Any, backend: Backend, engine: Any) -> None:
        """`::` is what the image listens on: a pod may have IPv4, IPv6 or both."""
        port = free_port()

        async def start(_: Settings) -> Backend:
            return backend

        def ask() -> list[int]:
            try:
                with started(port) as client:
                    six = httpx.get(f"http://[::1]:{port}/readyz", timeout=30)
                    return [client.get("/readyz").status_code, six.status_code]
            finally:
                engine.dead = True

        with ThreadPoolExecutor() as pool:
            asker = pool.submit(ask)
            run(settings(port=port, host="::", open_to_all=True, engine_check_interval_s=0.02), start)
            assert asker.result() == [200, 200]

    def test_https(self, settings: Any, backend: Backend, engine: Any, tmp_path: Path) -> None:
        port = free_port()
        certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
        made = (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=localhost"
        )
        files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
        subprocess.run([*made.split(), *files], check=True, capture_output=True)
        trusting = ssl.create_default_context(cafile=certificate)

        async def start(_: Settings) -> Backend:
            return backend

        def ask() -> dict[str, str]:
            try:
                with started(port, verify=trusting, scheme="https") as client:
                    with pytest.raises(httpx.RemoteProtocolError):
                        httpx.get(f"http://127.0.0.1:{port}/livez")
                    return dict(client.get("/livez").json())
            finally:
                engine.dead = True

        with ThreadPoolExecutor() as pool:
            asker = pool.submit(ask)
            run(
                settings(port=port, tls_certificate=certificate, tls_key=key, engine_check_interval_s=0.02),
                start,
            )
            assert asker.result() == {"status": "ok"}

    def test_an_alpha_the_bundle_does_not_have(
        self, settings: Any, backend: Backend, engine: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async def start(_: Settings) -> Backend:
            await asyncio.sleep(0)
            return backend

        assert run(settings(port=0, alpha=0.97), start) == 1
        assert "CANDOR_ALPHA: expected an alpha the bundle was calibrated at (0.9, 0.95), got 0.97" in (
            capsys.readouterr().err
        )
        assert engine.closed


@pytest.mark.parametrize(
    ("ratios", "warns"), [({"0.9": 1.0, "0.95": 1.0}, True), ({"0.9": 0.99, "0.95": 1.0}, False)]
)
def test_a_bundle_that_always_abstained_is_said_at_start(
    bundle: Bundle,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ratios: dict[str, float],
    warns: bool,
) -> None:
    one = replace(bundle, report={"reference_abstention_ratio": ratios})
    monkeypatch.setattr("candor.app.process.backend.load_signed", lambda *_: one)
    _load(Path("bundle"), settings())
    assert ("expect every answer to be abstained from" in caplog.text) is warns
