"""Reading tensor bytes into buffers that the caller owns, through a bounded pool of open files."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from ..errors import CheckpointError, EnvironmentFailure
from .platform import expect_sequential, forget_cached, read_at

Stamp = tuple[int, int, int, int]
"""Tells whether a file may have been replaced or written to: its inode, size, mtime and ctime, both in nanoseconds.

The ctime changes with every write and can't be set, so it also tells if a file was overwritten in place and then given
its old mtime again."""
Stamps = Mapping[Path, Stamp]
Observe = Callable[[Path, int, memoryview], None]
"""``observe(file, offset, data)``, called from several threads."""


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def stamps_of(files: Iterable[Path]) -> dict[Path, Stamp]:
    """The stamps of some files. Raises CheckpointError where one is gone, EnvironmentFailure where it can't be seen."""
    stamps = {}
    for file in files:
        with _explained(file):
            stamps[file] = stamp_of(file.stat())
    return stamps


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """What the system says where a source file of the merge can't be opened or looked at, as an error of ours."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise CheckpointError(
            f"{file}: can't be opened any more ({error.strerror}): put the file back and run the same command again"
        ) from error
    except OSError as error:
        raise EnvironmentFailure(
            f"{file}: can't be opened ({error.strerror}): once that is mended, run the same command again"
        ) from error


def changed(file: Path) -> CheckpointError:
    """What to say of a source file that isn't any more what it was when the merge began."""
    return CheckpointError(
        f"{file} was changed during the merge: the output would mix two versions of it. Put the file back and run the "
        "same command again, or start over with --fresh; if only its attributes or its name were changed, just run the "
        "same command again"
    )


class FilePool:
    """Files kept open for reading or writing, at most `limit` at a time; the one unused for longest is closed first.

    Safe to use from several threads: a file in use is never closed.

    Args:
        flags: of ``os.open``.
        limit: the most files open at a time that aren't in use.
        stamps: what files must be when they are opened, where it is known.
    """

    def __init__(self, flags: int = os.O_RDONLY, limit: int = 256, stamps: Stamps | None = None) -> None:
        self._flags = flags | os.O_CLOEXEC
        self._limit = limit
        self._stamps = stamps or {}
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._users: dict[int, int] = {}

    def acquire(self, file: Path) -> int:
        """A descriptor of `file`; give it back with `release`. Raises OSError; CheckpointError where it was changed."""
        with self._lock:
            descriptor = self._open.get(file)
            if descriptor is None:
                descriptor = os.open(file, self._flags)
                if self._stamps.get(file, stamp := stamp_of(os.fstat(descriptor))) != stamp:
                    os.close(descriptor)
                    raise changed(file)
                if self._flags & os.O_ACCMODE == os.O_RDONLY:
                    expect_sequential(descriptor)
                self._open[file] = descriptor
            self._open.move_to_end(file)
            self._users[descriptor] = self._users.get(descriptor, 0) + 1
            self._trim()
            return descriptor

    def release(self, descriptor: int) -> None:
        """Give a descriptor back."""
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
        """Close every file. None may be in use."""
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
    """A descriptor of a source file, to be given back to the pool.

    Raises:
        CheckpointError: where the file is gone, was changed, or may not be read.
        EnvironmentFailure: where a limit of the system, or the disk, gets in the way.
    """
    with _explained(file):
        return files.acquire(file)


class Reader:
    """Reads ranges of source files. Safe to use from several threads.

    Args:
        keep_cached: whether what was read stays in the page cache; False for inputs that are larger than it.
        limit: the most source files open at a time.
        stamps: what files must be when they are opened, where it is known.
        observe: called with every range that was read.
    """

    def __init__(
        self,
        *,
        keep_cached: bool = True,
        limit: int = 256,
        stamps: Stamps | None = None,
        observe: Observe | None = None,
    ) -> None:
        self._files = FilePool(os.O_RDONLY, limit, stamps)
        self._keep_cached = keep_cached
        self._observe = observe

    def read(self, file: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `file` from `offset` on.

        Raises:
            CheckpointError: where the file is gone, was changed, may not be read, or ends before.
            EnvironmentFailure: where the disk, or a limit of the system, gets in the way.
        """
        descriptor = acquire_source(self._files, file)
        try:
            done = 0
            while done < len(buffer):
                count = read_at(descriptor, buffer[done:], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{file}: ends at byte {offset + done}, where its header promises more: it was cut short "
                        "while it was being read; put the whole file back and run the same command again"
                    )
                done += count
            if not self._keep_cached:
                forget_cached(descriptor, offset, len(buffer))
        except OSError as error:
            raise EnvironmentFailure(
                f"{file}: reading {len(buffer)} bytes at {offset} failed: {error.strerror}; "
                "check the disk (dmesg), then run the same command again"
            ) from error
        finally:
            self._files.release(descriptor)
        if self._observe is not None:
            self._observe(file, offset, buffer)

    def close(self) -> None:
        """Close the source files."""
        self._files.close()
