"""The Makefile changes no environment that it didn't create: `.venv` is also what users call their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the project's Makefile in another directory, which has only the files that the environment depends on."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, directory)
    command = ["make", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_an_environment_of_the_user_is_kept(tmp_path: Path) -> None:
    own = tmp_path / ".venv" / "pyvenv.cfg"
    own.parent.mkdir()
    own.write_text("home = /usr/bin\n")
    ended = make(tmp_path, "demo")
    assert ended.returncode == 2
    assert ".venv is an environment that make did not create: move it, or choose another one" in ended.stdout
    assert make(tmp_path, "clean").returncode == 0
    assert [file.name for file in own.parent.iterdir()] == ["pyvenv.cfg"]
    assert own.read_text() == "home = /usr/bin\n"


def test_an_environment_of_make_is_removed_by_clean(tmp_path: Path) -> None:
    for marker, name in (("ready", ".venv"), ("made-by-make", ".venv-dev")):
        (tmp_path / name).mkdir()
        (tmp_path / name / marker).touch()
        assert make(tmp_path, "clean", f"VENV={name}").returncode == 0
        assert not (tmp_path / name).exists()
