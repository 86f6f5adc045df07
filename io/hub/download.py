"""Downloads files from the Hub into huggingface_hub's cache and resumes interrupted downloads.

huggingface_hub (2.4) discards an unfinished file when its process ends, but merges need many large files: a 405B model
has 191 files of 5 GB. So the data is downloaded here, with huggingface_hub's client, token, cache layout and locks. A
file enters the cache when it is complete, durable, and has the hash that the Hub lists.
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

from ...errors import CheckpointError, DiskSpaceError, Interrupted
from ..os_errors import translate_os_error
from ..platform import sync_directory
from ..sizes import format_size
from .http import OFFLINE, in_parallel, is_offline, read_file
from .repository import HubFile

THREADS = 8
"""The number of files to download at a time."""

_CHUNK = 1 << 20
_REQUEST_BYTES = 1 << 30  # content delivery networks reject ranges of more than about 50 GB


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """The progress of a download.

    Args:
        files_done: the number of complete files.
        files: the number of files to download.
        bytes_done: the number of downloaded bytes, including those of an earlier, interrupted download.
        nbytes: the size of all files in bytes.
    """

    files_done: int
    files: int
    bytes_done: int
    nbytes: int


class _ProgressCounter:
    """Sums up the progress of the threads of a download."""

    def __init__(self, files: Sequence[HubFile]) -> None:
        self._lock = threading.Lock()
        self._files = len(files)
        self._nbytes = sum(file.nbytes for file in files)
        self._files_done = 0
        self._bytes_done = 0

    def add(self, nbytes: int, files: int = 0) -> None:
        """Count bytes (a negative number for bytes that must be fetched again) and complete files."""
        with self._lock:
            self._bytes_done += nbytes
            self._files_done += files

    def progress(self) -> DownloadProgress:
        """The progress so far."""
        with self._lock:
            return DownloadProgress(self._files_done, self._files, self._bytes_done, self._nbytes)


def download(files: Iterable[HubFile], notify: Callable[[DownloadProgress], None] | None = None) -> None:
    """Download the files that are not in the cache. Afterwards the `path` of each file exists.

    Args:
        files: the files, from any repositories.
        notify: a function that is called with the progress about ten times a second and at the end.

    Raises:
        CheckpointError: the Hub refuses access or sends another file than it lists, or HF_HUB_OFFLINE is set.
        DiskSpaceError: the disk of the cache is full or too small.
        EnvironmentFailure: the Hub is not reachable, all retries failed, or the file system failed.
    """
    missing = list({file.path: file for file in files if not file.present}.values())
    if not missing:
        return
    if is_offline() and any(file.to_fetch for file in missing):
        more = f" (and {len(missing) - 1} more files)" if len(missing) > 1 else ""
        raise CheckpointError(f"{missing[0].location}{more}: {OFFLINE}")
    _check_space(missing)
    counter = _ProgressCounter(missing)
    tick = None if notify is None else lambda: notify(counter.progress())
    in_parallel(lambda file, stop: _download(file, counter, stop), missing, min(THREADS, len(missing)), tick)
    if tick:
        tick()


def _check_space(missing: Sequence[HubFile]) -> None:
    """Raise DiskSpaceError if the missing files need more space than is free."""
    needed = sum({file.blob: file.to_fetch for file in missing}.values())
    folder = missing[0].folder
    with _translating_os_errors(missing[0]):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskSpaceError(
            f"{folder.parent}: the missing files need {format_size(needed, up=True)}, but only {format_size(free)} are "
            "free: make room, or set HF_HUB_CACHE to a directory on a larger disk"
        )


def _download(file: HubFile, counter: _ProgressCounter, stop: threading.Event) -> None:
    """Download one file into the cache, or link its blob if another commit brought it."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    locks = file.folder.parent / ".locks" / file.folder.name
    with _translating_os_errors(file):
        for directory in (locks, file.blob.parent, file.path.parent):
            directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            while True:
                try:  # huggingface_hub's lock: excludes concurrent downloads by other programs
                    stack.enter_context(WeakFileLock(locks / f"{file.etag}.lock", timeout=1))
                    break
                except TimeoutError:
                    if stop.is_set():
                        raise Interrupted("stopped: run the same command to resume") from None
            if file.present or file.blob_present:
                counter.add(file.nbytes)
            else:
                _fetch(file, counter, stop)
            if not file.present:
                _link(file)
    counter.add(0, files=1)


def _fetch(file: HubFile, counter: _ProgressCounter, stop: threading.Event) -> None:
    """Download the blob of a file, resuming an earlier download if there is one."""
    while True:
        with file.partial.open("ab") as stream:
            resumed = stream.tell()
            if resumed > file.nbytes:
                stream.truncate(0)
                resumed = 0
            digest = _new_digest(file)
            with file.partial.open("rb") as partial:
                while chunk := partial.read(_CHUNK):
                    digest.update(chunk)
                    counter.add(len(chunk))
            for start in range(resumed, file.nbytes, _REQUEST_BYTES):
                end = min(start + _REQUEST_BYTES, file.nbytes)
                for chunk in read_file(file.location, file.url, start, end, file.nbytes, stop):
                    stream.write(chunk)
                    digest.update(chunk)
                    counter.add(len(chunk))
            stream.flush()
            os.fsync(stream.fileno())
        if digest.hexdigest() == file.etag:
            file.partial.replace(file.blob)
            sync_directory(file.blob.parent)
            return
        file.partial.unlink()
        counter.add(-file.nbytes)
        if not resumed:
            raise CheckpointError(
                f"{file.location}: the downloaded file doesn't have the hash that the Hub lists ({file.etag}): a proxy "
                "may have changed it; try again without the proxy, and don't trust the file otherwise"
            )
        # the resumed part was damaged, for example by a power failure: download the complete file again


def has_hash(path: Path, file: HubFile) -> bool:
    """Whether a local file has the size and the hash of a file on the Hub. Raises OSError."""
    if path.stat().st_size != file.nbytes:
        return False
    digest = _new_digest(file)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return bool(digest.hexdigest() == file.etag)


def _new_digest(file: HubFile) -> Any:
    """A hash object for the kind of hash in the file's etag."""
    if len(file.etag) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.nbytes, usedforsecurity=False)  # git's blob hash


def _link(file: HubFile) -> None:
    """Link a complete blob into the snapshot, or move it there if the file system has no symbolic links."""
    from huggingface_hub import constants

    temporary = file.path.with_name(f".{file.path.name[:200]}.{os.getpid()}")
    try:
        if getattr(constants, "HF_HUB_DISABLE_SYMLINKS", False):
            raise OSError(errno.EPERM, "symbolic links are disabled")
        temporary.symlink_to(os.path.relpath(file.blob, file.path.parent))
    except OSError:
        file.blob.replace(file.path)
    else:
        temporary.replace(file.path)


@contextmanager
def _translating_os_errors(file: HubFile) -> Iterator[None]:
    """Translate an OSError raised inside the block, which downloads `file`."""
    try:
        yield
    except OSError as error:
        advice = "check the disk and the owner of the cache (HF_HUB_CACHE)"
        raise translate_os_error(error, file.folder, f"downloading {file.name}", advice=advice) from error
