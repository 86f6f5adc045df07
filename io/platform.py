"""System calls: those that only some systems have, each with a fallback, and all that change an output's files.

`DISABLED` names the calls to do without; tests fill it to run every fallback on any system. `WATCH` is the seam at
which they let the power fail, the disk be full or the process be killed.
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
"""Calls that are treated as missing: ``preadv``, ``fallocate``, ``fadvise``, ``sync_file_range``,
``clone``, ``copy_file_range``, ``mincore``."""

WATCH: Callable[..., None] | None = None
"""Where set, it is called before each call that changes a file or a directory of an output, with the call's name and
what it is given: ``create`` path, ``truncate`` descriptor size, ``write`` descriptor data offset, ``reserve``
descriptor offset size, ``clone`` and ``copy`` source offset target offset size, ``sync`` descriptor, ``sync_directory``
path, ``rename`` path path, ``remove`` path, ``make_directory`` path, ``remove_directory`` path. What it raises, the
call raises."""

_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_FALLOC_FL_KEEP_SIZE = 1
_FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range)


def _has(call: str) -> bool:
    return call not in DISABLED and hasattr(os, call)


def _about_to(call: str, *arguments: object) -> None:
    if WATCH is not None:
        WATCH(call, *arguments)


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
        _about_to("write", descriptor, view, offset)
        written = os.pwrite(descriptor, view, offset)
        if written == 0:
            raise OSError(errno.EIO, "the disk takes no more bytes and does not say why")
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
    """How many bytes of a range of a file are data, not holes; all of them where the system doesn't tell."""
    if not _has("SEEK_DATA"):
        return nbytes
    end, found = offset + nbytes, 0
    while offset < end:
        try:
            start = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole follows
                return found
            if error.errno == errno.EINVAL:
                return found + end - offset
            raise
        offset = min(end, os.lseek(descriptor, start, os.SEEK_HOLE))
        found += max(0, offset - start)
    return found


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
    _advise(descriptor, offset, nbytes, "POSIX_FADV_DONTNEED")


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
    _advise(descriptor, 0, 0, "POSIX_FADV_SEQUENTIAL")


def _advise(descriptor: int, offset: int, nbytes: int, advice: str) -> None:
    if _has("posix_fadvise") and "fadvise" not in DISABLED:
        with contextlib.suppress(OSError):  # it is advice: where the file system takes none, nothing is lost
            os.posix_fadvise(descriptor, offset, nbytes, getattr(os, advice))


def create_file(path: Path) -> int:
    """A descriptor, open for reading and writing, of a new, empty file; one that is there loses its content."""
    _about_to("create", path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)


def truncate(descriptor: int, nbytes: int) -> None:
    """Give a file a size."""
    _about_to("truncate", descriptor, nbytes)
    os.ftruncate(descriptor, nbytes)


def sync_data(descriptor: int) -> None:
    """Make a file's bytes, and its size, durable."""
    _about_to("sync", descriptor)
    if sys.platform == "darwin":  # whose fsync leaves the bytes in the disk's own cache
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
        if error.errno not in _UNSUPPORTED:  # some network file systems sync names as they are given, and refuse this
            raise
    finally:
        os.close(descriptor)


def rename(path: Path, target: Path) -> None:
    """Give a file another name, on the same file system; it has the one or the other at any instant."""
    _about_to("rename", path, target)
    path.rename(target)


def remove(path: Path) -> None:
    """Remove a file or a link; one that is not there is no error."""
    _about_to("remove", path)
    path.unlink(missing_ok=True)


def make_directory(path: Path) -> None:
    """Make a directory, with its parents; one that is there is no error."""
    for directory in [each for each in (path, *path.parents) if not each.exists()][::-1]:
        _about_to("make_directory", directory)
        directory.mkdir(exist_ok=True)


def remove_directory(path: Path) -> None:
    """Remove an empty directory."""
    _about_to("remove_directory", path)
    path.rmdir()


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it; links are not followed. One that is not there is no error."""
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
    """Let a range of `target` share its blocks with one of `source` (see ioctl_ficlonerange(2)).

    Offsets and size must be multiples of the file system's block. Where sharing is refused, what the range of `target`
    holds is undefined.

    Returns:
        0, or the error number with which it was refused: copying can still work.
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
    """0 where a file's blocks can be shared with files beside `scratch`, else the error number of the refusal.

    Asks for a range that begins inside a block, which every file system refuses, but only after it has refused what it
    can't do at all: the source isn't touched. What the source alone is in the way of (a swap file, say) stays unknown.
    """
    found = _clone(source, 1, scratch, 0, 1)
    return 0 if found == errno.EINVAL else found


def copy_range(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
    """Bytes that the kernel copied between two files; 0 where it can't between these, or the source has ended."""
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
    """Whether the system has a call with which the kernel copies between files."""
    return _has("copy_file_range")


def scratch_file(directory: Path) -> int | None:
    """A descriptor of an empty file without a name in `directory`, gone once closed; None where there can be none."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a file system is mounted.

    Args:
        point: the directory.
        device: the same for all mounts of one file system.
        kind: its type, such as ``xfs``.
    """

    point: str
    device: str
    kind: str


def mount_of(path: Path) -> Mount:
    """The mount that holds `path`, or its nearest parent that is there; all "" where the system doesn't tell.

    By name, not by device number: on Btrfs, a file has another one than its file system.
    """
    path = path.absolute()
    while not os.path.exists(path) and path != path.parent:  # noqa: PTH110  no name makes it fail
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
    """The type of the file system that holds `path` (or its nearest parent), such as ``xfs``; "" where unknown."""
    return mount_of(path).kind


OWN_PROCESS = False
"""Whether this process runs the command line and nothing else: all of its memory is mergeloom's then."""
MAPPED_BYTES = 256 << 10
"""Allocations from this size on are mapped one by one, in bytes."""
ARENA_BYTES = 64 << 20
"""Address space of one of glibc's heaps, in bytes; threads have their own where there may be as many."""
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of malloc.h


def return_large_blocks() -> bool:
    """Let the C library give each large block of memory back to the system as soon as it is freed; whether it does.

    Otherwise glibc raises its own threshold to the largest block that was ever freed, and takes larger ones from heaps,
    of which every thread has one, and which small blocks keep from shrinking.
    """
    return _tune_malloc(_M_MMAP_THRESHOLD, MAPPED_BYTES)


def share_heaps(number: int) -> bool:
    """Let the C library's threads share so many heaps, of which each takes address space; whether they do."""
    return _tune_malloc(_M_ARENA_MAX, number)


def _tune_malloc(option: int, value: int) -> bool:
    if "mallopt" in DISABLED or not sys.platform.startswith("linux"):
        return False
    import ctypes

    call = getattr(ctypes.CDLL(None), "mallopt", None)
    return call is not None and bool(call(option, value))
