"""A source file's identity: what tells whether it is still the file that a merge began with, without reading it all."""

from __future__ import annotations

from pathlib import Path

from xxhash import xxh3_128

from ..open_source import open_source, read_range
from .header import read_data_start

SAMPLES = 16
SAMPLE_BYTES = 64 << 10

_CHUNK = 1 << 20  # of the header, so that a long one isn't held whole


def file_identity(file: Path) -> str:
    """32 hex digits (XXH3-128) over a safetensors file's size, its header's digest and that of samples of its data.

    The samples are `SAMPLES` ranges of `SAMPLE_BYTES` bytes, evenly spaced from the first byte of the data to the last;
    data that is no longer than all of them is digested whole. Neither the file's path nor its times count: a copy has
    the identity of its original. A change of data between the samples, with the same header and size, is not seen.

    Raises:
        CheckpointError: the file is missing, may not be read, or is too short for its own header.
        EnvironmentFailure: the disk got in the way.
    """
    with open_source(file) as (descriptor, size):
        start = read_data_start(descriptor, size, file=file)
        header, samples = xxh3_128(), xxh3_128()
        for offset in range(0, start, _CHUNK):
            header.update(read_range(descriptor, offset, min(_CHUNK, start - offset), file=file))
        for offset, nbytes in sample_ranges(start, size):
            samples.update(read_range(descriptor, offset, nbytes, file=file))
    # The name of the scheme counts too: if it is ever changed, no identity of the old one equals one of the new.
    parts = b"mergeloom file 1", size.to_bytes(8, "little"), header.digest(), samples.digest()
    return xxh3_128(b"".join(parts)).hexdigest()


def sample_ranges(start: int, end: int) -> list[tuple[int, int]]:
    """(offset, length) of each sample of the bytes from `start` to `end` of a file, in bytes, in ascending order."""
    spare = end - start - SAMPLES * SAMPLE_BYTES
    if spare <= 0:
        return [(offset, min(SAMPLE_BYTES, end - offset)) for offset in range(start, end, SAMPLE_BYTES)]
    return [(start + spare * index // (SAMPLES - 1) + index * SAMPLE_BYTES, SAMPLE_BYTES) for index in range(SAMPLES)]
