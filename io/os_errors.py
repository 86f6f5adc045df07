"""What the system says where the disk of an output gets in the way, as errors of ours."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DiskSpaceError, EnvironmentFailure
from .sizes import format_size

_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "the disk quota is used up"}


@contextmanager
def translating_os_errors(path: Path, what: str) -> Iterator[None]:
    """Turn what the system raises inside the block into an error that says where it was and what to do.

    Args:
        path: of the output.
        what: was being done, such as "writing the journal".

    Raises:
        DiskSpaceError: the disk, or a quota, is full.
        EnvironmentFailure: anything else.
    """
    try:
        yield
    except OSError as error:
        raise explain(error, path, what) from error


def explain(error: OSError, path: Path, what: str) -> DiskSpaceError | EnvironmentFailure:
    """The error of ours that says what `error` means for the output at `path`."""
    if error.errno == errno.EFBIG:
        return DiskSpaceError(
            f"{path}: {what} failed: the file system, or ulimit -f, allows no file as large: give a smaller "
            "--shard-size, or choose another OUT"
        )
    if error.errno in _FULL:
        reason = _FULL[error.errno]
        return DiskSpaceError(
            f"{path}: {reason} while {what} ({_free(path)} free): make room and run the same command again"
        )
    reason = error.strerror or str(error)
    return EnvironmentFailure(f"{path}: {what} failed: {reason}; once that is mended, run the same command again")


def _free(path: Path) -> str:
    try:
        there = next(directory for directory in (path, *path.parents) if directory.exists())
        return format_size(shutil.disk_usage(there).free)
    except OSError:
        return "unknown"
