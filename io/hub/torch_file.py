"""Reads where the tensors of a PyTorch file on the Hub lie, by range requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby

from xxhash import xxh3_128

from ..torch_files.reader import parse_torch_file, read_torch_file
from ..torch_files.state_dict import TorchFile
from .http import in_parallel, read_file
from .repository import HubFile, header_cache, write_cache

_BLOCK = 4096  # a local header of a zip archive takes a part of one, and there is one for each storage
_INDEX = 8  # bytes of a block's number in the cache
_DIGEST = 16  # bytes before the blocks in the cache
_THREADS = 16


def read_hub_torch_file(file: HubFile, count: Callable[[HubFile, int], None]) -> TorchFile:
    """Read where the tensors of a file lie: from the downloaded file, from the cache, or by range requests.

    Args:
        file: the file.
        count: function that is called with the number of bytes before each request, and may raise.

    Raises:
        CheckpointError: the file is damaged, or holds more than tensors.
        EnvironmentFailure: the Hub is not reachable, or reading failed.
    """
    if file.present:
        return read_torch_file(file.path)
    blocks = _Blocks(file, count)
    cached = header_cache(file).with_suffix(".torch")
    with suppress(OSError):
        blocks.load(cached.read_bytes())
    found = parse_torch_file(file.path, file.nbytes, blocks.read)
    if blocks.fetched:
        write_cache(cached, blocks.dump())
    return found


class _Blocks:
    """The blocks of a file that are known so far.

    Args:
        file: the file.
        count: function that is called with the number of bytes before each request.

    Attributes:
        fetched: whether any block was requested.
    """

    def __init__(self, file: HubFile, count: Callable[[HubFile, int], None]) -> None:
        self.fetched = False
        self._file = file
        self._count = count
        self._known: dict[int, bytes] = {}

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of ranges (offset, bytes) of the file, and request the blocks that are missing."""
        wanted = {number for offset, nbytes in ranges for number in _numbers(offset, nbytes)}
        missing = sorted(wanted - self._known.keys())
        runs = [[number for _, number in run] for _, run in groupby(enumerate(missing), lambda each: each[1] - each[0])]
        if runs:
            self.fetched = True
            self._count(self._file, len(missing) * _BLOCK)
            in_parallel(self._fetch, runs, min(_THREADS, len(runs)))
        return [self._joined(offset, nbytes) for offset, nbytes in ranges]

    def load(self, cached: bytes) -> None:
        """Take blocks from the cache; a damaged cache is ignored."""
        digest, content = cached[:_DIGEST], cached[_DIGEST:]
        if xxh3_128(content).digest() != digest:
            return
        for position in range(0, len(content), _INDEX + _BLOCK):
            block = content[position + _INDEX : position + _INDEX + _BLOCK]
            self._known[int.from_bytes(content[position : position + _INDEX], "little")] = block

    def dump(self) -> bytes:
        """Return the known blocks for the cache."""
        blocks = sorted(self._known.items())  # the only short one, the end of the file, is the last one
        content = b"".join(number.to_bytes(_INDEX, "little") + block for number, block in blocks)
        return xxh3_128(content).digest() + content

    def _fetch(self, run: Sequence[int], stop: threading.Event) -> None:
        start, size = run[0] * _BLOCK, self._file.nbytes
        end = min((run[-1] + 1) * _BLOCK, size)
        data = b"".join(read_file(self._file.location, self._file.url, start, end, size, stop))
        for number in run:
            first = number * _BLOCK - start
            self._known[number] = data[first : first + _BLOCK]

    def _joined(self, offset: int, nbytes: int) -> bytes:
        numbers = _numbers(offset, nbytes)
        first = offset - numbers.start * _BLOCK
        return b"".join([self._known[number] for number in numbers])[first : first + nbytes]


def _numbers(offset: int, nbytes: int) -> range:
    """The numbers of the blocks that a range touches; none for an empty one."""
    return range(offset // _BLOCK, -(-(offset + nbytes) // _BLOCK) if nbytes else offset // _BLOCK)
