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
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..errors import EnvironmentFailure, UsageError
from .failures import explain
from .journal import Found, read_journal
from .platform import create_file, make_directory, remove_directory, remove_tree, write_at

WORK = ".mergeloom"
JOURNAL = "journal"
HOLDER = "pid"
STAGE = "out"

_EMPTY = "OUT must be a new or empty directory"


class Claim:
    """OUT, held by this process until it is released or the process ends.

    Args:
        path: of the directory; made where it isn't there.
        sign: the name of the file that only a finished merge has.

    Attributes:
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
        if not is_whole(self.path, sign):
            refuse_foreign(self.path)
        self.made = [directory for directory in (self.path, *self.path.parents) if not directory.exists()]
        make_directory(self.path)
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EnvironmentFailure(
                f"{self.path}: another merge is writing here{_holder(self.work)}; wait for it, or choose another OUT"
            ) from error
        if not self.path.exists() or not os.path.samestat(os.fstat(self._lock), self.path.stat()):
            raise EnvironmentFailure(f"{self.path}: another merge has just removed it; try again")
        # all of it again, now that nobody else can change it
        self.whole = is_whole(self.path, sign)
        if self.whole:
            if self.work.exists() and os.access(self.path, os.W_OK):  # the merge was stopped before it had cleared up
                remove_tree(self.work)
            return
        refuse_foreign(self.path)
        self.found = read_journal(self.journal)
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


def refuse_foreign(path: Path) -> None:
    """Refuse an OUT that is no directory, or holds anything that is not an unfinished merge's.

    Raises:
        UsageError: says what it is, or holds.
        EnvironmentFailure: it can't be looked at.
    """
    try:
        problem = _foreign(path)
    except OSError as error:
        raise explain(error, path, "looking at the output directory") from error
    if problem:
        raise UsageError(f"{path}: {problem}")


def _foreign(path: Path) -> str:
    if "\0" in str(path):
        return "is no name that a directory can have"
    if not path.exists():
        return f"is a broken link; {_EMPTY}" if path.is_symlink() else ""
    if not path.is_dir():
        return f"is a file; {_EMPTY}"
    if special := _special(path / WORK):
        return f"holds {special.relative_to(path)}, which no merge has made (a link, or a special file): remove it"
    present = {entry.name for entry in path.iterdir()} - {WORK}
    if present and (found := read_journal(path / WORK / JOURNAL)) is not None:
        names = published_names(found)
        for name in names:
            within = [path / name, *(path / parent for parent in PurePosixPath(name).parents)][:-1]
            if link := next((each for each in within if each.is_symlink()), None):
                return f"holds {link.relative_to(path)}, a link, which no merge has made: remove it"
        present -= {PurePosixPath(name).parts[0] for name in names}
    if not present:
        return ""
    shown = ", ".join(sorted(present)[:3]) + (", ..." if len(present) > 3 else "")
    return f"is not empty ({shown}); {_EMPTY}, so that nothing is overwritten"


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
    names: Iterable[object] = [name for record in found.records for name in _listed(record.get("publish"))]
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and is_inside(name)))


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


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
