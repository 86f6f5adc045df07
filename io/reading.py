"""Reads tensor data into buffers of the caller through a bounded pool of open files, and detects changed files."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

from ..errors import CheckpointError, EnvironmentFailure
from .os_errors import RUN_AGAIN, translating_read_errors
from .platform import expect_sequential, forget_cached, read_at

FileStamp = tuple[int, int, int, int]
"""A stat fingerprint that changes when a file is replaced or written to: (inode, size, mtime, ctime), times in ns.

The ctime changes with every write and can't be set, so a file that was overwritten in place and got its old mtime back
is detected, too."""
FileStamps = Mapping[Path, FileStamp]
Observe = Callable[[Path, int, memoryview], None]
"""``observe(file, offset, data)``, called from several threads."""

_PUT_BACK = f"put the file back and {RUN_AGAIN}"


def stat_fingerprint(status: os.stat_result) -> FileStamp:
    """The stamp of a file with this stat result."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def stat_fingerprints(files: Iterable[Path]) -> dict[Path, FileStamp]:
    """The stamps of source files.

    Raises:
        CheckpointError: a file is missing or not accessible.
        EnvironmentFailure: any other error of the file system.
    """
    stamps = {}
    for file in files:
        with translating_read_errors(file, _PUT_BACK):
            stamps[file] = stat_fingerprint(file.stat())
    return stamps


def source_changed(file: Path) -> CheckpointError:
    """The error for a source file that has changed since the merge started."""
    return CheckpointError(
        f"{file} was changed during the merge: the output would mix two versions. Put the file back and run the "
        "same command again, or start over with --restart; if only its attributes or its name were changed, just "
        "run the same command again"
    )


MIN_DESCRIPTORS = 64
"""The number of file descriptors that a merge needs at least, however many files it reads and writes."""
_OTHER_DESCRIPTORS = 40  # of streams, journal, locks, libraries, and files in use by threads
_POOLS = 3  # that exist at one time
_MAX_OPEN = 256


def pool_limit(most: int = _MAX_OPEN) -> int:
    """Return the number of files, at most `most`, that a pool keeps open within ``ulimit -n``, next to other pools."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return most
    return min(most, max(2, (limit - _OTHER_DESCRIPTORS) // _POOLS))


def check_descriptors() -> None:
    """Check that ``ulimit -n`` allows enough open files for a merge; raise it if the hard limit allows.

    Raises:
        EnvironmentFailure: if it does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= MIN_DESCRIPTORS:
        return
    if hard != resource.RLIM_INFINITY and hard < MIN_DESCRIPTORS:
        raise EnvironmentFailure(
            f"ulimit -n allows {hard} open files, and a merge needs {MIN_DESCRIPTORS}: raise it, for example with "
            "`ulimit -n 1024`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (MIN_DESCRIPTORS, hard))


class FilePool:
    """An LRU pool of open files. Thread-safe: a file in use is never closed.

    Args:
        flags: the flags for ``os.open``.
        limit: the maximum number of open files, unless more are in use at a time; fewer if ``ulimit -n`` is low.
        stamps: the expected stamps of files; opening a file with another stamp is an error.
    """

    def __init__(self, flags: int = os.O_RDONLY, limit: int = _MAX_OPEN, stamps: FileStamps | None = None) -> None:
        self._flags = flags | os.O_CLOEXEC
        self._limit = pool_limit(limit)
        self._stamps = stamps or {}
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._users: dict[int, int] = {}

    def acquire(self, file: Path) -> int:
        """Return a descriptor of `file`, to be returned with `release`.

        Raises:
            CheckpointError: the file's stamp is not the expected one.
            OSError: the file can't be opened.
        """
        with self._lock:
            descriptor = self._open.get(file)
            if descriptor is None:
                descriptor = os.open(file, self._flags)
                stamp = stat_fingerprint(os.fstat(descriptor))
                if stamp != self._stamps.get(file, stamp):
                    os.close(descriptor)
                    raise source_changed(file)
                if self._flags & os.O_ACCMODE == os.O_RDONLY:
                    expect_sequential(descriptor)
                self._open[file] = descriptor
            self._open.move_to_end(file)
            self._users[descriptor] = self._users.get(descriptor, 0) + 1
            self._trim()
            return descriptor

    def release(self, descriptor: int) -> None:
        """Return a descriptor to the pool."""
        with self._lock:
            self._users[descriptor] -= 1
            self._trim()

    def _trim(self) -> None:
        if len(self._open) <= self._limit:
            return
        for file, descriptor in list(self._open.items()):
            if not self._users.get(descriptor):
                os.close(descriptor)
                self._users.pop(descriptor, None)
                del self._open[file]
                if len(self._open) <= self._limit:
                    return

    def close(self) -> None:
        """Close all files. None may be in use."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()
            self._users.clear()

    def __enter__(self) -> FilePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def acquire_source(files: FilePool, file: Path) -> int:
    """Return a descriptor of a source file, to be returned to the pool with `release`.

    Raises:
        CheckpointError: the file is missing, not readable, or has changed.
        EnvironmentFailure: the file can't be opened for another reason, such as too many open files.
    """
    with translating_read_errors(file, _PUT_BACK):
        return files.acquire(file)


class Reader:
    """Reads ranges of source files. Thread-safe.

    Args:
        keep_cached: whether data stays in the page cache; False for inputs that are larger than the cache.
        limit: the maximum number of open source files; fewer if ``ulimit -n`` is low.
        stamps: the expected stamps of files; reading a file with another stamp is an error.
        observe: a function that is called with every range after it was read.
    """

    def __init__(
        self,
        *,
        keep_cached: bool = True,
        limit: int = _MAX_OPEN,
        stamps: FileStamps | None = None,
        observe: Observe | None = None,
    ) -> None:
        self._files = FilePool(os.O_RDONLY, limit, stamps)
        self._keep_cached = keep_cached
        self._observe = observe

    def read(self, file: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `file` that start at `offset`.

        Raises:
            CheckpointError: the file is missing, not readable, has changed, or ends too early.
            EnvironmentFailure: reading failed.
        """
        descriptor = acquire_source(self._files, file)
        try:
            done = 0
            while done < len(buffer):
                count = read_at(descriptor, buffer[done:], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{file}: ends at byte {offset + done}, before the end of a tensor: the file was truncated "
                        f"during the merge; {_PUT_BACK}"
                    )
                done += count
            if not self._keep_cached:
                forget_cached(descriptor, offset, len(buffer))
        except OSError as error:
            raise EnvironmentFailure(
                f"{file}: reading {len(buffer)} bytes at {offset} failed: {error.strerror}; "
                f"check the disk (dmesg), then {RUN_AGAIN}"
            ) from error
        finally:
            self._files.release(descriptor)
        if self._observe is not None:
            self._observe(file, offset, buffer)

    def close(self) -> None:
        """Close the source files."""
        self._files.close()
