"""Manifests from untrusted sources: any malformed one is refused, and no file outside OUT is read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run.manifest import MANIFEST, read_manifest
from mergeloom.engine.run.verify import verify
from mergeloom.errors import CheckpointError, UsageError
from mergeloom.io.output.lock import WORK
from tests.support.merges.verified import Merge, forge, make_merge
from tests.support.waiting import no_hang


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished merge with all digests, not to be changed: computed and copied tensors, two shards, companions."""
    directory = tmp_path_factory.mktemp("verify")
    return make_merge(directory).run(directory / "out", digests=True)


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    """A copy of the finished merge."""
    return Path(shutil.copytree(merged, tmp_path / "out"))


@pytest.fixture
def finished(tmp_path: Path) -> Merge:
    """A merge whose sources may be changed; its OUT, next to them, has no digests of what the kernel copied."""
    made = make_merge(tmp_path)
    made.run(tmp_path / "out")
    return made


# ------------------------------------------------------------------------------------------------ hostile manifests


def set_path(*keys: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return change


PARTS = ("shards", "files", "tensors", "sources", "models")
ORIGINS: list[Any] = [
    {"model": model, "file": file, "offset": offset}
    for model, file, offset in ((99, "a", 0), (0, "../a", 0), (0, "a", -1), (0, "a", 10**30), ("0", "a", 0), (0, 1, 0))
]
ORIGINS.append({"model": 0, "file": "a", "offset": 0, "copied": 1})
SOURCES = [("99", {}), ("x", {}), ("-1", {}), ("0", []), ("9" * 5000, {}), ("0", {"../a": "b"})]


@pytest.mark.parametrize(
    "change",
    [
        *(set_path(part, to=value) for part in PARTS for value in (None, 1, "a", [1], [[]])),
        *(
            set_path("shards", name, to=[1, "a"])
            for name in ("../a", "/dev/zero", "", "a/../../b", "\0", f"{WORK}/pid")
        ),
        *(set_path("files", name, to="a") for name in ("../a", "/dev/zero", "")),
        *(set_path("shards", "a", to=value) for value in (1, [1], ["1", "a"], [True, "a"], [1, 1], [1.5, "a"])),
        *(set_path("tensors", "x", to=value) for value in (1, None, {}, *ORIGINS)),
        *(set_path("sources", number, to=value) for number, value in SOURCES),
        set_path("models", to=[1]),
    ],
)
def test_a_manifest_that_is_not_as_ours_is_refused(change: Callable[[dict[str, Any]], None], out: Path) -> None:
    forge(out, change)
    with pytest.raises(CheckpointError, match="has an invalid structure"):
        read_manifest(out)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"[" * 100_000, b'{"digest": 1e999}', b"\xff", b"1" * 10_000])
def test_what_is_no_manifest_is_refused(content: bytes, out: Path) -> None:
    (out / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(out)


def test_a_manifest_is_a_file_of_bounded_size(out: Path, tmp_path: Path) -> None:
    (out / MANIFEST).unlink()
    (out / MANIFEST).symlink_to("/dev/zero")
    with pytest.raises(UsageError, match="is not empty"):
        read_manifest(out)
    (out / MANIFEST).unlink()
    with (out / MANIFEST).open("wb") as stream:
        stream.truncate(200 << 30)
    with pytest.raises(CheckpointError, match="is larger than"):
        read_manifest(out)
    (out / MANIFEST).unlink()
    os.mkfifo(out / MANIFEST)
    with pytest.raises(UsageError, match="is not empty"):
        read_manifest(out)


def test_what_a_manifest_names_is_not_read_where_it_is_no_file(out: Path) -> None:
    """A device, a pipe or a directory in the place of a file ends nothing and hangs nothing."""
    (out / "pipe").parent.mkdir(exist_ok=True)
    os.mkfifo(out / "pipe")
    (out / "shard").symlink_to("/dev/zero")

    def change(content: dict[str, Any]) -> None:
        content["files"]["pipe"] = content["files"]["chat"] = "00"
        content["shards"]["shard"] = [100, "00"]
        content["shards"]["pipe"] = [100, "00"]
        content["tensors"]["x"] = {"model": 0, "file": "pipe", "offset": 0}

    (out / "chat").mkdir()
    forge(out, change)
    with no_hang():
        verdict = verify(out, sources=True)
    assert {"pipe: is missing", "chat: is missing"} <= set(verdict.damaged)
    assert any("tensor x is missing" in problem for problem in verdict.damaged)
