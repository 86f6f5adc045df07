"""The disk space that a merge needs: shared and already written bytes are not counted again."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from mergeloom.errors import DiskSpaceError
from mergeloom.io import platform
from mergeloom.io.output import directory as output
from mergeloom.io.output.directory import OutputDirectory, ShardFile, missing_space
from mergeloom.io.output.journal import Journal
from mergeloom.io.safetensors.header import build_header
from mergeloom.io.tensors.dtypes import F32
from tests.support.merges.destinations import write_models, write_recipe


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Two models."""
    return write_models(tmp_path)


@pytest.fixture
def recipe(models: list[Path], tmp_path: Path) -> Path:
    """A recipe for the mean of two models."""
    return write_recipe(models, tmp_path)


def half_shared(nbytes: int = 1 << 20) -> ShardFile:
    """A shard of which the first half of the data shares blocks with an input."""
    header = build_header([("x", F32, (nbytes // 4,))], {"format": "pt"})
    return ShardFile("model.safetensors", header, len(header) + nbytes, ((len(header) + nbytes // 2, nbytes // 2),))


@pytest.mark.parametrize("reserves", [False, True])
def test_shared_bytes_are_counted_once_when_a_merge_is_resumed(
    reserves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a shared range count as the shard's own in st_blocks, as written ones do here."""
    if not reserves:
        monkeypatch.setattr(platform, "DISABLED", {"fallocate"})
    monkeypatch.setattr(output, "_IN_MEMORY", set())
    shard, half = half_shared(), 1 << 19
    first = OutputDirectory.open(tmp_path / "out")
    first.begin([shard], half)
    first.write(0, len(shard.header), memoryview(bytes([1]) * half))  # stands for sharing
    first.sync([0])
    Journal(first.lock.journal_path, {}).close()
    first.close()
    needed = missing_space(tmp_path / "out", [shard], half)
    slack = 16 << 10  # blocks that are not full
    assert needed <= slack if reserves else half - slack <= needed <= half + slack
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage._replace(free=half // 2))
    again = OutputDirectory.open(tmp_path / "out")
    if reserves:
        again.begin([shard], half)
    else:
        with pytest.raises(DiskSpaceError, match="make room"):
            again.begin([shard], half)
    again.close()


def test_what_was_written_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "DISABLED", {"fallocate"})
    shard, half = half_shared(), 1 << 19
    out = OutputDirectory.open(tmp_path / "out")
    assert missing_space(out.path, [shard], half) == shard.nbytes - half
    out.begin([shard], half)
    out.write(0, shard.computed[0][0], memoryview(bytes([1]) * half))
    out.sync([0])
    assert missing_space(out.path, [shard], half) <= 16 << 10
    out.abandon()
    out.close()


def test_data_is_counted_without_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = platform.create_file(tmp_path / "file")
    platform.truncate(descriptor, 1 << 20)
    platform.write_at(descriptor, bytes([1]) * 65536, 65536)
    platform.write_at(descriptor, bytes([1]) * 65536, 1 << 19)
    assert platform.data_bytes(descriptor, 0, 1 << 20) == 2 * 65536
    assert platform.data_bytes(descriptor, 65536 + 4096, 1 << 16) == 65536 - 4096
    assert platform.data_bytes(descriptor, 0, 65536) == 0
    assert platform.data_bytes(descriptor, 1 << 20, 0) == 0
    monkeypatch.setattr(platform, "DISABLED", {"SEEK_DATA"})
    assert platform.data_bytes(descriptor, 0, 1 << 20) == 1 << 20
    monkeypatch.setattr(platform, "DISABLED", set())

    def refuse(*arguments: int) -> int:
        raise OSError(errno.EINVAL, "")

    monkeypatch.setattr(platform.os, "lseek", refuse)
    assert platform.data_bytes(descriptor, 0, 1 << 20) == 1 << 20
    os.close(descriptor)
