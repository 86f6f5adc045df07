"""Tensors in parts: every range has the bytes of the tensor that the parts make up, wherever they are stored."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from mergeloom.io.tensors.assembled import AssembledRef, files_of, read_tensor, stored_parts, stored_ranges
from mergeloom.io.tensors.dtypes import DTYPES
from mergeloom.io.tensors.refs import TensorRef

EXPERTS, ROWS, COLUMNS = 3, 5, 4


class Files:
    """Files of random bytes in memory, and the ranges that were read of them."""

    def __init__(self) -> None:
        random = np.random.default_rng(3)
        self.content = {Path(name): random.integers(0, 256, 200_000, np.uint8).tobytes() for name in "ab"}
        self.read_ranges: list[tuple[Path, int, int]] = []

    def read(self, file: Path, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.content[file][offset : offset + len(buffer)]
        self.read_ranges.append((file, offset, len(buffer)))


def assembled(dtype: str, *, group: int, interleaved: bool, columns: int = COLUMNS) -> AssembledRef:
    """Parts of ROWS x `columns` that alternate between two files, the last one first."""
    width = DTYPES[dtype].bits // 8
    count, size = EXPERTS * group, ROWS * columns * width
    return AssembledRef(
        Path("a"),
        7 + (count - 1) * size,
        count * size,
        DTYPES[dtype],
        (EXPERTS, group * ROWS, columns),
        tuple(Path("ab"[part % 2]) for part in range(count)),
        tuple(7 + (count - 1 - part) * size for part in range(count)),
        group,
        columns * width if interleaved else size,
    )


def expected(ref: AssembledRef, files: Files, *, interleaved: bool) -> bytes:
    """The tensor's bytes, made with numpy."""
    size = ref.nbytes // (EXPERTS * ref.group)
    parts = [files.content[file][at : at + size] for file, at in zip(ref.part_files, ref.part_offsets, strict=True)]
    each = np.stack([np.frombuffer(part, np.uint8).reshape(ROWS, -1) for part in parts])
    each = each.reshape(EXPERTS, ref.group, ROWS, -1)
    return (each.transpose(0, 2, 1, 3) if interleaved else each).tobytes()


@pytest.mark.parametrize(("dtype", "columns"), [("BF16", 1), ("F32", 1), ("F64", 1), ("BF16", 4), ("F32", 1000)])
@pytest.mark.parametrize(("group", "interleaved"), [(1, False), (2, False), (2, True), (3, True)])
def test_every_range_has_the_bytes_of_the_assembled_tensor(
    dtype: str, columns: int, group: int, interleaved: bool
) -> None:
    files = Files()
    ref = assembled(dtype, group=group, interleaved=interleaved, columns=columns)
    whole = expected(ref, files, interleaved=interleaved)
    assert len(whole) == ref.nbytes
    step = max(1, ref.nbytes // 29)
    cuts = sorted({*range(0, ref.nbytes, step), ref.nbytes})
    for start, end in product(cuts, cuts):
        if start >= end:
            continue
        files.read_ranges.clear()
        buffer = bytearray(end - start)
        read_tensor(files.read, ref, start, memoryview(buffer))
        assert buffer == whole[start:end]
        assert sum(nbytes for *_, nbytes in files.read_ranges) == end - start


def test_interleaved_elements_are_read_together() -> None:
    files = Files()
    ref = assembled("BF16", group=2, interleaved=True, columns=1)
    buffer = bytearray(ref.nbytes)
    read_tensor(files.read, ref, 0, memoryview(buffer))
    assert len(files.read_ranges) == EXPERTS * 2  # one read for each part, not for each element


def test_stored_order_is_one_part_after_the_other() -> None:
    files = Files()
    ref = assembled("F32", group=2, interleaved=True)
    assert ref.interleaved
    assert not assembled("F32", group=2, interleaved=False).interleaved
    assert files_of(ref) == (Path("a"), Path("b"))
    parts = [files.content[part.file][part.offset : part.offset + part.nbytes] for part in stored_parts(ref)]
    whole = b"".join(parts)
    assert whole == expected(ref, files, interleaved=False)
    for start in range(0, ref.nbytes, 13):
        for end in range(start + 1, ref.nbytes, 17):
            ranges = stored_ranges(ref, start, end)
            found = b"".join(files.content[each.file][each.offset : each.offset + each.nbytes] for each in ranges)
            assert found == whole[start:end]


def test_a_tensor_in_one_place_is_its_only_part() -> None:
    files = Files()
    ref = TensorRef(Path("b"), 5, 48, DTYPES["F32"], (3, 4))
    buffer = bytearray(8)
    read_tensor(files.read, ref, 16, memoryview(buffer))
    assert files.read_ranges == [(Path("b"), 21, 8)]
    assert files_of(ref) == (Path("b"),)
    assert [tuple(part) for part in stored_parts(ref)] == [(Path("b"), 5, 48)]
    assert [tuple(part) for part in stored_ranges(ref, 4, 8)] == [(Path("b"), 9, 4)]
