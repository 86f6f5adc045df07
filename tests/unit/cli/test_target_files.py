"""Files that the user names for mergeloom to write: nothing of the user's is overwritten, whichever option names it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mergeloom import __main__
from mergeloom.cli import target_files
from mergeloom.cli.target_files import TargetFile
from mergeloom.errors import EnvironmentFailure, UsageError
from tests.conftest import MakeModel
from tests.support.outputs import digests

OLD_REPORT = (
    '{\n  "output": {\n    "tensors": 39,\n    "parameters": 1000,\n    "bytes": 2000,\n    "layers": 4\n  }\n}\n'
)
OLD_PAGE = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=1">\n'
    '<meta name="generator" content="mergeloom 0.1.0">\n<title>x</title>'
)
FOREIGN = {
    "recipe": b"merge_method: linear\n",
    "empty": b"",
    "another page": b'<!doctype html>\n<html lang="en">\n<head>\n<meta name="generator" content="other">\n',
    "a page about ours": b'<!doctype html>\n<html lang="en">\n</head>\n<meta name="generator" content="mergeloom 1">',
    "other JSON": b'{\n  "output": {\n    "path": 1\n  }\n}\n',
    "a manifest": b'{\n "mergeloom": "0.1.0",\n "recipe": ""\n}\n',
    "a report further down": b"\n# notes\n" + OLD_REPORT.encode(),
}


@pytest.fixture
def recipe(make_model: MakeModel, tmp_path: Path) -> Path:
    """A recipe that copies a model."""
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": str(make_model())}]}))
    return path


def commands(recipe: Path, tmp_path: Path, target: object) -> Iterator[list[str]]:
    """Every command that writes a file that the user names."""
    yield ["merge", str(recipe), str(tmp_path / "out"), "--quiet", "--report", str(target)]
    yield ["plan", str(recipe), "--html", str(target)]


@pytest.mark.parametrize("what", ["shard", "config.json", "recipe.yml"])
@pytest.mark.parametrize("linked", [False, True])
def test_no_input_is_overwritten(
    what: str, linked: bool, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"shard": "model/model.safetensors", "config.json": "model/config.json", "recipe.yml": "recipe.yml"}
    target = tmp_path / names[what]
    if linked:
        (tmp_path / "link").symlink_to(target)
    before = digests(tmp_path)
    for command in commands(recipe, tmp_path, tmp_path / "link" if linked else target):
        assert __main__.main(command) == 2
        assert f"{command[-2]} {command[-1]}: exists, and is not a report or a page" in capsys.readouterr().err
    assert digests(tmp_path) == before  # no OUT either: it was found out before the work


@pytest.mark.parametrize("kind", sorted(FOREIGN))
def test_a_file_that_does_not_begin_like_ours_is_kept(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(FOREIGN[kind])
    with pytest.raises(UsageError, match="exists, and is not a report or a page of mergeloom's"):
        TargetFile("--report", str(target))
    assert target.read_bytes() == FOREIGN[kind]


@pytest.mark.parametrize("kind", ["a directory", "a socket", "a device", "a dangling link", "a loop", "below a file"])
def test_what_is_not_a_file_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    said = "is a device or a socket"
    if kind == "a directory":
        target.mkdir()
        said = "is a directory"
    elif kind == "a socket":
        monkeypatch.chdir(tmp_path)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("target")
    elif kind == "a device":
        target = Path("/dev/zero")
    elif kind == "below a file":
        (tmp_path / "target").write_text("")
        target, said = target / "file", "can't be looked up|there is no directory"
    else:
        target.symlink_to("target" if kind == "a loop" else "nowhere")
        said = "can't be looked up" if kind == "a loop" else "is a broken link"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=f"--html {target}: ({said})"):
        TargetFile("--html", str(target))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("content", [OLD_REPORT, OLD_PAGE])
@pytest.mark.parametrize("linked", [False, True])
def test_those_of_earlier_versions_are_replaced(content: str, linked: bool, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text(content)
    target.chmod(0o640)
    inode = target.stat().st_ino
    named = tmp_path / "link" if linked else target
    if linked:
        named.symlink_to("file")
    TargetFile("--report", str(named)).write("new")
    assert target.read_text() == "new"
    assert named.is_symlink() == linked
    assert target.stat().st_mode & 0o777 == 0o640
    assert target.stat().st_ino != inode  # renamed, not written over
    assert {path.name for path in tmp_path.iterdir()} == {"file", named.name}


def test_what_the_commands_write_is_recognised_as_ours(recipe: Path, tmp_path: Path) -> None:
    for target in ("report.json", "page.html"):
        for _ in range(2):
            index = 0 if target == "report.json" else 1
            assert __main__.main(list(commands(recipe, tmp_path, tmp_path / target))[index]) == 0
    assert "measured" in json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "page.html").read_text().endswith("</html>\n")
    # and each may take the other's place
    assert __main__.main(["plan", str(recipe), "--html", str(tmp_path / "report.json")]) == 0


def test_a_file_that_appears_during_the_work_is_kept(tmp_path: Path) -> None:
    target = TargetFile("--report", str(tmp_path / "file"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EnvironmentFailure, match="exists, and is not a report.*; the merge is done"):
        target.write("new", "; the merge is done")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text(OLD_REPORT)

    def full(descriptor: int, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(target_files, "_write_all", full)
    with pytest.raises(EnvironmentFailure, match="can't be written .No space left on device"):
        TargetFile("--report", str(file)).write("new")
    assert file.read_text() == OLD_REPORT
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_named_pipe_is_written_to(recipe: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for number, command in enumerate(commands(recipe, tmp_path, pipe)):
        read: list[bytes] = []
        reader = threading.Thread(target=lambda found=read: found.append(pipe.read_bytes()), daemon=True)
        reader.start()
        assert __main__.main(command) == 0
        reader.join(30)
        assert read[0].startswith(b'{\n  "output"' if number == 0 else b"<!doctype html>")
    assert pipe.is_fifo()


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("to_file", [False, True])
def test_standard_output_is_written_to(path: str, to_file: bool, recipe: Path, tmp_path: Path) -> None:
    """A pipe, and a file with something in it: it is added to, as the shell's >> asks for."""
    command = [sys.executable, "-m", "mergeloom", "merge", str(recipe), str(tmp_path / "out"), "--quiet", "--report"]
    if to_file:
        (tmp_path / "log").write_text("before\n")
        with (tmp_path / "log").open("a") as stream:
            subprocess.run([*command, path], check=True, stdout=stream)
        text = (tmp_path / "log").read_text()
        assert text.startswith("before\n")
        text = text.removeprefix("before\n")
    else:
        text = subprocess.run([*command, path], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "measured" in json.loads(text)


def test_a_place_without_a_directory_is_refused_before_the_work(recipe: Path, tmp_path: Path) -> None:
    for command in commands(recipe, tmp_path, tmp_path / "nowhere" / "file"):
        assert __main__.main(command) == 2
    assert not (tmp_path / "out").exists()
