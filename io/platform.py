"""System calls that only some systems have, each with a fallback that does the same more slowly.

`DISABLED` names the calls to do without; tests fill it to run every fallback on any system.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from pathlib import Path

DISABLED: set[str] = set()
"""Calls that are treated as missing: ``preadv``, ``fallocate``, ``fadvise``, ``sync_file_range``,
``clone``, ``copy_file_range``, ``mincore``."""

_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_FALLOC_FL_KEEP_SIZE = 1
_FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range)


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


def cached_share(descriptor: int, offset: int, nbytes: int) -> float | None:
    """The share of a range of a file that lies in the page cache, from 0 to 1; None where the system doesn't tell.

    `offset` must be a multiple of the page's size, and the range must not be empty. Nothing of it is read. Of a file
    that isn't the user's own, Linux says that all of it is cached.
    """
    if "mincore" in DISABLED or not sys.platform.startswith("linux"):
        return None
    import ctypes
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(3 * [ctypes.c_int]), ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    address = libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset)
    if address == ctypes.c_void_p(-1).value:
        return None
    try:
        pages = -(-nbytes // mmap.PAGESIZE)
        flags = ctypes.create_string_buffer(pages)
        if libc.mincore(address, nbytes, flags) != 0:
            return None
        return sum(flag & 1 for flag in flags.raw) / pages
    finally:
        libc.munmap(address, nbytes)


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


def clone_range(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> bool:
    """Let a range of `target` share its blocks with one of `source`; whether the file system did.

    Offsets and size must be multiples of the file system's block (see FICLONERANGE in ioctl_ficlonerange(2)).

    Raises:
        OSError: where something is wrong that copying would meet too, such as ENOSPC or EIO.
    """
    if "clone" in DISABLED or not sys.platform.startswith("linux"):
        return False
    import fcntl

    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("qQQQ", source, source_offset, nbytes, target_offset))
    except OSError as error:
        if error.errno in _UNSUPPORTED | {errno.EXDEV, errno.ENOTTY, errno.EPERM, errno.ETXTBSY, errno.EBADF}:
            return False
        raise
    return True


def copy_range(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
    """Bytes that the kernel copied between two files; 0 where it can't between these."""
    if not _has("copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, target, nbytes, source_offset, target_offset)
    except OSError as error:
        if error.errno in _UNSUPPORTED | {errno.EXDEV, errno.EPERM, errno.ETXTBSY, errno.EBADF}:
            return 0
        raise


def file_system(path: Path) -> str:
    """The type of the file system that holds `path` (or its nearest parent), such as ``xfs``; "" where unknown."""
    while not path.exists() and path != path.parent:
        path = path.parent
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in mounts:
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == number:
            return rest.split()[0]
    return ""
