"""A release: wheel, source, bills of materials and the digests of all of them, signed.

    python requirements/release.py --key ~/.ssh/id_ed25519 [--out dist]
    python requirements/release.py --verify dist --signers allowed_signers

The signature is OpenSSH's (`ssh-keygen -Y sign`, namespace `candor-release`) over the file SHA256SUMS.
`allowed_signers` is OpenSSH's list of who may sign: `release@example.org ssh-ed25519 AAAA...`. Before it signs, the
release asks git whether anything is uncommitted, since the wheel is built from what lies in the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from sbom import bill, read_lock

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = "candor-release"
SUMS = "SHA256SUMS"
_LOCKS = {"cpu": ("cpu.txt", "cpu-torch.txt"), "cuda": ("cuda.txt",)}


class ReleaseError(Exception):
    """The release cannot be made or is not what was signed; the message says why."""


def make(out: Path, key: Path) -> None:
    """Builds into the empty folder `out` and signs. Raises ReleaseError."""
    if out.exists() and any(out.iterdir()):
        raise ReleaseError(f"{out} is not empty: give --out another folder")
    if changed := _run("git", "status", "--porcelain", "--untracked-files=no"):
        raise ReleaseError(f"commit these first, for they would be in the release:\n{changed}")
    commit_time = _run("git", "log", "-1", "--format=%ct").strip()
    # The same commit gives the same files.
    _run("uv", "build", "--no-build-isolation", "--out-dir", str(out), SOURCE_DATE_EPOCH=commit_time)
    for name, locks in _LOCKS.items():
        packages = [one for lock in locks for one in read_lock(ROOT / "requirements" / lock)]
        document = bill(version("candor"), packages)
        (out / f"candor-{name}.cdx.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (out / SUMS).write_text(_sums(out), encoding="utf-8")
    _run("ssh-keygen", "-Y", "sign", "-f", str(key), "-n", NAMESPACE, str(out / SUMS))


def verify(folder: Path, signers: Path) -> str:
    """Returns who signed the release. Raises ReleaseError if nobody of the signers did, or a file differs."""
    sums = folder / SUMS
    signature = str(sums.with_name(sums.name + ".sig"))
    found = _run("ssh-keygen", "-Y", "find-principals", "-s", signature, "-f", str(signers)).split()
    if not found:
        raise ReleaseError(f"none of {signers} has signed {sums}")
    text = sums.read_text(encoding="utf-8")
    who = ["-I", found[0], "-n", NAMESPACE, "-s", signature]
    _run("ssh-keygen", "-Y", "verify", "-f", str(signers), *who, stdin=text)
    if (now := _sums(folder)) != text:
        wrong = sorted(set(now.splitlines()) ^ set(text.splitlines()))
        raise ReleaseError("these differ from what was signed:\n" + "\n".join(wrong))
    return found[0]


def _sums(folder: Path) -> str:
    names = sorted(
        one.name for one in folder.iterdir() if one.is_file() and not one.name.startswith((SUMS, "."))
    )
    lines = (f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    return "".join(lines)


def _run(program: str, *arguments: str, stdin: str = "", **environment: str) -> str:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [program, *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": tools, **environment},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ReleaseError(
            f"{program} {' '.join(arguments[:2])} failed: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--key", type=Path, help="private SSH key that signs")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--verify", type=Path, metavar="FOLDER")
    parser.add_argument("--signers", type=Path, help="with --verify: OpenSSH's allowed signers")
    given = parser.parse_args()
    try:
        if given.verify and given.signers:
            print(
                f"signed by {verify(given.verify.resolve(), given.signers.resolve())}, and every file is as signed"
            )
        elif given.key:
            make(given.out.resolve(), given.key.expanduser().resolve())
            print(f"signed: {given.out}")
        else:
            parser.error("give --key, or --verify and --signers")
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
