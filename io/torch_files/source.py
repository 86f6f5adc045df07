"""Bounded reads of the metadata of one file, which may be on a disk or on a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from xxhash import xxh3_128

from ...errors import CheckpointError

MAX_METADATA_BYTES = 48 << 20
"""The maximum size of the metadata of a file in bytes: everything but the values of its tensors."""

CONVERT = (
    "load the file with torch where you trust it, and save its tensors with safetensors.torch.save_file or "
    "save_pretrained(..., safe_serialization=True)"
)
"""What to do about a file that is not damaged, but holds more than tensors."""
DAMAGED = "the file is damaged or was not written by torch.save: download it again"

_BLOCK = 64 << 10

ReadRanges = Callable[[Sequence[tuple[int, int]]], list[bytes]]
"""A function that returns the bytes of ranges (offset, bytes), all of which lie in the file."""


class Metadata:
    """Reads the metadata of a file, and digests it.

    Args:
        file: the file, for errors.
        size: size of the file in bytes.
        read: function that reads ranges.
    """

    def __init__(self, file: Path, size: int, read: ReadRanges) -> None:
        self.file = file
        self.size = size
        self._digest = xxh3_128()
        self._read = read
        self._left = MAX_METADATA_BYTES

    def read(self, offset: int, nbytes: int) -> bytes:
        """Read one range. Raises as `read_all`."""
        return self.read_all([(offset, nbytes)])[0]

    def read_all(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges of the file.

        Raises:
            CheckpointError: a range is outside the file, or the metadata exceeds `MAX_METADATA_BYTES`.
            EnvironmentFailure: reading failed.
        """
        for offset, nbytes in ranges:
            if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
                self.refuse(
                    f"has {self.size:,} bytes, but its metadata continues to byte {offset + nbytes:,}: it is "
                    "truncated, probably by an interrupted download, or damaged: download it again"
                )
        self._left -= sum(nbytes for _, nbytes in ranges)
        if self._left < 0:
            self.refuse(
                f"has more than {MAX_METADATA_BYTES:,} bytes that are not values of tensors, the limit of mergeloom: "
                f"{CONVERT}"
            )
        found = self._read(ranges)
        for (offset, nbytes), content in zip(ranges, found, strict=True):
            self._digest.update(b"%d %d " % (offset, nbytes))
            self._digest.update(content)
        return found

    def digest(self) -> bytes:
        """Return the digest of the ranges that were read so far, with their positions."""
        return self._digest.digest()

    def blocks(self, start: int) -> Iterator[bytes]:
        """Yield the bytes of the file from `start` on, in blocks. Raises as `read_all`."""
        while start < self.size:
            block = self.read(start, min(_BLOCK, self.size - start))
            yield block
            start += len(block)

    def refuse(self, problem: str) -> NoReturn:
        """Raise CheckpointError for a file."""
        raise CheckpointError(f"{self.file}: {problem}")
