"""Killed between any two system calls, cut off from power, out of space: going on makes the same bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Plan
from mergeloom.errors import DiskSpaceError, EnvironmentFailure, MergeloomError
from mergeloom.io.output.lock import WORK
from tests.support.faults import Disk, Fail, Kill, Stopped, watching
from tests.support.merges.small import GROUP, make_blocks_small, make_plan
from tests.support.outputs import digests


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A merge with computed and copied tensors, several shards, and tensors of several pieces and blocks."""
    return make_plan(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def expected(small_blocks: None, planned: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of all files of the merge when nothing goes wrong."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(planned, out)
    return digests(out)


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Digest blocks of 16 KiB and chunks of 4 KiB: small tensors have several."""
    with pytest.MonkeyPatch.context() as patch:
        make_blocks_small(patch)
        yield


def run(planned: Plan, out: Path) -> None:
    """Merge."""
    merge(planned, out, group_bytes=GROUP)


def stopped(planned: Plan, out: Path, watch: Callable[..., None]) -> bool:
    """Merge until it is stopped; whether it was."""
    with watching(watch):
        try:
            run(planned, out)
        except Stopped:
            return True
    return False


def points(planned: Plan, out: Path) -> int:
    """Number of calls that change files during an uninterrupted merge."""
    kill = Kill()
    assert not stopped(planned, out, kill)
    return len(kill.calls)


def every(count: int, step: int, seed: int) -> Iterator[int]:
    """One number of each `step` below `count`."""
    chance = random.Random(seed)
    for first in range(0, count, step):
        yield min(first + chance.randrange(step), count - 1)


@pytest.mark.parametrize("torn", [False, True])
def test_killed_between_any_two_calls(planned: Plan, expected: dict[str, str], tmp_path: Path, torn: bool) -> None:
    for point in every(points(planned, tmp_path / "whole"), 2, seed=torn):
        out = tmp_path / f"out{point}"
        stopped(planned, out, Kill(point, torn=torn))
        run(planned, out)
        assert digests(out) == expected, point


def test_killed_again_and_again(planned: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    chance = random.Random(0)
    kills = 0
    for number in range(10):
        out = tmp_path / f"out{number}"
        while stopped(planned, out, Kill(chance.randrange(20, 120), torn=True)):
            kills += 1
        assert digests(out) == expected
    assert kills > 10


def test_every_change_goes_by_the_watch(planned: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    assert not stopped(planned, tmp_path / "out", disk)
    found = {path: None if path.is_dir() else path.read_bytes() for path in tmp_path.rglob("*")}
    assert disk.content() == found


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_power_fails_at_any_point(planned: Plan, expected: dict[str, str], tmp_path: Path, share: float) -> None:
    count = points(planned, tmp_path / "whole")
    for point in every(count, 3, seed=int(share * 2)):
        power_fails(planned, tmp_path / f"root{point}", [point], share, expected)


def test_power_fails_again_and_again(planned: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    chance = random.Random(1)
    for number in range(4):
        power_fails(planned, tmp_path / f"root{number}", [chance.randrange(10, 150) for _ in range(4)], 0.5, expected)


def power_fails(planned: Plan, root: Path, after: list[int], share: float, expected: dict[str, str]) -> None:
    """Let the power fail once after each of these numbers of calls, and then let the merge be finished."""
    root.mkdir()
    chance = random.Random(str((after, share)))
    for point in after:
        disk = Disk(root, point)
        if not stopped(planned, root / "deep" / "out", disk):
            break
        disk.lose(chance, share)
    run(planned, root / "deep" / "out")
    assert digests(root / "deep" / "out") == expected, after


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("ending", [".safetensors", "journal", "journal.new", "README.md", "mergeloom.json"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_is_said_and_gone_on_from(
    planned: Plan, expected: dict[str, str], tmp_path: Path, number: int, ending: str, partly: bool
) -> None:
    out = tmp_path / "out"
    fail = Fail(number, {".safetensors": 9, "journal": 1}.get(ending, 0), "write", ending=ending, partly=partly)
    with watching(fail), pytest.raises(MergeloomError, match=str(out)) as failed:
        run(planned, out)
    assert failed.value.exit_code == (5 if number == errno.EIO else 3)
    assert "run the same command again" in str(failed.value)
    run(planned, out)
    assert digests(out) == expected


@pytest.mark.parametrize("call", ["create", "truncate", "sync", "sync_directory", "rename", "remove", "make_directory"])
def test_any_call_may_fail(planned: Plan, expected: dict[str, str], tmp_path: Path, call: str) -> None:
    at = 0
    while True:
        out = tmp_path / f"out{at}"
        fail = Fail(errno.EIO, at, call)
        with watching(fail), contextlib.suppress(EnvironmentFailure):
            run(planned, out)
        run(planned, out)
        assert digests(out) == expected, at
        if fail.seen <= at:
            return
        at += 1 if call in ("rename", "remove", "make_directory") else 5


def test_a_record_after_a_torn_one_is_not_lost(planned: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    """After a failed append, nothing may be appended behind the torn record."""
    out = tmp_path / "out"
    with watching(Fail(errno.ENOSPC, 2, "write", ending="journal", partly=True)), pytest.raises(DiskSpaceError):
        run(planned, out)
    stopped(planned, out, Kill(60))
    run(planned, out)
    assert digests(out) == expected


def test_reads_that_fail_or_are_short(
    planned: Plan, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergeloom.io import reading

    read_at, calls = reading.read_at, 0

    def fail(descriptor: int, buffer: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_at(descriptor, buffer[: max(1, len(buffer) // 3)], offset)

    monkeypatch.setattr(reading, "read_at", fail)
    monkeypatch.setattr("mergeloom.engine.run.session.with_reflinks", lambda planned, *arguments, **options: planned)
    with pytest.raises(EnvironmentFailure, match=r"reading \d+ bytes at \d+ failed: Input/output error.*again"):
        run(planned, tmp_path / "out")
    run(planned, tmp_path / "out")
    assert {name for name in expected if digests(tmp_path / "out")[name] != expected[name]} <= {"mergeloom.json"}


def test_short_writes(planned: Plan, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: max(1, len(data) // 2)], offset))
    run(planned, tmp_path / "out")
    assert digests(tmp_path / "out") == expected


# ------------------------------------------------------------------------------------------------ a full disk


@pytest.mark.root
@pytest.mark.parametrize("kind", ["tmpfs", "tmpfs without fallocate"])
def test_a_full_disk_is_said_and_after_making_room_it_goes_on(
    planned: Plan, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    if "without" in kind:
        monkeypatch.setattr("mergeloom.io.platform.DISABLED", {"fallocate"})
    try:
        out, ballast = disk / "out", disk / "ballast"
        ballast.write_bytes(bytes(950_000))
        with pytest.raises(DiskSpaceError, match="make room") as refused:  # it is seen before anything is written
            run(planned, out)
        assert refused.value.exit_code == 3
        assert not out.exists()
        ballast.unlink()
        full = Fill(ballast, 16)
        with watching(full), pytest.raises(DiskSpaceError, match=r"o space left.*run the same command again"):
            run(planned, out)
        assert (out / WORK / "journal").exists()
        ballast.unlink()
        run(planned, out)
        assert {name for name in expected if digests(out)[name] != expected[name]} <= {"mergeloom.json"}
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


class Fill:
    """Fills the disk with a file before one of the writes."""

    def __init__(self, ballast: Path, write: int) -> None:
        self._ballast = ballast
        self._left = write

    def __call__(self, call: str, *arguments: object) -> None:
        if call in ("write", "copy"):
            self._left -= 1
            if self._left == 0:
                with self._ballast.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
                    while True:
                        stream.write(bytes(4096))


def test_a_changed_plan_is_refused_with_the_difference(planned: Plan, tmp_path: Path) -> None:
    """A test of its own for each kind of difference is in test_resume."""
    stopped(planned, tmp_path / "out", Kill(60))
    other = replace(planned, options=replace(planned.options, seed=5))
    with pytest.raises(MergeloomError, match="the seed: it was 0, and is 5"):
        run(other, tmp_path / "out")
