"""Fingerprints source files, so a resumed merge can tell whether a file has changed without reading all its data."""

from __future__ import annotations

from pathlib import Path

from xxhash import xxh3_128

from ..open_source import open_source, read_range
from ..safetensors.header import read_data_start
from .torch_names import is_torch_name

SAMPLES = 16
SAMPLE_BYTES = 64 << 10

_CHUNK = 1 << 20  # bytes of a header to read at a time: headers can be 100 MB


def file_identity(file: Path) -> str:
    """Compute a weight file's identity: the XXH3-128 of its size, header and data samples, in hexadecimal.

    The header of a PyTorch file is everything but the values of its tensors, and its samples are of the entire file.

    The samples are `SAMPLES` ranges of `SAMPLE_BYTES` bytes, evenly spaced over the data; data no longer than all
    samples together is read completely. Path and timestamps do not count, so a copy has the identity of its original.
    A change between the samples that keeps header and size goes unnoticed.

    Raises:
        CheckpointError: the file is missing, not readable, or shorter than its header says.
        EnvironmentFailure: reading failed.
    """
    header, samples = xxh3_128(), xxh3_128()
    in_torch = is_torch_name(file.name)
    if in_torch:
        from ..torch_files.reader import read_torch_file

        header.update(read_torch_file(file).digest)
    with open_source(file) as (descriptor, size):
        start = 0 if in_torch else read_data_start(descriptor, size, file=file)
        for offset in range(0, start, _CHUNK):
            header.update(read_range(descriptor, offset, min(_CHUNK, start - offset), file=file))
        for offset, nbytes in sample_ranges(start, size):
            samples.update(read_range(descriptor, offset, nbytes, file=file))
    # The version of the scheme is part of the hash, so identities of different versions never match.
    parts = b"mergeloom file 1", size.to_bytes(8, "little"), header.digest(), samples.digest()
    return xxh3_128(b"".join(parts)).hexdigest()


def sample_ranges(start: int, end: int) -> list[tuple[int, int]]:
    """The samples of the bytes from `start` to `end`, in ascending order: (offset, length) of each in bytes."""
    spare = end - start - SAMPLES * SAMPLE_BYTES
    if spare <= 0:
        return [(offset, min(SAMPLE_BYTES, end - offset)) for offset in range(start, end, SAMPLE_BYTES)]
    return [(start + spare * index // (SAMPLES - 1) + index * SAMPLE_BYTES, SAMPLE_BYTES) for index in range(SAMPLES)]
