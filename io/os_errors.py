"""Translates OSError into mergeloom's errors: what failed, where, and what to do about it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError, DiskSpaceError, EnvironmentFailure
from .sizes import format_size

_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "the disk quota is used up"}
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
_DENIED = {errno.EACCES, errno.EPERM}

RUN_AGAIN = "run the same command again"
"""The end of the advice for errors after which a merge can be resumed."""


@contextmanager
def translating_os_errors(path: Path, action: str) -> Iterator[None]:
    """Translate an OSError raised inside the block, which writes files; see `translate_os_error`.

    Raises:
        DiskSpaceError: the disk or a quota is full.
        EnvironmentFailure: any other OSError.
    """
    try:
        yield
    except OSError as error:
        raise translate_os_error(error, path, action) from error


def translate_os_error(
    error: OSError, path: Path, action: str, *, advice: str = f"fix that, then {RUN_AGAIN}"
) -> DiskSpaceError | EnvironmentFailure:
    """Translate the error of a call that writes files.

    Args:
        error: the error.
        path: the file or directory being written.
        action: the operation that failed, such as "writing the journal".
        advice: the remedy for anything but a full disk.
    """
    if error.errno == errno.EFBIG:
        return DiskSpaceError(
            f"{path}: {action} failed: the file is too large for the file system or for ulimit -f: use a smaller "
            "--shard-size, or choose another OUT"
        )
    if error.errno in _FULL:
        return DiskSpaceError(
            f"{path}: {_FULL[error.errno]} while {action} ({_free(path)} free): make room and {RUN_AGAIN}"
        )
    return EnvironmentFailure(f"{path}: {action} failed: {error.strerror or error}; {advice}")


@contextmanager
def translating_read_errors(file: Path, advice: str = "download it again") -> Iterator[None]:
    """Translate an OSError raised inside the block, which reads a file.

    Args:
        file: the file being read.
        advice: the remedy for a missing file.

    Raises:
        CheckpointError: the file is missing or not readable.
        EnvironmentFailure: any other OSError, such as an I/O error or too many open files.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _MISSING:
            missing = "is a broken link" if file.is_symlink() else "there is no such file"
            raise CheckpointError(f"{file}: {missing} ({reason}): {advice}") from error
        if error.errno in _DENIED:
            raise CheckpointError(f"{file}: can't be read ({reason}): check its owner and mode") from error
        raise EnvironmentFailure(f"{file}: can't be read ({reason}): check the disk, then {RUN_AGAIN}") from error


def _free(path: Path) -> str:
    """The free space of the file system that holds `path` or will hold it."""
    try:
        existing = next(directory for directory in (path, *path.parents) if directory.exists())
        return format_size(shutil.disk_usage(existing).free)
    except OSError:
        return "unknown"
