"""Wraps system calls: those that only some systems have, with fallbacks, and all calls that change output files.

Tests disable calls with `DISABLED` to run every fallback on any system, and use `WATCH` to inject faults: a power
failure, a full disk, a killed process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DISABLED: set[str] = set()
"""The calls to treat as unavailable: ``preadv``, ``fallocate``, ``fadvise``, ``sync_file_range``,
``clone``, ``copy_file_range``, ``mincore``."""

WATCH: Callable[..., None] | None = None
"""A function that is called before each call that changes an output file or directory, with the call's name and
arguments: ``create`` path, ``truncate`` descriptor size, ``write`` descriptor data offset, ``reserve``
descriptor offset size, ``clone`` and ``copy`` source offset target offset size, ``sync`` descriptor, ``sync_directory``
path, ``rename`` path path, ``remove`` path, ``make_directory`` path, ``remove_directory`` path. Its
exceptions are raised by the call."""

_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_FALLOC_FL_KEEP_SIZE = 1
_FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range)


def _has(call: str) -> bool:
    return call not in DISABLED and hasattr(os, call)


def _about_to(call: str, *arguments: object) -> None:
    if WATCH is not None:
        WATCH(call, *arguments)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read into `buffer` from `offset`; the number of bytes, fewer at the end of the file or after a signal."""
    if _has("preadv"):
        return os.preadv(descriptor, [buffer], offset)
    data = os.pread(descriptor, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def write_at(descriptor: int, buffer: bytes | memoryview, offset: int) -> None:
    """Write all of `buffer` at `offset`, in as many calls as necessary."""
    view = memoryview(buffer)
    while view:
        _about_to("write", descriptor, view, offset)
        written = os.pwrite(descriptor, view, offset)
        if written == 0:
            raise OSError(errno.EIO, "the file system accepts no more bytes and reports no reason")
        view = view[written:]
        offset += written


def reserve_space(descriptor: int, offset: int, nbytes: int) -> bool:
    """Reserve disk space for a range of a file without changing its size; False if the file system can't.

    Raises OSError (ENOSPC, EDQUOT, ...) if there is not enough space. ``posix_fallocate`` can't replace this: on a file
    system that can't reserve space, it writes zeros.
    """
    if nbytes == 0:
        return True
    if "fallocate" in DISABLED or not sys.platform.startswith("linux"):
        return False
    _about_to("reserve", descriptor, offset, nbytes)
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


def data_bytes(descriptor: int, offset: int, nbytes: int) -> int:
    """The number of bytes in a range of a file that are not holes; all of them if the system can't tell."""
    if not _has("SEEK_DATA"):
        return nbytes
    end, count = offset + nbytes, 0
    while offset < end:
        try:
            start = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole follows
                return count
            if error.errno == errno.EINVAL:
                return count + end - offset
            raise
        offset = min(end, os.lseek(descriptor, start, os.SEEK_HOLE))
        count += max(0, offset - start)
    return count


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to start writing a range of dirty pages to disk, to make a later sync faster."""
    if "sync_file_range" in DISABLED or not sys.platform.startswith("linux"):
        return
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).sync_file_range
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    call(descriptor, offset, nbytes, 2)  # SYNC_FILE_RANGE_WRITE; only a hint, so errors are ignored


def forget_cached(descriptor: int, offset: int, nbytes: int) -> None:
    """Drop a range of a file from the page cache, if the system can."""
    _advise(descriptor, offset, nbytes, "POSIX_FADV_DONTNEED")


def cached_share(descriptor: int, offset: int, nbytes: int) -> float | None:
    """The fraction of a range of a file that is in the page cache; None if the system can't tell.

    `offset` must be a multiple of the page size, and the range must not be empty. The data is not read. For files of
    other users, Linux reports everything as cached.
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
    """Tell the kernel that a file will be read sequentially, to increase its read-ahead."""
    _advise(descriptor, 0, 0, "POSIX_FADV_SEQUENTIAL")


def _advise(descriptor: int, offset: int, nbytes: int, advice: str) -> None:
    if _has("posix_fadvise") and "fadvise" not in DISABLED:
        with contextlib.suppress(OSError):  # only a hint, so errors are ignored
            os.posix_fadvise(descriptor, offset, nbytes, getattr(os, advice))


def create_file(path: Path) -> int:
    """Create or truncate a file and return its descriptor, open for reading and writing."""
    _about_to("create", path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)


def truncate(descriptor: int, nbytes: int) -> None:
    """Set the size of a file."""
    _about_to("truncate", descriptor, nbytes)
    os.ftruncate(descriptor, nbytes)


def sync_data(descriptor: int) -> None:
    """Make the data and the size of a file durable."""
    _about_to("sync", descriptor)
    if sys.platform == "darwin":  # its fsync leaves the data in the disk's cache
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(descriptor)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    _about_to("sync_directory", directory)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # some network file systems sync names at once and reject this call
            raise
    finally:
        os.close(descriptor)


def rename(path: Path, target: Path) -> None:
    """Rename a file atomically on the same file system."""
    _about_to("rename", path, target)
    path.rename(target)


def remove(path: Path) -> None:
    """Remove a file or a link; a missing one is ignored."""
    _about_to("remove", path)
    path.unlink(missing_ok=True)


def make_directory(path: Path) -> None:
    """Create a directory and its parents; existing ones are ignored."""
    for directory in [each for each in (path, *path.parents) if not each.exists()][::-1]:
        _about_to("make_directory", directory)
        directory.mkdir(exist_ok=True)


def remove_directory(path: Path) -> None:
    """Remove an empty directory."""
    _about_to("remove_directory", path)
    path.rmdir()


def remove_tree(path: Path) -> None:
    """Remove a directory recursively without following links; a missing one is ignored."""
    if path.is_symlink():
        remove(path)
        return
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            remove_tree(entry)
        else:
            remove(entry)
    if path.is_dir():
        remove_directory(path)


def clone_range(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
    """Make a range of `target` share its blocks with a range of `source`; see ioctl_ficlonerange(2).

    Offsets and size must be multiples of the file system's block size. After an error, the content of the range of
    `target` is undefined.

    Returns:
        0, or the error number. Copying may work nevertheless.
    """
    try:
        _about_to("clone", source, source_offset, target, target_offset, nbytes)
    except OSError as error:
        return error.errno or errno.EIO
    return _clone(source, source_offset, target, target_offset, nbytes)


def _clone(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
    if "clone" in DISABLED or not sys.platform.startswith("linux"):
        return errno.ENOSYS
    import fcntl

    request = struct.pack("qQQQ", source, source_offset, nbytes, target_offset)
    while True:
        try:
            fcntl.ioctl(target, _FICLONERANGE, request)
        except InterruptedError:
            continue
        except OSError as error:
            return error.errno or errno.EIO
        return 0


def why_no_clone(source: int, scratch: int) -> int:
    """Test whether a file can share blocks with files on the file system of `scratch`, without changing either.

    The request is for an unaligned range, which every file system rejects with EINVAL, but only after all checks of
    whether it can share blocks at all. Obstacles in the source itself, such as being a swap file, are not detected.

    Returns:
        0, or the error number of the refusal.
    """
    number = _clone(source, 1, scratch, 0, 1)
    return 0 if number == errno.EINVAL else number


def copy_range(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
    """Let the kernel copy between two files; the number of bytes, 0 if it can't or at the end of the source."""
    if not _has("copy_file_range"):
        return 0
    while True:
        try:
            _about_to("copy", source, source_offset, target, target_offset, nbytes)
            return os.copy_file_range(source, target, nbytes, source_offset, target_offset)
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno in _UNSUPPORTED | {errno.EXDEV, errno.EPERM, errno.ETXTBSY, errno.EBADF}:
                return 0
            raise


def copies_in_kernel() -> bool:
    """Whether the kernel can copy between files."""
    return _has("copy_file_range")


def scratch_file(directory: Path) -> int | None:
    """Create an unnamed file in `directory` that disappears when closed; None if the file system can't."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted file system.

    Args:
        point: the mount point.
        device: the device number, equal for all mounts of the file system.
        kind: the type of the file system, such as ``xfs``.
    """

    point: str
    device: str
    kind: str


def mount_of(path: Path) -> Mount:
    """Find the mount that contains `path` or its nearest existing parent; all fields are "" if the system can't tell.

    It is found by path: on Btrfs, the device number of a file differs from that of its file system.
    """
    path = path.absolute()
    while not os.path.exists(path) and path != path.parent:  # noqa: PTH110  Path.exists raises for some names
        path = path.parent
    real = os.path.realpath(path)
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return Mount("", "", "")
    best = Mount("", "", "")
    for line in mounts:
        fields, _, rest = line.partition(" - ")
        _, _, device, _, point, *_ = fields.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best.point):
            best = Mount(point, device, rest.split(" ")[0])
    return best


def file_system(path: Path) -> str:
    """The type of the file system that contains `path` (or its nearest parent), such as ``xfs``; "" if unknown."""
    return mount_of(path).kind


OWN_PROCESS = False
"""Whether this process runs only the command line, so all its memory is mergeloom's."""
MAPPED_BYTES = 256 << 10
"""The size in bytes from which each allocation has its own mapping."""
ARENA_BYTES = 64 << 20
"""The address space of a glibc heap (arena) in bytes; each thread has its own up to a limit."""
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of malloc.h


def return_large_blocks() -> bool:
    """Make the C library return each large block to the system when it is freed; False if it can't.

    By default glibc raises its mmap threshold to the largest block that was ever freed. Smaller blocks then come from
    per-thread heaps, which can't shrink while small blocks are allocated at their ends.
    """
    return _tune_malloc(_M_MMAP_THRESHOLD, MAPPED_BYTES)


def share_heaps(number: int) -> bool:
    """Limit the number of heaps that the C library's threads share; False if it can't."""
    return _tune_malloc(_M_ARENA_MAX, number)


def _tune_malloc(option: int, value: int) -> bool:
    if "mallopt" in DISABLED or not sys.platform.startswith("linux"):
        return False
    import ctypes

    call = getattr(ctypes.CDLL(None), "mallopt", None)
    return call is not None and bool(call(option, value))
