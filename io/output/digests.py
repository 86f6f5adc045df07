"""Digests of tensors that don't depend on how a tensor was cut while it was made.

A tensor's digest is the XXH3-128 of the XXH3-128 digests of its blocks of 16 MiB, end to end. It finds damage, not
forgery.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

BLOCK_BYTES = 16 << 20
"""Bytes of a block; the last one of a tensor may be shorter."""


class BlockDigests:
    """The digests of a tensor's blocks, fed with its bytes from front to back.

    Args:
        nbytes: of the tensor.
        known: the digests of its first blocks, from an earlier run; the bytes of these are passed over.
    """

    def __init__(self, nbytes: int, known: Sequence[bytes] = ()) -> None:
        self.nbytes = nbytes
        self.blocks = list(known)
        self._position = min(len(self.blocks) * BLOCK_BYTES, nbytes)
        self._hash = xxhash.xxh3_128()

    def feed(self, offset: int, data: memoryview) -> None:
        """The next bytes, from `offset` on. Bytes that were fed before are passed over; none may be left out."""
        if offset > self._position:
            raise ValueError(f"byte {self._position} was left out before {offset}")
        data = data[self._position - offset :]
        while data:
            room = BLOCK_BYTES - self._position % BLOCK_BYTES
            part = data[:room]
            self._hash.update(part)
            self._position += len(part)
            data = data[room:]
            if self._position % BLOCK_BYTES == 0 or self._position == self.nbytes:
                self.blocks.append(self._hash.digest())
                self._hash = xxhash.xxh3_128()

    @property
    def position(self) -> int:
        """How many bytes were fed."""
        return self._position

    def tail(self) -> bytes:
        """The digest of what was fed of the block that isn't whole yet; empty where there is nothing of it."""
        return self._hash.digest() if self._position % BLOCK_BYTES and not self.whole else b""

    def reached(self, offset: int) -> bool:
        """Whether all bytes before `offset` have been fed."""
        return offset <= self._position

    @property
    def whole(self) -> bool:
        """Whether every byte was fed."""
        return self._position >= self.nbytes

    def digest(self) -> str:
        """The tensor's digest in hexadecimal; every byte must have been fed."""
        if not self.whole:
            raise ValueError(f"{self._position} of {self.nbytes} bytes were fed")
        return tensor_digest(self.blocks)


def tensor_digest(blocks: Iterable[bytes]) -> str:
    """The digest of a tensor from those of its blocks, in hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest(b"".join(blocks)))


def bytes_digest(data: bytes | memoryview) -> str:
    """The XXH3-128 of some bytes, in hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest(data))


def file_digest(file: Path) -> str:
    """The XXH3-128 of a file, in hexadecimal."""
    found = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while data := stream.read(1 << 20):
            found.update(data)
    return str(found.hexdigest())
