"""Reading through a pool of open files, which closes the least recently used one."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path

import pytest

from mergeloom.errors import CheckpointError, EnvironmentFailure
from mergeloom.io import platform, reading
from mergeloom.io.reading import FilePool, Reader, check_descriptors, pool_limit
from tests.support.outputs import open_files


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Ten files of 1000 bytes, each of its own number."""
    found = [tmp_path / str(number) for number in range(10)]
    for number, file in enumerate(found):
        file.write_bytes(bytes([number]) * 1000)
    return found


def test_the_least_recently_used_file_is_closed_first(files: list[Path], tmp_path: Path) -> None:
    with FilePool(limit=3) as pool:
        for number in (0, 1, 2, 0, 3):
            pool.release(pool.acquire(files[number]))
        assert open_files(tmp_path) == {"0", "2", "3"}
        pool.release(pool.acquire(files[1]))
        assert open_files(tmp_path) == {"0", "1", "3"}
    assert open_files(tmp_path) == set()


def test_a_file_in_use_is_never_closed(files: list[Path], tmp_path: Path) -> None:
    with FilePool(limit=1) as pool:
        held = [pool.acquire(file) for file in files[:4]]
        assert pool.acquire(files[2]) == held[2]
        assert len(set(held)) == 4
        assert open_files(tmp_path) == {"0", "1", "2", "3"}
        pool.release(held[2])
        assert "2" in open_files(tmp_path)  # its other user has it still
        for descriptor in (*held[:3], held[3]):
            pool.release(descriptor)
        assert open_files(tmp_path) == {"3"}
        assert os.pread(pool.acquire(files[0]), 1, 0) == b"\0"


@pytest.mark.parametrize("limit", [0, 1, 2, 9])
def test_threads_read_the_right_bytes_whatever_the_limit(files: list[Path], limit: int, tmp_path: Path) -> None:
    reader = Reader(limit=limit)
    wrong: list[object] = []

    def read(seed: int) -> None:
        buffer = bytearray(700)
        for step in range(200):
            number = (seed * 7 + step * 3) % len(files)
            reader.read(files[number], step, memoryview(buffer))
            if set(buffer) != {number}:
                wrong.append((number, set(buffer)))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(open_files(tmp_path)) <= limit
    reader.close()
    assert not open_files(tmp_path)


def test_short_reads_are_continued(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def few(descriptor: int, buffer: memoryview, offset: int) -> int:
        return platform.read_at(descriptor, buffer[:7], offset)

    monkeypatch.setattr(reading, "read_at", few)
    buffer = bytearray(1000)
    Reader().read(files[3], 0, memoryview(buffer))
    assert bytes(buffer) == files[3].read_bytes()


def raise_too_many_files(*arguments: object) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_errors_name_the_file_and_the_reason(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader()
    with pytest.raises(CheckpointError, match=r"ends at byte 1000, before the end of a tensor"):
        reader.read(files[0], 900, memoryview(bytearray(200)))
    with pytest.raises(CheckpointError, match=r"gone: there is no such file \(No such file.*put the file back"):
        reader.read(tmp_path / "gone", 0, memoryview(bytearray(1)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", raise_too_many_files)
        with pytest.raises(EnvironmentFailure, match="can't be read .Too many open files"):
            reader.read(files[2], 0, memoryview(bytearray(1)))

    def fail(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reading, "read_at", fail)
    with pytest.raises(EnvironmentFailure, match=r"reading 10 bytes at 5 failed: Input/output error; check the disk"):
        reader.read(files[1], 5, memoryview(bytearray(10)))
    reader.close()


def test_an_empty_read(files: list[Path]) -> None:
    Reader().read(files[0], 1000, memoryview(b""))


def test_data_can_be_dropped_from_the_page_cache(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = []
    monkeypatch.setattr(reading, "forget_cached", lambda descriptor, offset, nbytes: dropped.append((offset, nbytes)))
    for keep in (True, False):
        Reader(keep_cached=keep).read(files[0], 10, memoryview(bytearray(20)))
    assert dropped == [(10, 20)]


@pytest.mark.parametrize(
    ("limit", "most", "files"),
    [
        (1024, 256, 256),
        (1024, 128, 128),
        (100, 256, 20),
        (64, 128, 8),
        (40, 128, 2),
        (resource.RLIM_INFINITY, 256, 256),
    ],
)
def test_a_pool_leaves_descriptors_to_others(
    limit: int, most: int, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert pool_limit(most) == files


def test_a_low_limit_of_open_files_is_raised_if_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"now": (20, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.update(now=pair))
    check_descriptors()
    assert limits["now"] == (64, 4096)
    limits["now"] = (20, 32)
    with pytest.raises(EnvironmentFailure, match="ulimit -n allows 32 open files, and a merge needs 64"):
        check_descriptors()
