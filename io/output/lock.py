"""Classifies output directories and locks them: one merge at a time, and never a directory with other files.

Unfinished work is in ``OUT/.mergeloom``, on the same file system, so a rename publishes it:

    OUT/.mergeloom/pid        the process that is writing
    OUT/.mergeloom/journal    the plan of the merge and the parts of its output that are durable
    OUT/.mergeloom/out/       the stage: shards and other files that are not published yet
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from types import TracebackType

from ...errors import CheckpointError, EnvironmentFailure, MergeloomError, UsageError
from ..os_errors import translate_os_error
from ..platform import create_file, make_directory, remove_directory, remove_tree, write_at
from .journal import JournalContent, read_journal
from .publishing import Publishing

WORK = ".mergeloom"
JOURNAL = "journal"
HOLDER = "pid"
STAGE = "out"
MANIFEST = "mergeloom.json"
"""The completion marker: the file that is published after all others, so only a finished merge has it."""
EXTRACTION = "mergeloom_extraction.json"
"""The completion marker of an extracted adapter."""

MAX_NAME_BYTES = 255
"""The longest name of a file or directory in bytes."""
MAX_PATH_BYTES = 4096 - 512
"""The longest path of an output directory in bytes: the system's limit, less the names of the files in it."""

_LOCK_ATTEMPTS = 20
_LOCK_PAUSE = 0.01  # seconds; `classify` holds its shared lock for much less


class Content(Enum):
    """The content of a directory, as `classify` determines it for all commands."""

    NEW = "new"
    """Nothing, or only the remains of a run that made nothing durable."""
    UNFINISHED = "unfinished"
    FINISHED = "finished"
    FOREIGN = "foreign"
    """Files that this command did not write, or a path that is not a directory."""
    IN_USE = "in use"
    """Another run is writing to it."""


_ERRORS: dict[Content, type[MergeloomError]] = {
    Content.NEW: CheckpointError,
    Content.UNFINISHED: CheckpointError,
    Content.FINISHED: CheckpointError,
    Content.FOREIGN: UsageError,
    Content.IN_USE: EnvironmentFailure,
}

_PRODUCTS = {MANIFEST: "merge", EXTRACTION: "extraction of an adapter"}
"""What a directory holds the result of, by its completion marker."""
_NO_RESULT = (
    f"expected the directory of a finished merge, which has a {MANIFEST}, or of an extracted adapter, which has a "
    f"{EXTRACTION}"
)
TO_FINISH = {
    Content.NEW: _NO_RESULT,
    Content.FOREIGN: _NO_RESULT,
    Content.UNFINISHED: "run the command that began it again, to finish it",
    Content.IN_USE: "wait for it",
}
"""The advice for a command that reads a finished merge or adapter."""


@dataclass(frozen=True, slots=True)
class DirectoryStatus:
    """A classified directory. Its string is the sentence that all commands print about it.

    Args:
        path: the directory.
        content: the content of the directory.
        description: the content as a predicate, such as "holds an unfinished merge".
        journal: the journal of an unfinished merge.
    """

    path: Path
    content: Content
    description: str
    journal: JournalContent | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.description}"

    def error(self, advice: str) -> MergeloomError:
        """The error for a command that cannot use the directory. Its exit code depends only on the content."""
        return _ERRORS[self.content](f"{self}; {advice}")


