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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DiskSpaceError, EnvironmentFailure, UsageError
from .files import copy_file
from .platform import reserve_space, start_writeback, sync_directory, write_at
from .reading import FilePool
from .sizes import format_size

WORK = ".mergeloom"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
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
    """OUT, held by one process at a time.

    Args:
        path: of the directory; made where it isn't there.

    Raises:
        UsageError: where something else is in it.
        EnvironmentFailure: where another merge is at work in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / WORK
        self._files = FilePool(os.O_RDWR, 128)
        self._shards: tuple[ShardFile, ...] = ()
        self._published: list[Path] = []
        self._made: list[Path] = []
        self._lock = -1
        try:
            _refuse_foreign(path)
            self._made = [directory for directory in (path, *path.parents) if not directory.exists()]
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _refuse_foreign(path)  # again, now that nobody else can finish a merge here
            if self.work.exists():  # what a merge that was killed has left
                shutil.rmtree(self.work)
            self.work.mkdir()
        except BlockingIOError as error:
            self.close()
            raise EnvironmentFailure(
                f"{path}: another merge is writing here; wait for it, or choose another OUT"
            ) from error
        except OSError as error:
            self.close()
            raise _explain(error, path, "making the output directory") from error
        except BaseException:
            self.close()
            raise

    def begin(self, shards: Sequence[ShardFile]) -> None:
        """Make every shard at its full size, with its header, and reserve the disk space that will be needed.

        Raises:
            DiskSpaceError: where there is too little room.
        """
        self._shards = tuple(shards)
        needed = sum(shard.nbytes for shard in shards)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise DiskSpaceError(
                f"{self.path}: the output takes {format_size(needed, up=True)} and {format_size(free)} are free; "
                "make room, or choose another OUT"
            )
        for shard in shards:
            try:
                descriptor = os.open(self.work / shard.name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                try:
                    os.ftruncate(descriptor, shard.nbytes)
                    write_at(descriptor, shard.header, 0)
                    for offset, nbytes in shard.computed:
                        reserve_space(descriptor, offset, nbytes)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise _explain(error, self.path, f"making {shard.name}") from error

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

    def sync(self) -> None:
        """Make all that was written to the shards durable."""
        for shard in self._shards:
            try:
                descriptor = self._files.acquire(self.work / shard.name)
                try:
                    os.fsync(descriptor)
                finally:
                    self._files.release(descriptor)
            except OSError as error:
                raise _explain(error, self.path, f"syncing {shard.name}") from error

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

    def copy_file(self, name: str, source: Path) -> None:
        """Copy a file; it gets its final name once OUT is published."""
        copy_file(source, self.work / name)

    def publish(self, last: Sequence[str]) -> None:
        """Give every file its final name, those in `last` after all others; then OUT is whole.

        Raises:
            MergeloomError: where the safetensors library does not accept a shard, or the disk got in the way.
        """
        self._files.close()
        for shard in self._shards:
            judge(self.work / shard.name, shard.name)
        names = sorted(
            str(file.relative_to(self.work)) for file in self.work.rglob("*") if file.is_file() or file.is_symlink()
        )
        ordered = [name for name in names if name not in last] + [name for name in last if name in names]
        try:
            for name in ordered:
                target = self.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self._published.append(target)
                (self.work / name).rename(target)
            for directory in dict.fromkeys(target.parent for target in self._published):
                sync_directory(directory)
            sync_directory(self.path)
            shutil.rmtree(self.work)
        except OSError as error:
            raise _explain(error, self.path, "giving the files their names") from error

    def abandon(self) -> None:
        """Remove what was begun, and OUT itself where this merge made it."""
        self._files.close()
        shutil.rmtree(self.work, ignore_errors=True)
        with contextlib.suppress(OSError):
            for file in self._published:
                file.unlink(missing_ok=True)
            for directory in sorted({file.parent for file in self._published} - {self.path}, reverse=True):
                directory.rmdir()
            for directory in self._made:
                directory.rmdir()

    def close(self) -> None:
        """Let others have OUT."""
        self._files.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _refuse_foreign(path: Path) -> None:
    """Refuse an OUT that is no directory, or holds anything that is not a merge's."""
    if not path.exists():
        if path.is_symlink():
            raise UsageError(f"{path}: is a broken link; OUT must be a new or empty directory")
        return
    if not path.is_dir():
        raise UsageError(f"{path}: is a file; OUT must be a new or empty directory")
    present = sorted(entry.name for entry in path.iterdir() if entry.name != WORK)
    if present:
        shown = ", ".join(present[:3]) + (", ..." if len(present) > 3 else "")
        raise UsageError(
            f"{path}: is not empty ({shown}); OUT must be a new or empty directory, so that nothing is overwritten"
        )


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
