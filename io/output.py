"""The output directory while it is being made: shards under temporary names, then all of it under its own.

Everything unfinished lies in ``OUT/.mergeloom``, on the same file system, so that a rename publishes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, DiskSpaceError, EnvironmentFailure, UsageError
from .copying import Moved, move
from .digests import file_digest
from .files import copy_file
from .journal import Found, read_journal
from .platform import file_system, reserve_space, start_writeback, sync_directory, write_at
from .reading import FilePool
from .sizes import format_size

WORK = ".mergeloom"
JOURNAL = "journal"
HOLDER = "pid"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_IN_MEMORY = {"tmpfs", "ramfs"}  # to reserve there is to fill with zeros
_WRITEBACK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard to be.

    Args:
        name: its final name.
        header: its first bytes, final.
        nbytes: its size, the header included.
        computed: ranges (offset, bytes) that need disk space of their own.
    """

    name: str
    header: bytes
    nbytes: int
    computed: tuple[tuple[int, int], ...]


class OutputDirectory:
    """OUT, held by one process at a time. What an earlier process left unfinished in it stays, to be gone on with.

    Args:
        path: of the directory; made where it isn't there.

    Attributes:
        found: the journal of an unfinished merge, or None.

    Raises:
        UsageError: where something else is in it.
        EnvironmentFailure: where another merge is at work in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / WORK
        self.journal = self.work / JOURNAL
        self.found: Found | None = None
        self._files = FilePool(os.O_RDWR, 128)
        self._sources = FilePool(os.O_RDONLY, 128)
        self._shards: tuple[ShardFile, ...] = ()
        self._made: list[Path] = []
        self._lock = -1
        try:
            refuse_foreign(path)
            self._made = [directory for directory in (path, *path.parents) if not directory.exists()]
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            refuse_foreign(path)  # again, now that nobody else can finish a merge here
            self.found = read_journal(self.journal)
            if self.found is None and self.work.exists():  # nothing in it was ever durable
                shutil.rmtree(self.work)
            self.work.mkdir(exist_ok=True)
            (self.work / HOLDER).write_text(f"{os.getpid()}\n")
        except BlockingIOError as error:
            self.close()
            raise EnvironmentFailure(
                f"{path}: another merge is writing here{_holder(self.work)}; wait for it, or choose another OUT"
            ) from error
        except OSError as error:
            self.close()
            raise _explain(error, path, "making the output directory") from error
        except BaseException:
            self.close()
            raise

    def start_over(self) -> None:
        """Forget the unfinished merge."""
        if self.found is not None:
            for name in published_names(self.found):
                (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        self.found = None

    def begin(self, shards: Sequence[ShardFile], shared: int = 0) -> None:
        """Make every shard at its full size, with its header, and reserve the disk space that will be needed.

        Args:
            shards: all of them.
            shared: bytes of them that will take no space.

        Shards that are there already, from an unfinished merge of the same plan, stay as they are.

        Raises:
            DiskSpaceError: where there is too little room.
            EnvironmentFailure: where a shard of the unfinished merge isn't what it was.
        """
        self._shards = tuple(shards)
        if self.found is not None:
            for number in range(len(shards)):
                self._check_shard(number)
            for file in self._small_files().values():  # they are written again
                file.unlink()
            return
        needed = sum(shard.nbytes for shard in shards) - shared
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise DiskSpaceError(
                f"{self.path}: the output takes {format_size(needed, up=True)} and {format_size(free)} are free; "
                "make room, or choose another OUT"
            )
        reserves = file_system(self.path) not in _IN_MEMORY
        for shard in shards:
            try:
                descriptor = os.open(self.work / shard.name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                try:
                    os.ftruncate(descriptor, shard.nbytes)
                    write_at(descriptor, shard.header, 0)
                    for offset, nbytes in shard.computed if reserves else ():
                        reserve_space(descriptor, offset, nbytes)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise _explain(error, self.path, f"making {shard.name}") from error

    def _check_shard(self, number: int) -> None:
        """A shard of the unfinished merge must be there, with its size and header."""
        shard = self._shards[number]
        try:
            with self._place(number).open("rb") as stream:
                whole = os.fstat(stream.fileno()).st_size == shard.nbytes
                if whole and stream.read(len(shard.header)) == shard.header:
                    return
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _explain(error, self.path, f"reading {shard.name}") from error
        raise EnvironmentFailure(
            f"{self.path}: {shard.name} of the unfinished merge was removed or changed since; start over with --fresh"
        )

    def _place(self, shard: int) -> Path:
        """Where a shard lies now: an interrupted `publish` may have given it its final name already."""
        name = self._shards[shard].name
        return self.path / name if (self.path / name).exists() else self.work / name

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Put `data` at `offset` of a shard. Safe to call from several threads."""
        name = self._shards[shard].name
        try:
            descriptor = self._files.acquire(self.work / name)
            try:
                write_at(descriptor, data, offset)
                if len(data) >= _WRITEBACK_BYTES // 8:
                    start_writeback(descriptor, offset, len(data))
            finally:
                self._files.release(descriptor)
        except OSError as error:
            raise _explain(error, self.path, f"writing {len(data)} bytes to {name}") from error

    def receive(
        self, shard: int, target: int, source: Path, offset: int, nbytes: int, buffer: memoryview, *, share: bool
    ) -> Moved:
        """Make a range of a shard a copy of a range of a source file, sharing blocks where that can be.

        Safe to call from several threads, each with a buffer of its own.

        Raises:
            CheckpointError: where the source can't be read.
            DiskSpaceError: where there is no room.
        """
        name = self._shards[shard].name
        try:
            descriptor = self._sources.acquire(source)
        except OSError as error:
            raise CheckpointError(f"{source}: can't be opened: {error.strerror}") from error
        try:
            written = self._files.acquire(self.work / name)
            try:
                return move(descriptor, offset, written, target, nbytes, buffer, share=share)
            finally:
                self._files.release(written)
        except EOFError as error:
            raise CheckpointError(
                f"{source}: ends at byte {error}, where its header promises more: it was cut short while it was being "
                "copied; put the whole file back and run the same command again"
            ) from error
        except OSError as error:
            raise _explain(error, self.path, f"copying {nbytes} bytes from {source} to {name}") from error
        finally:
            self._sources.release(descriptor)

    def sync(self, shards: Collection[int]) -> None:
        """Make all that was written to these shards durable."""
        for number in shards:
            try:
                descriptor = self._files.acquire(self.work / self._shards[number].name)
                try:
                    os.fdatasync(descriptor)
                finally:
                    self._files.release(descriptor)
            except OSError as error:
                raise _explain(error, self.path, f"syncing {self._shards[number].name}") from error

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file under its final name once OUT is published; until then beside the shards."""
        try:
            target = self.work / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise _explain(error, self.path, f"writing {name}") from error

    def small_files(self) -> dict[str, str]:
        """The digests of all files beside the shards that have been written so far, by name."""
        return {name: file_digest(file) for name, file in sorted(self._small_files().items())}

    def _small_files(self) -> dict[str, Path]:
        """All files beside the shards that have no final name yet."""
        names = {shard.name for shard in self._shards} | {JOURNAL, HOLDER}
        files = {str(file.relative_to(self.work)): file for file in self.work.rglob("*") if file.is_file()}
        return {name: file for name, file in files.items() if name not in names}

    def copy_file(self, name: str, source: Path) -> None:
        """Copy a file; it gets its final name once OUT is published."""
        copy_file(source, self.work / name)

    def publish(self, last: Sequence[str], announce: Callable[[Sequence[str]], None]) -> None:
        """Give every file its final name, those in `last` after all others; then OUT is whole.

        Args:
            last: names, the very last one at the end.
            announce: called with all names before the first is given, to make them durable.

        Raises:
            MergeloomError: where the safetensors library does not accept a shard, or the disk got in the way.
        """
        self._files.close()
        for number, shard in enumerate(self._shards):
            judge(self._place(number), shard.name)
        names = sorted(
            str(file.relative_to(self.work))
            for file in self.work.rglob("*")
            if (file.is_file() or file.is_symlink()) and file.name not in (JOURNAL, HOLDER)
        )
        ordered = [name for name in names if name not in last] + [name for name in last if name in names]
        try:
            announce(ordered)
            for name in ordered:
                target = self.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                (self.work / name).rename(target)
            for directory in dict.fromkeys((self.path / name).parent for name in ordered):
                sync_directory(directory)
            sync_directory(self.path)
            self.journal.unlink(missing_ok=True)
            shutil.rmtree(self.work)
        except OSError as error:
            raise _explain(error, self.path, "giving the files their names") from error

    def abandon(self) -> None:
        """Remove what was begun, and OUT itself where this merge made it. Only for a merge with nothing durable."""
        self._files.close()
        shutil.rmtree(self.work, ignore_errors=True)
        with contextlib.suppress(OSError):
            for directory in self._made:
                directory.rmdir()

    def close(self) -> None:
        """Let others have OUT."""
        self._files.close()
        self._sources.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def refuse_foreign(path: Path) -> None:
    """Refuse an OUT that is no directory, or holds anything that is not an unfinished merge's. Raises UsageError."""
    if not path.exists():
        if path.is_symlink():
            raise UsageError(f"{path}: is a broken link; OUT must be a new or empty directory")
        return
    if not path.is_dir():
        raise UsageError(f"{path}: is a file; OUT must be a new or empty directory")
    present = {entry.name for entry in path.iterdir()} - {WORK}
    if present and (found := read_journal(path / WORK / JOURNAL)) is not None:
        present -= {Path(name).parts[0] for name in published_names(found)}
    if present:
        shown = ", ".join(sorted(present)[:3]) + (", ..." if len(present) > 3 else "")
        raise UsageError(
            f"{path}: is not empty ({shown}); OUT must be a new or empty directory, so that nothing is overwritten"
        )