def classify(path: Path, marker: str = MANIFEST, *, held: bool = False) -> DirectoryStatus:
    """Determine the content of a directory, without changing anything.

    Args:
        path: the directory, which need not exist.
        marker: the name of the completion marker; empty if no file is one.
        held: whether this process holds the lock or is about to acquire it; the lock is not checked then.

    Raises:
        UsageError: the path is too long for the file system.
        EnvironmentFailure: the directory can't be read.
    """
    _check_length(path)
    try:
        if is_complete(path, marker):
            return DirectoryStatus(path, Content.FINISHED, f"holds a finished {_PRODUCTS.get(marker, 'merge')}")
        if other := next((each for each in _PRODUCTS if is_complete(path, each)), ""):
            return DirectoryStatus(path, Content.FOREIGN, f"holds a finished {_PRODUCTS[other]}")
        if description := _describe_foreign(path):
            return DirectoryStatus(path, Content.FOREIGN, description)
        if not path.exists():
            return DirectoryStatus(path, Content.NEW, "there is no such directory")
        if not held and _is_locked(path):
            return _in_use(path)
        journal = read_journal(path / WORK / JOURNAL)
    except OSError as error:
        raise translate_os_error(error, path, "reading the output directory") from error
    if journal is None:
        return DirectoryStatus(path, Content.NEW, "is empty")
    product = _PRODUCTS[EXTRACTION if "extract" in journal.facts else MANIFEST]
    return DirectoryStatus(path, Content.UNFINISHED, f"holds an unfinished {product}", journal)


def _check_length(path: Path) -> None:
    """Raise UsageError if the file system can't have a directory with this path, or no files in it."""
    longest = max(map(len, map(os.fsencode, path.parts)), default=0)
    if longest > MAX_NAME_BYTES:
        raise UsageError(f"{path}: a name of {longest} bytes is too long: file systems allow {MAX_NAME_BYTES}")
    size = len(os.fsencode(path.absolute()))
    if size > MAX_PATH_BYTES:
        raise UsageError(f"{path}: a path of {size:,} bytes is too long: choose one of at most {MAX_PATH_BYTES:,}")


def refuse_occupied(status: DirectoryStatus) -> None:
    """Raise UsageError for a foreign directory and EnvironmentFailure for one in use."""
    if status.content is Content.FOREIGN:
        raise status.error("OUT must be a new or empty directory, and nothing in it is overwritten")
    if status.content is Content.IN_USE:
        raise status.error("wait for it, or choose another OUT")


def _in_use(path: Path) -> DirectoryStatus:
    holder = _describe_holder(path / WORK)
    return DirectoryStatus(path, Content.IN_USE, f"another run of mergeloom is writing here{holder}")


