"""Each fallback for a missing system call gives the same result."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.io import platform
from mergeloom.io.platform import (
    Mount,
    clone_range,
    copy_range,
    expect_sequential,
    file_system,
    forget_cached,
    mount_of,
    read_at,
    reserve_space,
    start_writeback,
    sync_directory,
    write_at,
)
from tests.conftest import MakeModel
from tests.support.models import tiny_llama
from tests.support.outputs import digests

CALLS = ("preadv", "fallocate", "fadvise", "sync_file_range", "clone", "copy_file_range")
DATA = bytes(range(256)) * 40


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """A file of some bytes, open for reading and writing."""
    (tmp_path / "file").write_bytes(DATA)
    found = os.open(tmp_path / "file", os.O_RDWR)
    yield found
    os.close(found)


@pytest.fixture(params=[(), CALLS], ids=["calls", "fallbacks"])
def disabled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The calls that are switched off."""
    found = set(request.param)
    monkeypatch.setattr(platform, "DISABLED", found)
    return found


def test_reading(descriptor: int, disabled: set[str]) -> None:
    buffer = bytearray(b"\xff" * 300)
    assert read_at(descriptor, memoryview(buffer)[:200], 100) == 200
    assert bytes(buffer) == DATA[100:300] + b"\xff" * 100
    assert read_at(descriptor, memoryview(buffer), len(DATA) - 10) == 10
    assert bytes(buffer[:10]) == DATA[-10:]
    assert read_at(descriptor, memoryview(buffer), len(DATA)) == 0


def test_writing(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    write_at(descriptor, b"x" * 100, 50)
    write_at(descriptor, memoryview(b"y" * 10), len(DATA) - 5)
    write_at(descriptor, b"", 0)
    assert os.pread(descriptor, 1 << 20, 0) == DATA[:50] + b"x" * 100 + DATA[150:-5] + b"y" * 10


def test_reserving_changes_no_byte(descriptor: int, disabled: set[str]) -> None:
    assert reserve_space(descriptor, 0, 0)
    assert not (reserve_space(descriptor, 0, 1 << 20) and disabled)
    assert os.pread(descriptor, 1 << 20, 0) == DATA


def test_a_reservation_that_fails_is_an_error(tmp_path: Path) -> None:
    read_only = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            reserve_space(read_only, 0, 4096)
    finally:
        os.close(read_only)


def test_advice_changes_no_byte(descriptor: int, disabled: set[str], tmp_path: Path) -> None:
    expect_sequential(descriptor)
    write_at(descriptor, b"z" * 100, 0)
    start_writeback(descriptor, 0, 100)
    forget_cached(descriptor, 0, len(DATA))
    sync_directory(tmp_path)
    assert os.pread(descriptor, 1 << 20, 0) == b"z" * 100 + DATA[100:]


def test_the_kernel_copies_where_it_can(descriptor: int, disabled: set[str], tmp_path: Path) -> None:
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(target, 2 * len(DATA))
        copied = copy_range(descriptor, 10, target, 500, 1000)
        assert copied in ((0,) if disabled else (0, 1000))
        assert os.pread(target, copied, 500) == DATA[10 : 10 + copied]
        refused = clone_range(descriptor, 0, target, 4096, 4096)
        assert refused or not disabled
        assert os.pread(target, 4096, 4096) == (bytes(4096) if refused else DATA[:4096])
    finally:
        os.close(target)


def test_interrupted_calls_are_retried(descriptor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = {"copy": 3, "clone": 2}

    def interrupt(call: str) -> None:
        left[call] -= 1
        if left[call] >= 0:
            raise InterruptedError(errno.EINTR, "signal")

    original = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda *arguments: interrupt("copy") or original(*arguments))
    monkeypatch.setattr("fcntl.ioctl", lambda *arguments: interrupt("clone"))
    with (tmp_path / "target").open("wb") as target:
        assert copy_range(descriptor, 0, target.fileno(), 0, 100) == 100
        assert clone_range(descriptor, 0, target.fileno(), 0, 4096) == 0
    assert left == {"copy": -1, "clone": -1}


def test_a_path_is_found_in_its_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "\n".join(
        [
            "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw",
            "23 22 0:40 /sub /a\\040b rw - btrfs /dev/vdb rw",  # as the kernel writes a space
            "24 22 0:41 / /a\\040b/c rw master:2 - xfs /dev/vdc rw",
            "25 24 0:42 / /a\\040b/c rw - tmpfs tmpfs rw",  # mounted over it
            "26 22 0:43 / /ab rw - nfs4 server:/ rw",
        ]
    )
    monkeypatch.setattr(Path, "read_text", lambda path, **options: table)
    monkeypatch.setattr("os.path.exists", lambda path: True)
    found = {name: mount_of(Path(name)).kind for name in ("/x", "/a b", "/a b/x", "/a b/c/d", "/a bc", "/ab/c", "/a")}
    assert found == {
        "/x": "ext4",
        "/a b": "btrfs",
        "/a b/x": "btrfs",
        "/a b/c/d": "tmpfs",
        "/a bc": "ext4",
        "/ab/c": "nfs4",
        "/a": "ext4",
    }
    assert mount_of(Path("/a b/x")).device == "0:40"

    def missing(path: Path, **options: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert mount_of(Path("/x")) == Mount("", "", "")


def test_the_type_of_a_file_system() -> None:
    assert file_system(Path("/proc/self")) in ("proc", "")
    assert file_system(Path("/proc/nowhere/at/all")) in ("proc", "")


@pytest.mark.parametrize("without", [*CALLS, "all of them"])
def test_a_merge_is_the_same_without(
    without: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [
        make_model(name, tiny_llama(hidden=128), shard_bytes=300_000, fill=seed) for seed, name in enumerate("ab")
    ]
    slices = [
        {"sources": [{"model": str(model), "layer_range": part, "parameters": {"weight": 1}} for model in models]}
        for part in ([0, 3], [1, 4])
    ]
    copied = {"merge_method": "passthrough", "slices": [{"sources": part["sources"][:1]} for part in slices]}
    averaged = {"merge_method": "linear", "slices": slices}
    for name, recipe in (("copied", copied), ("averaged", averaged)):
        found, manifests = [], []
        for disabled in (set(), set(CALLS) if without == "all of them" else {without}):
            monkeypatch.setattr(platform, "DISABLED", disabled)
            out = tmp_path / f"{name}{len(disabled)}"
            merge(recipe, out, Options(device="cpu", threads=1, max_ram=1 << 30))
            found.append(digests(out))
            manifests.append(found[-1].pop("mergeloom.json"))
        assert found[0] == found[1]
        # the manifest says how each tensor is verified, which depends on the way that its bytes took
        assert manifests[0] == manifests[1] or (name == "copied" and without in ("copy_file_range", "all of them"))
