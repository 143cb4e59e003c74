"""What is installed is one package, `candor`, with every room in it; what stands beside the rooms stays out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_holds_every_room_and_nothing_else(tmp_path: Path) -> None:
    rooms = [link.name for link in (ROOT / "candor").iterdir() if link.is_symlink()]
    source = tmp_path / "source"  # a copy: what an earlier build left in build/ would be packed again
    for folder in ("candor", "demo", "benchmarks", *rooms):
        skipped = ignore_patterns("__pycache__", "bundle", "adapter")
        copytree(ROOT / folder, source / folder, symlinks=True, ignore=skipped)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        copy2(ROOT / file, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = ZipFile(wheel).namelist()

    assert {name.split("/")[0].partition("-")[0] for name in names} == {"candor"}
    packed = {name for name in names if name.startswith("candor/")}
    expected = {
        f"candor/{path.relative_to(source)}"
        for room in rooms
        for path in (source / room).rglob("*")
        if path.is_file()
    }
    own = {f"candor/{path.name}" for path in (source / "candor").iterdir() if path.is_file()}
    assert own >= {"candor/__init__.py", "candor/py.typed"}
    assert packed == own | expected
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
