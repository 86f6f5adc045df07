"""System calls that only some systems have, each with a fallback that does the same more slowly.

`DISABLED` names the calls to do without; tests fill it to run every fallback on any system.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

DISABLED: set[str] = set()
"""Calls that are treated as missing: ``preadv``, ``pwritev``, ``fallocate``, ``fadvise``, ``sync_file_range``."""

_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_FALLOC_FL_KEEP_SIZE = 1


def _has(call: str) -> bool:
    return call not in DISABLED and hasattr(os, call)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Bytes read into `buffer` from `offset` on: fewer than its length at the end of the file, or after a signal."""
    if _has("preadv"):
        return os.preadv(descriptor, [buffer], offset)
    data = os.pread(descriptor, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def write_at(descriptor: int, buffer: bytes | memoryview, offset: int) -> None:
    """All of `buffer` written at `offset`, however many calls it takes."""
    view = memoryview(buffer)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def reserve_space(descriptor: int, offset: int, nbytes: int) -> bool:
    """Reserve disk space for a range of a file without changing its size; whether the file system can.

    Raises OSError (ENOSPC, EDQUOT, ...) where there isn't room. ``posix_fallocate`` is no substitute: where a file
    system can't reserve, it writes zeros.
    """
    if nbytes == 0:
        return True
    if "fallocate" in DISABLED or not sys.platform.startswith("linux"):
        return False
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while call(descriptor, _FALLOC_FL_KEEP_SIZE, offset, nbytes) != 0:
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        if number in _UNSUPPORTED:
            return False
        raise OSError(number, os.strerror(number))
    return True


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to begin writing a range of dirty pages to the disk, so that a later sync finds little to do."""
    if "sync_file_range" in DISABLED or not sys.platform.startswith("linux"):
        return
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).sync_file_range
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    call(descriptor, offset, nbytes, 2)  # SYNC_FILE_RANGE_WRITE; advice only, so that a failure changes nothing


def forget_cached(descriptor: int, offset: int, nbytes: int) -> None:
    """Drop a range of a file from the page cache, where the system can."""
    if _has("posix_fadvise") and "fadvise" not in DISABLED:
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def expect_sequential(descriptor: int) -> None:
    """Tell the kernel that a file will be read from front to back, so that it reads further ahead."""
    if _has("posix_fadvise") and "fadvise" not in DISABLED:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
