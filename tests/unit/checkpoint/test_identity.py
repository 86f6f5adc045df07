"""A file's identity is its size, its header and samples of its data, and nothing else."""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from mergeloom.errors import CheckpointError
from mergeloom.io.checkpoint.identity import SAMPLE_BYTES, SAMPLES, file_identity, sample_ranges
from mergeloom.io.safetensors.header import build_header
from mergeloom.io.tensors.dtypes import DTYPES

LARGE = 40 * SAMPLE_BYTES + 7
"""Bytes of data of which the samples leave gaps."""


def write(file: Path, nbytes: int = LARGE, *, name: str = "a", modulo: int | None = None) -> int:
    """Write a file with one tensor of `nbytes` zeros; where its data begins."""
    head = build_header([(name, DTYPES["U8"], (nbytes,))], {}, data_offset_modulo=modulo)
    file.write_bytes(head + bytes(nbytes))
    return len(head)


def overwrite(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(b"x")


def test_an_identity_is_32_hex_digits_and_stays_the_same(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write(file, 100)
    # Changing the scheme changes every identity, so no unfinished merge can be resumed: not without a reason.
    assert file_identity(file) == "83de804c562f41982b76ed3471bb82e1"


def test_neither_path_nor_time_counts(tmp_path: Path) -> None:
    file, copy = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    write(file)
    shutil.copy(file, copy)
    os.utime(copy, (1, 1))
    assert file_identity(file) == file_identity(copy)


def test_size_counts(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    start = write(file)
    before = file_identity(file)
    os.truncate(file, start + LARGE + 1)
    assert file_identity(file) != before


def test_the_header_counts(tmp_path: Path) -> None:
    names = {}
    for name in "ab":
        write(tmp_path / name, name=name)
        names[name] = file_identity(tmp_path / name)
    assert names["a"] != names["b"]


def test_where_the_data_begins_counts(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write(file, modulo=512)
    before = file_identity(file)
    write(file, modulo=1024)
    assert file_identity(file) != before


@pytest.mark.parametrize("sample", range(SAMPLES))
def test_both_ends_of_every_sample_count(sample: int, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    start = write(file)
    before = file_identity(file)
    offset, nbytes = sample_ranges(start, start + LARGE)[sample]
    overwrite(file, offset)
    first = file_identity(file)
    overwrite(file, offset + nbytes - 1)
    assert len({before, first, file_identity(file)}) == 3


def test_between_the_samples_nothing_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    start = write(file)
    before = file_identity(file)
    offset, nbytes = sample_ranges(start, start + LARGE)[3]
    overwrite(file, offset + nbytes)
    assert file_identity(file) == before


def test_short_data_counts_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    nbytes = 3 * SAMPLE_BYTES // 2
    start = write(file, nbytes)
    seen = {file_identity(file)}
    for offset in (0, SAMPLE_BYTES - 1, SAMPLE_BYTES, nbytes - 1):
        overwrite(file, start + offset)
        seen.add(file_identity(file))
    assert len(seen) == 5


@pytest.mark.parametrize("start", [8, 1000])
@pytest.mark.parametrize("nbytes", [0, 1, SAMPLE_BYTES, SAMPLES * SAMPLE_BYTES, SAMPLES * SAMPLE_BYTES + 1, 10**12 + 1])
def test_samples_are_evenly_spaced_from_the_first_byte_to_the_last(start: int, nbytes: int) -> None:
    ranges = sample_ranges(start, start + nbytes)
    assert len(ranges) <= SAMPLES
    assert sum(length for _, length in ranges) == min(nbytes, SAMPLES * SAMPLE_BYTES)
    if nbytes:
        assert ranges[0][0] == start
        assert sum(ranges[-1]) == start + nbytes
    gaps = [after - before - length for (before, length), (after, _) in pairwise(ranges)]
    assert not gaps or (max(gaps) - min(gaps) <= 1 and min(gaps) >= 0)


def test_a_file_too_short_for_its_header_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((100).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated"):
        file_identity(file)
