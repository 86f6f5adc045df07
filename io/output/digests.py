"""Computes digests of tensors and files that detect damage (not forgery).

A tensor's digest is the XXH3-128 of the concatenated XXH3-128 digests of its 16 MiB blocks, so it does not depend on
the chunks in which the tensor was computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

BLOCK_BYTES = 16 << 20
"""The size of a block in bytes; the last block of a tensor may be shorter."""


class BlockDigests:
    """Computes the digests of a tensor's blocks from its bytes, which are fed in order.

    Args:
        nbytes: the size of the tensor in bytes.
        known: the digests of the first blocks, from an earlier run; the bytes of these blocks are skipped.
    """

    def __init__(self, nbytes: int, known: Sequence[bytes] = ()) -> None:
        self.nbytes = nbytes
        self.blocks = list(known)
        self._position = min(len(self.blocks) * BLOCK_BYTES, nbytes)
        self._hash = xxhash.xxh3_128()

    def feed(self, offset: int, data: memoryview) -> None:
        """Feed bytes that start at `offset`. Bytes that were fed before are skipped; a gap is a ValueError."""
        if offset > self._position:
            raise ValueError(f"expected byte {self._position}, got {offset}")
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
        """The number of bytes that were fed."""
        return self._position

    def tail(self) -> bytes:
        """The digest of the fed bytes of an incomplete block; empty if there are none."""
        return self._hash.digest() if self._position % BLOCK_BYTES and not self.complete else b""

    def reached(self, offset: int) -> bool:
        """Whether all bytes before `offset` were fed."""
        return offset <= self._position

    @property
    def complete(self) -> bool:
        """Whether all bytes were fed."""
        return self._position >= self.nbytes

    def digest(self) -> str:
        """The tensor's digest in hexadecimal. Raises ValueError unless all bytes were fed."""
        if not self.complete:
            raise ValueError(f"{self._position} of {self.nbytes} bytes were fed")
        return tensor_digest(self.blocks)


def tensor_digest(blocks: Iterable[bytes]) -> str:
    """Compute the digest of a tensor from the digests of its blocks, in hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest(b"".join(blocks)))


def bytes_digest(data: bytes | memoryview) -> str:
    """Compute the XXH3-128 of bytes, in hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest(data))


def pieces_digest(pieces: Iterable[bytes]) -> str:
    """Compute the XXH3-128 of bytes that come in pieces, in hexadecimal."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return str(digest.hexdigest())


def file_digest(file: Path) -> str:
    """Compute the XXH3-128 of a file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while data := stream.read(1 << 20):
            digest.update(data)
    return str(digest.hexdigest())
