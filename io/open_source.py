"""Opens and reads files that come from other programs, and quotes their contents safely in errors."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import Repr

from ..errors import CheckpointError
from .os_errors import translating_read_errors

_short = Repr()
_short.maxstring = _short.maxother = 160
_short.maxlist = 8

quoted: Callable[[object], str] = _short.repr
"""Quote a name or value from a file for an error: escaped (no control characters, no lone surrogates) and of bounded
length."""


@contextmanager
def open_source(file: Path) -> Iterator[tuple[int, int]]:
    """Open a regular file for reading and yield its descriptor and its size in bytes.

    An OSError raised inside the block is translated, too.

    Raises:
        CheckpointError: the file is missing, not readable, or not a regular file.
        EnvironmentFailure: reading failed.
    """
    with translating_read_errors(file):
        # O_NONBLOCK: opening a named pipe would otherwise wait for its writer. It changes nothing for regular files.
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise CheckpointError(f"{file}: is {kind}, expected a file")
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)


def read_range(descriptor: int, offset: int, nbytes: int, *, file: Path) -> bytes:
    """Read `nbytes` bytes of an open file, starting at `offset`.

    Raises:
        CheckpointError: the file ends early, because it shrank after its size was read.
    """
    parts = []
    while nbytes:
        part = os.pread(descriptor, nbytes, offset)
        if not part:
            raise CheckpointError(f"{file}: shrank while it was being read: wait for its writer, then try again")
        parts.append(part)
        offset += len(part)
        nbytes -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
