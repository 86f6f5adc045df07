"""Whose an output directory is: one merge's at a time, and never one that holds anything else.

Everything unfinished lies in ``OUT/.mergeloom``, on the same file system, so that a rename publishes it:

    OUT/.mergeloom/pid        who is at work here
    OUT/.mergeloom/journal    what is made, and what of it is durable
    OUT/.mergeloom/out/       shards and other files that don't have their final names yet
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

from ...errors import CheckpointError, EnvironmentFailure, MergeloomError, UsageError
from ..os_errors import explain
from ..platform import create_file, make_directory, remove_directory, remove_tree, write_at
from .journal import Found, read_journal
from .publishing import Publishing

WORK = ".mergeloom"
JOURNAL = "journal"
HOLDER = "pid"
STAGE = "out"
MANIFEST = "mergeloom.json"
"""The file that only a finished merge has: it gets its name after all others."""

_LOCK_ATTEMPTS = 20
_LOCK_PAUSE = 0.01  # seconds; `classify` holds a shared lock for much less


class Content(Enum):
    """What a directory holds. `merge`, `plan`, `inspect` and `verify` all tell these apart by `classify`."""

    NEW = "new"
    """Nothing, or only what a merge left that had made nothing durable."""
    UNFINISHED = "unfinished"
    FINISHED = "finished"
    FOREIGN = "foreign"
    """Anything else, such as files that mergeloom did not write, or a path that is not a directory."""
    IN_USE = "in use"
    """A merge is writing to it now."""


_ERRORS: dict[Content, type[MergeloomError]] = {
    Content.NEW: CheckpointError,
    Content.UNFINISHED: CheckpointError,
    Content.FINISHED: CheckpointError,
    Content.FOREIGN: UsageError,
    Content.IN_USE: EnvironmentFailure,
}

_NO_MERGE = f"this needs the directory of a finished merge, which has a {MANIFEST}"
TO_FINISH = {
    Content.NEW: _NO_MERGE,
    Content.FOREIGN: _NO_MERGE,
    Content.UNFINISHED: "run the same merge command again to finish it",
    Content.IN_USE: "wait for it",
}
"""The advice for a command that reads a finished merge."""


@dataclass(frozen=True, slots=True)
class DirectoryStatus:
    """A classified directory. Printed, it is the sentence that every command uses for it.

    Args:
        path: the directory.
        content: what it holds.
        words: the same as a predicate, such as "holds an unfinished merge".
        journal: the journal of an unfinished merge.
    """

    path: Path
    content: Content
    words: str
    journal: Found | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.words}"

    def error(self, advice: str) -> MergeloomError:
        """The error for a command that cannot use the directory. Its exit code depends on the content alone."""
        return _ERRORS[self.content](f"{self}; {advice}")


def classify(path: Path, marker: str = MANIFEST, *, held: bool = False) -> DirectoryStatus:
    """What a directory holds. Changes nothing.

    Args:
        path: the directory, which need not exist.
        marker: the name of the file that only a finished merge has.
        held: whether this process holds the lock, or is about to take it; IN_USE is not looked for then.

    Raises:
        EnvironmentFailure: the directory can't be read.
    """
    try:
        if is_whole(path, marker):
            return DirectoryStatus(path, Content.FINISHED, "holds a finished merge")
        if words := _foreign(path):
            return DirectoryStatus(path, Content.FOREIGN, words)
        if not path.exists():
            return DirectoryStatus(path, Content.NEW, "there is no such directory")
        if not held and _is_locked(path):
            return _in_use(path)
        journal = read_journal(path / WORK / JOURNAL)
    except OSError as error:
        raise explain(error, path, "looking at the output directory") from error
    if journal is None:
        return DirectoryStatus(path, Content.NEW, "is empty")
    return DirectoryStatus(path, Content.UNFINISHED, "holds an unfinished merge", journal)


def refuse_occupied(found: DirectoryStatus) -> None:
    """Raise the error of a directory that no merge can write to: UsageError or EnvironmentFailure."""
    if found.content is Content.FOREIGN:
        raise found.error("OUT must be a new or empty directory, and nothing in it is overwritten")
    if found.content is Content.IN_USE:
        raise found.error("wait for it, or choose another OUT")


def _in_use(path: Path) -> DirectoryStatus:
    return DirectoryStatus(path, Content.IN_USE, f"another merge is writing here{_holder(path / WORK)}")


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
    """Lock a directory. Raises BlockingIOError where another merge keeps it locked."""
    for _ in range(_LOCK_ATTEMPTS):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(_LOCK_PAUSE)
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class OutputLock:
    """OUT, held by this process until it is released or the process ends.

    Args:
        path: of the directory; made where it isn't there.
        sign: the name of the file that only a finished merge has.

    Attributes:
        status: what it held when it was locked.
        found: the journal of an unfinished merge, or None.
        whole: whether a finished merge is there; then nothing else is looked at.
        made: the directories that were made for it, OUT first, then its parents.

    Raises:
        UsageError: where something else is in it.
        EnvironmentFailure: where another merge is at work in it, or the disk got in the way.
    """

    def __init__(self, path: Path, sign: str = "") -> None:
        self.path = path
        self.work = path / WORK
        self.stage = self.work / STAGE
        self.journal = self.work / JOURNAL
        self.found: Found | None = None
        self.whole = False
        self.made: list[Path] = []
        self._lock = -1
        try:
            self._take(sign)
        except OSError as error:
            self.release()
            raise explain(error, path, "making the output directory") from error
        except BaseException:
            self.release()
            raise

    def _take(self, sign: str) -> None:
        self.status = classify(self.path, sign, held=True)
        refuse_occupied(self.status)
        self.made = [directory for directory in (self.path, *self.path.parents) if not directory.exists()]
        make_directory(self.path)
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock(self._lock)
        except BlockingIOError:
            refuse_occupied(_in_use(self.path))
        if not self.path.exists() or not os.path.samestat(os.fstat(self._lock), self.path.stat()):
            raise EnvironmentFailure(f"{self.path}: another merge has just removed it; try again")
        # all of it again, now that nobody else can change it
        self.status = classify(self.path, sign, held=True)
        self.whole = self.status.content is Content.FINISHED
        if self.whole:
            if self.work.exists() and os.access(self.path, os.W_OK):  # the merge was stopped before it had cleared up
                remove_tree(self.work)
            return
        refuse_occupied(self.status)
        self.found = self.status.journal
        if self.found is None:  # nothing in it was ever durable
            remove_tree(self.work)
        make_directory(self.stage)
        descriptor = create_file(self.work / HOLDER)
        try:
            write_at(descriptor, f"{os.getpid()}\n".encode(), 0)
        finally:
            os.close(descriptor)

    def abandon(self) -> None:
        """Remove what was begun, and OUT itself where this merge made it. Only for a merge with nothing durable."""
        with contextlib.suppress(OSError):
            remove_tree(self.work)
            for directory in self.made:
                remove_directory(directory)

    def release(self) -> None:
        """Let others have OUT; a second time does nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _foreign(path: Path) -> str:
    """Why neither a merge can begin at a path, nor one is there; empty where that is not so."""
    if "\0" in str(path):
        return "is not a valid name of a directory"
    if not path.exists():
        return "is a broken link" if path.is_symlink() else ""
    if not path.is_dir():
        return "is a file"
    if special := _special(path / WORK):
        return f"holds {special.relative_to(path)}, which no merge makes (a link, or a special file): remove it"
    present = {entry.name for entry in path.iterdir()} - {WORK}
    if present and (found := read_journal(path / WORK / JOURNAL)) is not None:
        names = published_names(found)
        for name in names:
            within = [path / name, *(path / parent for parent in PurePosixPath(name).parents)][:-1]
            if link := next((each for each in within if each.is_symlink()), None):
                return f"holds {link.relative_to(path)}, a link, which no merge makes: remove it"
        present -= {PurePosixPath(name).parts[0] for name in names}
    if not present:
        return ""
    shown = ", ".join(sorted(present)[:3]) + (", ..." if len(present) > 3 else "")
    return f"is not empty ({shown}), and mergeloom did not write these files"


def _special(path: Path) -> Path | None:
    """A link, pipe or device at or below a path: what is written or removed there might lie anywhere."""
    try:
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            return next((found for entry in path.iterdir() if (found := _special(entry)) is not None), None)
    except FileNotFoundError:  # or another merge has just removed it
        return None
    return None if stat.S_ISREG(mode) else path


def is_whole(path: Path, sign: str) -> bool:
    """Whether a finished merge is in a directory: the file that gets its name after all others has it."""
    return bool(sign) and (path / sign).is_file()


def published_names(found: Found) -> list[str]:
    """The names that an unfinished merge may have given in OUT already; none that leads out of it."""
    started = (publishing for record in found.records if (publishing := Publishing.from_json(record)) is not None)
    return list(dict.fromkeys(name for publishing in started for name in publishing.names if is_inside(name)))


def is_inside(name: str) -> bool:
    """Whether a relative path names something below its directory, and not what a merge keeps to itself."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and "\0" not in name and not {"..", WORK} & set(parts)


def _holder(work: Path) -> str:
    """Who holds OUT, as far as is known."""
    try:
        return f" (process {int((work / HOLDER).read_text())})"
    except (OSError, ValueError):
        return ""
