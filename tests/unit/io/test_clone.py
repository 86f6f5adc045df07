"""Ranges are copied by sharing blocks, by the kernel or by the process, with the same result."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mergeloom.io import platform
from mergeloom.io.output import clone
from mergeloom.io.output.clone import BLOCK, CopyStats, SharingRefused, move, refuses_to_share, shareable
from mergeloom.io.platform import copy_range, mount_of, scratch_file, why_no_clone
from tests.support.disks import file_system, used

SIZE = 40 * BLOCK + 123
RANGES = [
    (0, 0, SIZE),
    (8, 8, 3 * BLOCK),
    (5, 5 + BLOCK, 10 * BLOCK + 77),
    (BLOCK - 1, 2 * BLOCK - 1, 2),
    (BLOCK - 1, 2 * BLOCK - 1, BLOCK + 1),
    (BLOCK - 1, 2 * BLOCK - 1, BLOCK + 2),
    (3 * BLOCK, 0, 5 * BLOCK),
    (100, 103, 9 * BLOCK),
    (7, 7, 100),
    (0, 0, 0),
    (SIZE - BLOCK - 5, BLOCK - 5 + SIZE % BLOCK, BLOCK + 5),
]
"""Offsets in source and target, and sizes."""
REFUSALS = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC, errno.EPERM, errno.ETXTBSY)


@contextmanager
def opened(directory: Path, size: int = SIZE) -> Iterator[tuple[int, int]]:
    """A source of random bytes, open for reading only, and a target full of 0xEE, open for writing."""
    (directory / "source").write_bytes(np.random.default_rng(7).bytes(size))
    (directory / "target").write_bytes(b"\xee" * (size + 4 * BLOCK))
    source, target = os.open(directory / "source", os.O_RDONLY), os.open(directory / "target", os.O_RDWR)
    try:
        yield source, target
    finally:
        os.close(source)
        os.close(target)


def check(directory: Path, ranges: list[tuple[int, int, int]]) -> list[tuple[CopyStats, dict[int, int]]]:
    """Move ranges, one file pair each; what is in the range is the source's, what is around it is as it was.

    Returns what was moved of each range, and the bytes that could not be shared, by error number.
    """
    found = []
    for offset, place, nbytes in ranges:
        with opened(directory) as (source, target):
            before = (directory / "source").read_bytes()
            buffer, unshared = memoryview(bytearray(1000)), {}
            try:
                moved = move(source, offset, target, place, nbytes, buffer)
            except SharingRefused as refused:
                moved = move(source, offset, target, place, nbytes, buffer, share=False)
                unshared = {refused.number: refused.nbytes}
            assert moved.shared + moved.written == nbytes
            after = (directory / "target").read_bytes()
            assert after[place : place + nbytes] == before[offset : offset + nbytes]
            assert set(after[:place] + after[place + nbytes :]) <= {0xEE}
            assert len(after) == SIZE + 4 * BLOCK
            assert (directory / "source").read_bytes() == before
        found.append((moved, unshared))
    return found


# ------------------------------------------------------------------------------------------------ what can be shared


@given(st.integers(0, 10 * BLOCK), st.integers(0, 10 * BLOCK), st.integers(0, 20 * BLOCK))
@example(0, 0, BLOCK)
@example(1, BLOCK + 1, 2 * BLOCK - 2)
@example(1, BLOCK + 1, 2 * BLOCK - 1)
def test_complete_blocks_can_be_shared(source: int, target: int, nbytes: int) -> None:
    first, count = shareable(source, target, nbytes)
    assert 0 <= first <= first + count <= max(first, nbytes)
    assert count % BLOCK == 0
    blocks = range(-(-source // BLOCK), (source + nbytes) // BLOCK)  # those that lie completely in the range
    assert count == (len(blocks) * BLOCK if (source - target) % BLOCK == 0 else 0)
    if count:
        assert (source + first) % BLOCK == (target + first) % BLOCK == 0


# ------------------------------------------------------------------------------------------------ every way


@pytest.mark.parametrize("disabled", [set(), {"clone"}, {"clone", "copy_file_range"}, {"copy_file_range", "preadv"}])
def test_ranges_are_copied_on_any_file_system(
    tmp_path: Path, disabled: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "DISABLED", disabled)
    for moved, _ in check(tmp_path, RANGES):
        assert moved.kernel_copied == 0 or "copy_file_range" not in disabled
        assert moved.shared == 0 or "clone" not in disabled


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
@pytest.mark.parametrize("block", [1024, 4096])
def test_blocks_are_shared(tmp_path: Path, kind: str, block: int) -> None:
    if kind == "btrfs" and block != 4096:
        pytest.skip("has blocks of 4096 bytes at least")
    with file_system(tmp_path, kind, *(["-b", f"size={block}"] if kind == "xfs" else [])) as disk:
        for (offset, place, nbytes), (moved, unshared) in zip(RANGES, check(disk, RANGES), strict=True):
            assert moved.shared == shareable(offset, place, nbytes)[1]
            assert not unshared
        (disk / "target").unlink()
        size = 64 << 20
        with opened(disk, size) as (source, target):
            os.ftruncate(target, 0)
            os.ftruncate(target, size)
            before = used(disk)
            assert move(source, 0, target, 0, size, memoryview(b"")) == CopyStats(shared=size)
            assert used(disk) - before < size // 100
            assert mount_of(disk / "source").kind == kind
            assert not refuses_to_share(disk / "source", disk)


@pytest.mark.root
def test_a_file_system_with_larger_blocks_copies(tmp_path: Path) -> None:
    with file_system(tmp_path, "xfs", "-b", "size=16384") as disk:
        for (offset, place, nbytes), (moved, unshared) in zip(RANGES, check(disk, RANGES), strict=True):
            first, count = shareable(offset, place, nbytes)
            if count and any(value % 16384 for value in (offset + first, place + first, count)):
                assert unshared == {errno.EINVAL: count}
            else:
                assert moved.shared == count
        assert refuses_to_share(disk / "source", disk)


@pytest.mark.root
def test_probing_for_block_sharing_changes_nothing(tmp_path: Path) -> None:
    def answer(source: Path, directory: Path) -> int:
        descriptor, scratch = os.open(source, os.O_RDONLY), scratch_file(directory)
        assert scratch is not None
        try:
            return why_no_clone(descriptor, scratch)
        finally:
            assert os.fstat(scratch).st_size == 0
            os.close(scratch)
            os.close(descriptor)

    with (
        file_system(tmp_path / "1", "xfs") as shares,
        file_system(tmp_path / "2", "xfs", "-m", "reflink=0") as does_not,
    ):
        for disk in (shares, does_not):
            (disk / "source").write_bytes(bytes(SIZE))
        assert answer(shares / "source", shares) == 0
        assert answer(does_not / "source", does_not) == errno.EOPNOTSUPP
        assert answer(shares / "source", does_not) == answer(does_not / "source", shares) == errno.EXDEV
        assert [path.name for path in shares.iterdir()] == ["source"]


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("number", REFUSALS)
def test_refused_blocks_are_copied(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clone, "clone_range", lambda *arguments: number)
    for (offset, place, nbytes), (_, unshared) in zip(RANGES, check(tmp_path, RANGES), strict=True):
        wanted = shareable(offset, place, nbytes)[1]
        assert unshared == ({number: wanted} if wanted else {})
    with opened(tmp_path) as (source, target):
        with pytest.raises(SharingRefused) as refused:
            move(source, 0, target, 0, SIZE, memoryview(bytearray(9)), share=True)
        assert (refused.value.number, refused.value.nbytes) == (number, SIZE // BLOCK * BLOCK)
        assert set((tmp_path / "target").read_bytes()) == {0xEE}  # nothing was copied yet


def test_the_kernel_may_copy_less_than_asked_and_then_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter([10, 1, 5000, 0])

    def some(source: int, offset: int, target: int, place: int, nbytes: int) -> int:
        step = min(next(steps, 0), nbytes)
        return copy_range(source, offset, target, place, step) if step else 0

    monkeypatch.setattr(clone, "copy_range", some)
    monkeypatch.setattr(platform, "DISABLED", {"clone"})
    assert check(tmp_path, [(3, 5, SIZE - 3)]) == [(CopyStats(kernel_copied=5011, user_copied=SIZE - 3 - 5011), {})]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_or_broken_disk_is_an_error(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", fail)
    with opened(tmp_path) as (source, target), pytest.raises(OSError, match=os.strerror(number)):
        move(source, 0, target, 0, SIZE, memoryview(bytearray(9)), share=False)


@pytest.mark.parametrize("disabled", [set(), {"clone", "copy_file_range"}])
def test_a_source_that_ends_too_early(disabled: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "DISABLED", disabled)
    with opened(tmp_path) as (source, target), pytest.raises(EOFError) as ended:
        move(source, BLOCK, target, BLOCK, SIZE, memoryview(bytearray(1000)), share=False)
    assert ended.value.args == (SIZE,)


def test_refusals_to_share_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    assert refuses_to_share(tmp_path / "not there", tmp_path)
    assert refuses_to_share(tmp_path / "file", tmp_path / "not there")
    monkeypatch.setattr(clone, "clone_range", lambda *arguments: 0)
    assert not refuses_to_share(tmp_path / "file", tmp_path)
