"""Opening the files that others made, and showing what is in them: what goes wrong becomes an error of ours."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import Repr

from ..errors import CheckpointError, EnvironmentFailure

_short = Repr()
_short.maxstring = _short.maxother = 160
_short.maxlist = 8

quoted: Callable[[object], str] = _short.repr
"""A name or value out of a file as an error shows it: quoted, escaped (no control characters, no lone surrogates)
and of bounded length."""


@contextmanager
def open_source(file: Path) -> Iterator[tuple[int, int]]:
    """A source file's descriptor, open for reading, and its size in bytes.

    What the system raises meanwhile, inside the block too, becomes an error of ours.

    Raises:
        CheckpointError: there is no such file, it may not be read, or it is no regular file.
        EnvironmentFailure: the disk, or a limit of the system, got in the way.
    """
    try:
        # O_NONBLOCK: opening a named pipe would otherwise wait for its writer. It changes nothing for regular files.
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
                raise CheckpointError(f"{file}: is {kind}, where a file was expected")
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            missing = "is a broken link" if file.is_symlink() else "there is no such file"
            raise CheckpointError(f"{file}: {missing} ({reason}): download it again") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise CheckpointError(f"{file}: may not be read ({reason}): ask its owner, or change its mode") from error
        raise EnvironmentFailure(f"{file}: could not be read ({reason}): check the disk, then try again") from error


def read_range(descriptor: int, offset: int, nbytes: int, *, file: Path) -> bytes:
    """`nbytes` bytes of an open file from `offset` on.

    Raises:
        CheckpointError: the file ends before, that is, it shrank after its size was read.
    """
    parts = []
    while nbytes:
        part = os.pread(descriptor, nbytes, offset)
        if not part:
            raise CheckpointError(f"{file}: got shorter while it was read: wait for its writer, then try again")
        parts.append(part)
        offset += len(part)
        nbytes -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