def published_names(found: Found) -> list[str]:
    """The names that an unfinished merge may have given in OUT already."""
    return [name for record in found.records for name in record.get("publish", ())]


def _holder(work: Path) -> str:
    """Who holds OUT, as far as is known."""
    try:
        return f" (process {int((work / HOLDER).read_text())})"
    except (OSError, ValueError):
        return ""


def index_bytes(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """A ``model.safetensors.index.json``: the shard of each tensor, and the bytes of all tensors together."""
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def judge(file: Path, name: str) -> None:
    """Let the safetensors library open a shard, which must be whole. Raises EnvironmentFailure where it doesn't."""
    import safetensors

    try:
        with safetensors.safe_open(file, framework="numpy"):
            return
    except safetensors.SafetensorError as error:
        raise EnvironmentFailure(
            f"{name}: the safetensors library does not accept what was written ({error}): the disk lost data, or this "
            "is a bug; please report it"
        ) from error


def _explain(error: OSError, path: Path, what: str) -> DiskSpaceError | EnvironmentFailure:
    if error.errno in _FULL:
        there = next(directory for directory in (path, *path.parents) if directory.exists())
        free = shutil.disk_usage(there).free
        return DiskSpaceError(
            f"{path}: no space left while {what} ({format_size(free)} free): make room and run the same command again"
        )
    return EnvironmentFailure(f"{path}: {what} failed: {error.strerror or error}")
