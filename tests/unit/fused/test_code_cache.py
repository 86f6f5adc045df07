"""Compiled loops are kept in a directory that only the user can write, and any damage to it is harmless."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergeloom.methods.kernel.fused import code_cache, compiler

TEXT = """
define i32 @answer(ptr %table) {
  %value = load i32, ptr %table
  %more = add i32 %value, 1
  ret i32 %more
}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mergeloom" / "kernels"


def answer() -> int:
    """The result of a function that is compiled, or loaded from the cache, for 41."""
    import numpy as np

    compiler._loaded.clear()
    number = np.array([41], np.int32)
    return compiler.library(TEXT, ("answer",)).functions["answer"](number.ctypes.data)


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that are compiled from now on."""
    found: list[str] = []
    compiled = compiler.compiled

    def recorded(text: str, machine: object) -> bytes:
        found.append(text)
        return compiled(text, machine)

    monkeypatch.setattr(compiler, "compiled", recorded)
    return found


def test_code_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = compilations(monkeypatch)
    assert answer() == answer() == 42
    assert len(done) == len(list(folder.iterdir())) == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    assert next(folder.iterdir()).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", [b"", b"x", b"\0" * 3000])
def test_a_damaged_file_is_compiled_again(folder: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    answer()
    file = next(folder.iterdir())
    whole = file.read_bytes()
    for content in (damage, whole[:-1], whole[:100] + damage + whole[101:]):
        file.write_bytes(content)
        done = compilations(monkeypatch)
        assert answer() == 42
        assert len(done) == 1
        assert file.read_bytes() == whole


@pytest.mark.parametrize("mode", [0o770, 0o777])
def test_a_directory_that_others_can_write_is_not_used(
    folder: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer()
    folder.chmod(mode)
    done = compilations(monkeypatch)
    assert answer() == answer() == 42
    assert len(done) == 2


def test_a_file_that_others_can_write_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer()
    next(folder.iterdir()).chmod(0o666)
    done = compilations(monkeypatch)
    assert answer() == 42
    assert len(done) == 1


def test_what_belongs_to_somebody_else_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer()
    own = os.geteuid()
    done = compilations(monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert answer() == 42
    assert len(done) == 1


def test_a_link_is_not_followed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    done = compilations(monkeypatch)
    assert answer() == 42
    assert len(done) == 1


def test_a_directory_that_cannot_be_made_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert answer() == 42


@pytest.mark.parametrize("text", ["", "relative"])
def test_a_relative_cache_directory_is_ignored(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", text)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert code_cache.directory() == tmp_path / ".cache" / "mergeloom" / "kernels"


def test_the_oldest_files_are_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_cache, "MAX_FILES", 3)
    for number in range(5):
        code_cache.write(f"key{number}", b"code")
        os.utime(folder / f"key{number}", (number, number))
    assert sorted(file.name for file in folder.iterdir()) == ["key2", "key3", "key4"]
    assert code_cache.read("key2") == b"code"  # used now, so it is not the oldest any more
    code_cache.write("key5", b"code")
    assert sorted(file.name for file in folder.iterdir()) == ["key2", "key4", "key5"]


def test_processes_can_share_the_directory(folder: Path) -> None:
    code = (
        "import numpy as np; from mergeloom.methods.kernel.fused import compiler; import sys\n"
        "texts = [sys.argv[1].replace('add i32 %value, 1', f'add i32 %value, {n}') for n in range(8)]\n"
        "number = np.array([41], np.int32)\n"
        "found = [compiler.library(t, ('answer',)).functions['answer'](number.ctypes.data) for t in texts]\n"
        "assert found == list(range(41, 49)), found\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, TEXT]) for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert len(list(folder.iterdir())) == 8


def test_other_versions_and_processors_have_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = compiler.target_machine(*compiler.target())
    keys = {compiler.cache_key(TEXT, machine), compiler.cache_key(TEXT + " ", machine)}
    monkeypatch.setattr(compiler, "GENERATOR_VERSION", compiler.GENERATOR_VERSION + 1)
    keys.add(compiler.cache_key(TEXT, machine))
    monkeypatch.setattr(compiler, "target", lambda: ("another", ""))
    keys.add(compiler.cache_key(TEXT, machine))
    assert len(keys) == 4
