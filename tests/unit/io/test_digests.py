"""Digests depend only on the bytes, not on the chunks in which they are fed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mergeloom.io.output import digests as module
from mergeloom.io.output.digests import BlockDigests, bytes_digest, file_digest, tensor_digest


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 100)


def fed(data: bytes, *cuts: int) -> BlockDigests:
    """Digests of data that comes in pieces."""
    digests = BlockDigests(len(data))
    for start, end in zip((0, *cuts), (*cuts, len(data)), strict=True):
        digests.feed(start, memoryview(data)[start:end])
    return digests


@pytest.mark.parametrize("nbytes", [0, 1, 99, 100, 101, 200, 1234])
def test_the_digest_is_that_of_the_digests_of_the_blocks(nbytes: int) -> None:
    data = os.urandom(nbytes)
    blocks = [xxhash.xxh3_128_digest(data[start : start + 100]) for start in range(0, nbytes, 100)]
    digests = fed(data)
    assert digests.complete
    assert digests.blocks == blocks
    assert digests.digest() == tensor_digest(blocks) == xxhash.xxh3_128_hexdigest(b"".join(blocks))


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=5))
def test_chunks_do_not_change_the_digest(data: bytes, cuts: list[int]) -> None:
    digests = fed(data, *sorted(min(cut, len(data)) for cut in cuts))
    assert digests.digest() == fed(data).digest()
    assert digests.position == len(data)


@given(st.binary(min_size=1, max_size=400), st.integers(0, 400), st.integers(0, 400))
def test_known_blocks_are_skipped_and_tails_continued(data: bytes, reached: int, overlap: int) -> None:
    whole = fed(data)
    reached = min(reached, len(data))
    blocks = reached // 100
    again = BlockDigests(len(data), whole.blocks[:blocks])
    again.feed(blocks * 100, memoryview(data)[blocks * 100 : reached])
    assert again.position == max(reached, min(blocks * 100, len(data)))
    expected = xxhash.xxh3_128_digest(data[blocks * 100 : reached]) if reached % 100 and reached < len(data) else b""
    assert again.tail() == expected
    start = max(0, reached - overlap)
    assert again.reached(start)
    again.feed(start, memoryview(data)[start:])
    assert again.blocks == whole.blocks


def test_a_gap_is_an_error() -> None:
    digests = BlockDigests(300)
    digests.feed(0, memoryview(bytes(50)))
    assert not digests.reached(51)
    with pytest.raises(ValueError, match="expected byte 50, got 51"):
        digests.feed(51, memoryview(bytes(10)))
    with pytest.raises(ValueError, match="50 of 300 bytes were fed"):
        digests.digest()


def test_files_and_bytes(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file") == bytes_digest(data) == xxhash.xxh3_128_hexdigest(data)
