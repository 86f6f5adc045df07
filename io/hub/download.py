"""Downloading files of the Hub into huggingface_hub's cache; what was interrupted goes on where it stopped.

huggingface_hub (2.4) throws an unfinished file away when its process ends, and merges need files of 5 GB and more, 191
of them for a 405B model: so the bytes are fetched here, with its client, token, cache layout and locks. A file gets its
place in the cache when all of it is there, is durable, and has the hash by which the Hub lists it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, DiskSpaceError, EnvironmentFailure, Interrupted
from ..platform import sync_directory
from ..sizes import format_size
from .http import OFFLINE, in_parallel, is_offline, read_file
from .repository import HubFile

THREADS = 8
"""How many files are downloaded at a time."""

_CHUNK = 1 << 20
_PIECE = 1 << 30  # bytes of one request: content delivery networks refuse answers of more than some 50 GB
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class Transfer:
    """How far a download is.

    Args:
        files_done: files that are whole.
        files: how many are to be downloaded.
        bytes_done: bytes that are here, those of an earlier, interrupted download included.
        nbytes: the size of all of them.
    """

    files_done: int
    files: int
    bytes_done: int
    nbytes: int


class _Count:
    """What the threads of a download have done so far."""

    def __init__(self, files: Sequence[HubFile]) -> None:
        self._lock = threading.Lock()
        self._files = len(files)
        self._nbytes = sum(file.nbytes for file in files)
        self._files_done = 0
        self._bytes_done = 0

    def add(self, nbytes: int, files: int = 0) -> None:
        """Count bytes (fewer where some must be fetched anew) and whole files."""
        with self._lock:
            self._bytes_done += nbytes
            self._files_done += files

    def transfer(self) -> Transfer:
        """Where it stands."""
        with self._lock:
            return Transfer(self._files_done, self._files, self._bytes_done, self._nbytes)


def download(files: Iterable[HubFile], notify: Callable[[Transfer], None] | None = None) -> None:
    """Download what is missing of `files`; after that, the `path` of each exists.

    Args:
        files: of any repositories.
        notify: called in this thread about ten times a second, and at the end.

    Raises:
        CheckpointError: the Hub refuses, sends another file than it lists, or requests are forbidden.
        DiskSpaceError: there is no room for them in the cache.
        EnvironmentFailure: the Hub can't be reached, breaks off again and again, or the disk got in the way.
    """
    missing = list({file.path: file for file in files if not file.present}.values())
    if not missing:
        return
    if is_offline() and any(file.to_fetch for file in missing):
        more = f" (and {len(missing) - 1} more files)" if len(missing) > 1 else ""
        raise CheckpointError(f"{missing[0].place}{more}: {OFFLINE}")
    _check_space(missing)
    count = _Count(missing)
    tick = None if notify is None else lambda: notify(count.transfer())
    in_parallel(lambda file, stop: _download(file, count, stop), missing, min(THREADS, len(missing)), tick)
    if tick:
        tick()


def _check_space(missing: Sequence[HubFile]) -> None:
    needed = sum({file.blob: file.to_fetch for file in missing}.values())
    folder = missing[0].folder
    with _disk(missing[0]):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskSpaceError(
            f"{folder.parent}: the files that are missing take {format_size(needed, up=True)}, and {format_size(free)} "
            "are free: make room, or set HF_HUB_CACHE to a directory on a larger disk"
        )


def _download(file: HubFile, count: _Count, stop: threading.Event) -> None:
    """Bring one file into the cache."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    locks = file.folder.parent / ".locks" / file.folder.name
    with _disk(file):
        for directory in (locks, file.blob.parent, file.path.parent):
            directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            while True:
                try:  # huggingface_hub's own lock: other programs wait for this download, and this one for theirs
                    held.enter_context(WeakFileLock(locks / f"{file.etag}.lock", timeout=1))
                    break
                except TimeoutError:
                    if stop.is_set():
                        raise Interrupted("stopped: the same command goes on") from None
            if file.present or file.blob_present:
                count.add(file.nbytes)
            else:
                _fetch(file, count, stop)
            if not file.present:
                _link(file)
    count.add(0, files=1)


def _fetch(file: HubFile, count: _Count, stop: threading.Event) -> None:
    """Make the blob of a file, from where an earlier download stopped if there was one."""
    while True:
        with file.partial.open("ab") as stream:
            begun = stream.tell()
            if begun > file.nbytes:
                stream.truncate(0)
                begun = 0
            digest = _new_digest(file)
            with file.partial.open("rb") as earlier:
                while chunk := earlier.read(_CHUNK):
                    digest.update(chunk)
                    count.add(len(chunk))
            for first in range(begun, file.nbytes, _PIECE):
                last = min(first + _PIECE, file.nbytes)
                for chunk in read_file(file.place, file.url, first, last, file.nbytes, stop):
                    stream.write(chunk)
                    digest.update(chunk)
                    count.add(len(chunk))
            stream.flush()
            os.fsync(stream.fileno())
        if digest.hexdigest() == file.etag:
            file.partial.replace(file.blob)
            sync_directory(file.blob.parent)
            return
        file.partial.unlink()
        count.add(-file.nbytes)
        if not begun:
            raise CheckpointError(
                f"{file.place}: what the Hub sent hasn't the hash by which it lists the file ({file.etag}): a proxy "
                "may have changed it; try again without it, and don't trust the file otherwise"
            )
        # the earlier part is to blame, as after a power failure: once more, all of it


def has_hash(path: Path, file: HubFile) -> bool:
    """Whether a local file has the size and the hash by which the Hub lists another. Raises OSError."""
    if path.stat().st_size != file.nbytes:
        return False
    digest = _new_digest(file)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return bool(digest.hexdigest() == file.etag)


def _new_digest(file: HubFile) -> Any:
    """A digest that, fed with the file's bytes, ends up as its etag."""
    if len(file.etag) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.nbytes, usedforsecurity=False)  # as git names a blob


def _link(file: HubFile) -> None:
    """Give a whole blob its name in the snapshot: a link, or the file itself where there can be no links."""
    from huggingface_hub import constants

    temporary = file.path.with_name(f".{file.path.name[:200]}.{os.getpid()}")
    try:
        if getattr(constants, "HF_HUB_DISABLE_SYMLINKS", False):
            raise OSError(errno.EPERM, "links are switched off")
        temporary.symlink_to(os.path.relpath(file.blob, file.path.parent))
    except OSError:
        file.blob.replace(file.path)
    else:
        temporary.replace(file.path)


@contextmanager
def _disk(file: HubFile) -> Iterator[None]:
    """Turn what the disk does to a download into errors of ours."""
    try:
        yield
    except OSError as error:
        what = f"{file.folder}: downloading {file.name} failed ({error.strerror or error})"
        if error.errno in _FULL:
            raise DiskSpaceError(
                f"{what}: {format_size(file.to_fetch, up=True)} are still needed: make room, then run the same command "
                "again; it goes on with what has come so far"
            ) from error
        raise EnvironmentFailure(f"{what}: check the disk and the owner of the cache (HF_HUB_CACHE)") from error