def _is_locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _lock(descriptor: int) -> None:
    """Lock a directory exclusively. Raises BlockingIOError if another merge holds the lock."""
    for _ in range(_LOCK_ATTEMPTS):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(_LOCK_PAUSE)
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class OutputLock:
    """The lock of an output directory: one process at a time can merge into it.

        with OutputLock(path, MANIFEST) as lock:
            if not lock.complete: ...

    The system releases the lock when the process ends, however it ends.

    Args:
        path: the output directory, created if it does not exist.
        completion_marker: the name of the file that only a finished merge has.

    Attributes:
        status: the content of the directory when it was locked.
        journal: the journal of an unfinished merge, or None.
        complete: whether the directory holds a finished merge.
        created: the directories that were created: OUT first, then its parents.
    """

    status: DirectoryStatus

    def __init__(self, path: Path, completion_marker: str = "") -> None:
        self.path = path
        self.work = path / WORK
        self.stage = self.work / STAGE
        self.journal_path = self.work / JOURNAL
        self.journal: JournalContent | None = None
        self.complete = False
        self.created: list[Path] = []
        self._completion_marker = completion_marker
        self._lock = -1

    def __enter__(self) -> OutputLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> OutputLock:
        """Create the directory if necessary, lock it and read its journal.

        Raises:
            UsageError: the directory contains files that mergeloom did not write.
            EnvironmentFailure: another merge holds the lock, or the file system failed.
        """
        try:
            self._acquire()
        except OSError as error:
            self.release()
            raise translate_os_error(error, self.path, "creating the output directory") from error
        except BaseException:
            self.release()
            raise
        return self

    def _acquire(self) -> None:
        self.status = classify(self.path, self._completion_marker, held=True)
        refuse_occupied(self.status)
        self.created = [directory for directory in (self.path, *self.path.parents) if not directory.exists()]
        make_directory(self.path)
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock(self._lock)
        except BlockingIOError:
            refuse_occupied(_in_use(self.path))
        if not self.path.exists() or not os.path.samestat(os.fstat(self._lock), self.path.stat()):
            raise EnvironmentFailure(f"{self.path}: another merge has just removed it; try again")
        # classify again: another merge may have changed the directory before it was locked
        self.status = classify(self.path, self._completion_marker, held=True)
        self.complete = self.status.content is Content.FINISHED
        if self.complete:
            if self.work.exists() and os.access(self.path, os.W_OK):  # the merge was killed during its cleanup
                remove_tree(self.work)
            return
        refuse_occupied(self.status)
        self.journal = self.status.journal
        if self.journal is None:  # it contains nothing durable
            remove_tree(self.work)
        make_directory(self.stage)
        descriptor = create_file(self.work / HOLDER)
        try:
            write_at(descriptor, f"{os.getpid()}\n".encode(), 0)
        finally:
            os.close(descriptor)

    def abandon(self) -> None:
        """Remove the work directory and all directories that were created. Only for a merge with nothing durable."""
        with contextlib.suppress(OSError):
            remove_tree(self.work)
            for directory in self.created:
                remove_directory(directory)

    def release(self) -> None:
        """Release the lock. Calling it again has no effect."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _describe_foreign(path: Path) -> str:
    """Why a path is neither a merge's output nor usable for one, as a predicate; empty if it is."""
    if "\0" in str(path):
        return "is not a valid directory name"
    if not path.exists():
        return "is a broken link" if path.is_symlink() else ""
    if not path.is_dir():
        return "is a file"
    if special := _find_special(path / WORK):
        return f"holds {special.relative_to(path)}, a link or special file that no merge creates: remove it"
    present = {entry.name for entry in path.iterdir()} - {WORK}
    if present and (journal := read_journal(path / WORK / JOURNAL)) is not None:
        names = published_names(journal)
        for name in names:
            within = [path / name, *(path / parent for parent in PurePosixPath(name).parents)][:-1]
            if link := next((each for each in within if each.is_symlink()), None):
                return f"holds {link.relative_to(path)}, a link that no merge creates: remove it"
        present -= {PurePosixPath(name).parts[0] for name in names}
    if not present:
        return ""
    shown = ", ".join(sorted(present)[:3]) + (", ..." if len(present) > 3 else "")
    return f"is not empty ({shown}), and mergeloom did not write these files"


def _find_special(path: Path) -> Path | None:
    """Find a link, pipe or device at or below a path. Writing or removing through a link could hit any file."""
    try:
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            return next((special for entry in path.iterdir() if (special := _find_special(entry)) is not None), None)
    except FileNotFoundError:  # missing, or just removed by another merge
        return None
    return None if stat.S_ISREG(mode) else path


def is_complete(path: Path, completion_marker: str) -> bool:
    """Whether a directory holds what is finished: its completion marker exists. Never raises."""
    return bool(completion_marker) and os.path.isfile(path / completion_marker)  # noqa: PTH113  Path.is_file raises


def published_names(found: JournalContent) -> list[str]:
    """The names that an unfinished merge may have published in OUT already, without those that point outside OUT."""
    started = (publishing for record in found.records if (publishing := Publishing.from_json(record)) is not None)
    return list(dict.fromkeys(name for publishing in started for name in publishing.names if is_inside(name)))


def is_inside(name: str) -> bool:
    """Whether a relative path stays below its directory and out of the work directory."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and "\0" not in name and not {"..", WORK} & set(parts)


def _describe_holder(work: Path) -> str:
    """The process that holds the lock, in parentheses; empty if unknown."""
    try:
        return f" (process {int((work / HOLDER).read_text())})"
    except (OSError, ValueError):
        return ""
