"""The directory with compiled loops: one file per module, of one user, safe with several processes.

A file is named by a hash of all that its code depends on, and starts with a hash of its content. The directory must
belong to the user and be closed to others, since its content is executed; otherwise, or if it cannot be written, every
process compiles for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from pathlib import Path

MAX_FILES = 1024
"""Maximum number of files; the ones that were not used for longest are removed."""
_DIGEST = 20


def directory() -> Path:
    """The directory of the code: ``mergeloom/kernels`` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as the XDG specification says  # noqa: PTH117
        base = os.path.expanduser("~/.cache")  # noqa: PTH111  Path's raises
    return Path(base) / "mergeloom" / "kernels"


def read(key: str) -> bytes | None:
    """The code of a key; None if there is none, if it is damaged, or if others could have written it."""
    folder = _own_directory(create=False)
    if folder is None:
        return None
    file = folder / key
    try:
        with file.open("rb") as stream:
            if not _is_own(os.fstat(stream.fileno())):
                return None
            digest, code = stream.read(_DIGEST), bytes(stream.read())
    except OSError:
        return None
    if digest != _digest(code):
        return None
    with contextlib.suppress(OSError):
        os.utime(file)
    return code


def write(key: str, code: bytes) -> None:
    """Store code, atomically. A directory that cannot be written is not an error."""
    folder = _own_directory(create=True)
    if folder is None:
        return
    with contextlib.suppress(OSError):
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".new-")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(_digest(code) + code)
            Path(name).replace(folder / key)
        except OSError:
            Path(name).unlink()
            raise
        _remove_oldest(folder)


def _own_directory(*, create: bool) -> Path | None:
    """The directory if it is the user's own and closed to others, else None."""
    folder = directory()
    try:
        if create:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    return folder if stat.S_ISDIR(status.st_mode) and _is_own(status) else None


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _remove_oldest(folder: Path) -> None:
    files = sorted((entry.stat().st_mtime_ns, entry.path) for entry in os.scandir(folder) if entry.is_file())
    for _, path in files[:-MAX_FILES]:
        with contextlib.suppress(OSError):
            Path(path).unlink()


def _digest(code: bytes) -> bytes:
    return hashlib.blake2b(code, digest_size=_DIGEST).digest()
