"""The output directory while it is being made: shards under temporary names, then all of it under its own."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError, DiskSpaceError, EnvironmentFailure, UsageError
from ..os_errors import explain, translating_os_errors
from ..platform import (
    create_file,
    data_bytes,
    file_system,
    make_directory,
    remove,
    remove_directory,
    remove_tree,
    rename,
    reserve_space,
    start_writeback,
    sync_data,
    sync_directory,
    truncate,
    write_at,
)
from ..reading import FilePool, Stamps, acquire_source
from ..sizes import format_size
from .clone import CopyStats, move
from .digests import file_digest
from .file_copy import copy_file
from .lock import STAGE, WORK, OutputLock, published_names
from .preallocate import Preallocator

__all__ = [
    "WORK",
    "OutputDirectory",
    "ShardFile",
    "index_bytes",
    "missing_space",
    "preload_validator",
    "validate_shard",
]

_IN_MEMORY = {"tmpfs", "ramfs"}  # to reserve there is to fill with zeros
_WRITEBACK_BYTES = 1 << 20


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


class OutputDirectory(OutputLock):
    """OUT, held by one process at a time. What an earlier process left unfinished in it stays, to be gone on with.

    Args:
        path: of the directory; made where it isn't there.
        sign: the name of the file that only a finished merge has: it is the last to get its name.

    Raises:
        UsageError: where something else is in it.
        EnvironmentFailure: where another merge is at work in it.
    """

    def __init__(self, path: Path, sign: str = "") -> None:
        self._files = FilePool(os.O_RDWR, 128)
        self._reservation: Preallocator | None = None
        self._sources = FilePool(os.O_RDONLY, 128)
        self._shards: tuple[ShardFile, ...] = ()
        super().__init__(path, sign)

    # --- beginning ---------------------------------------------------------------------------------------------

    def start_over(self) -> None:
        """Forget the unfinished merge."""
        with translating_os_errors(self.path, "removing the unfinished merge"):
            self._unpublish()
            remove(self.journal)
            remove_tree(self.stage)
            make_directory(self.stage)
        self.found = None

    def begin(self, shards: Sequence[ShardFile], shared: int = 0, stamps: Stamps | None = None) -> None:
        """Make every shard at its full size, with its header, and reserve the disk space that will be needed.

        Shards that are there already, from an unfinished merge of the same plan, stay as they are; all other files of
        that merge are removed. After it, everything that is there is durable.

        Args:
            shards: all of them.
            shared: bytes of them that will take no space.
            stamps: of the source files, which `receive` must find unchanged.

        Raises:
            DiskSpaceError: where there is too little room.
            EnvironmentFailure: where a shard of the unfinished merge isn't what it was.
        """
        self._shards = tuple(shards)
        self._sources = FilePool(os.O_RDONLY, 128, stamps)
        with translating_os_errors(self.path, "making the shards"):
            if self.found is not None:
                self._unpublish()
                for shard in shards:
                    self._check_shard(shard)
                for name in self._names():
                    if name not in {shard.name for shard in shards}:
                        remove(self.stage / name)
            self._refuse_small_disk(shared)
            in_memory = file_system(self.path) in _IN_MEMORY
            for shard in shards:
                self._make(shard, reserves=not in_memory)
            if in_memory and self.found is None:
                ranges = [(self.stage / shard.name, *extent) for shard in shards for extent in shard.computed]
                self._reservation = Preallocator(ranges)
            for directory in (*self._directories([shard.name for shard in shards], self.stage), self.work, self.path):
                sync_directory(directory)
            self._sync_parents()

    def _sync_parents(self) -> None:
        """Make OUT's own name durable, and its parents': this merge, or one that was killed, may have made them."""
        path = self.path.resolve()
        for directory in path.parents:
            if directory.stat().st_dev != path.stat().st_dev:
                return
            with contextlib.suppress(PermissionError):  # it may be gone through, and not be read
                sync_directory(directory)

    def _make(self, shard: ShardFile, *, reserves: bool) -> None:
        """Make a shard, where it isn't there yet, and reserve its space."""
        path = self.stage / shard.name
        there = self.found is not None
        make_directory(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC) if there else create_file(path)
        try:
            if not there:
                truncate(descriptor, shard.nbytes)
                write_at(descriptor, shard.header, 0)
            for offset, nbytes in shard.computed if reserves else ():
                reserve_space(descriptor, offset, nbytes)
            sync_data(descriptor)
        except OSError as error:
            raise explain(error, self.path, f"making {shard.name}") from error
        finally:
            os.close(descriptor)

    def _refuse_small_disk(self, shared: int) -> None:
        """Raises DiskSpaceError where the shards need more than is free."""
        needed = missing_space(self.path, self._shards, shared)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise DiskSpaceError(
                f"{self.path}: the output takes {format_size(needed, up=True)} and {format_size(free)} are free; "
                "make room and run the same command again"
            )

    def _check_shard(self, shard: ShardFile) -> None:
        """A shard of the unfinished merge must be there, with its size and header."""
        path = self.stage / shard.name
        if path.is_file() and path.stat().st_size == shard.nbytes:
            with path.open("rb") as stream:
                if stream.read(len(shard.header)) == shard.header:
                    return
        raise EnvironmentFailure(
            f"{self.path}: {shard.name} of the unfinished merge was removed or changed since; start over with --fresh"
        )

    # --- writing -----------------------------------------------------------------------------------------------

    def shard_path(self, number: int) -> Path:
        """Where a shard lies until it is published."""
        return self.stage / self._shards[number].name

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Put `data` at `offset` of a shard. Safe to call from several threads."""
        path = self.shard_path(shard)
        with translating_os_errors(self.path, f"writing {len(data)} bytes to {path.name}"):
            if self._reservation is not None:
                self._reservation.check()
            descriptor = self._files.acquire(path)
            try:
                write_at(descriptor, data, offset)
                if len(data) >= _WRITEBACK_BYTES:
                    start_writeback(descriptor, offset, len(data))
            finally:
                self._files.release(descriptor)

    def receive(
        self,
        shard: int,
        target: int,
        source: Path,
        offset: int,
        nbytes: int,
        buffer: memoryview,
        *,
        share: bool,
    ) -> CopyStats:
        """Make a range of a shard a copy of a range of a source file, sharing blocks where that can be.

        Safe to call from several threads, each with a buffer of its own. For the arguments, see `copying.move`.

        Raises:
            CheckpointError: where the source can't be read, or was changed.
            DiskSpaceError: where there is no room.
        """
        path = self.shard_path(shard)
        descriptor = acquire_source(self._sources, source)
        try:
            written = self._files.acquire(path)
            try:
                moved = move(descriptor, offset, written, target, nbytes, buffer, share=share)
                if moved.written >= _WRITEBACK_BYTES:
                    start_writeback(written, target, nbytes)
                return moved
            finally:
                self._files.release(written)
        except EOFError as error:
            raise CheckpointError(
                f"{source}: ends at byte {error}, where its header promises more: it was cut short while it was being "
                "copied; put the whole file back and run the same command again"
            ) from error
        except OSError as error:
            raise explain(error, self.path, f"copying {nbytes} bytes from {source} to {path.name}") from error
        finally:
            self._sources.release(descriptor)

    def sync(self, shards: Collection[int]) -> None:
        """Make all that was written to these shards durable."""
        for number in shards:
            path = self.shard_path(number)
            with translating_os_errors(self.path, f"syncing {path.name}"):
                descriptor = self._files.acquire(path)
                try:
                    sync_data(descriptor)
                finally:
                    self._files.release(descriptor)

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file that gets its final name once OUT is published; until then it lies beside the shards."""
        target = self.stage / name
        with translating_os_errors(self.path, f"writing {name}"):
            make_directory(target.parent)
            descriptor = create_file(target)
            try:
                write_at(descriptor, data, 0)
                sync_data(descriptor)
            finally:
                os.close(descriptor)

    def copy_file(self, name: str, source: Path) -> None:
        """Copy a file; it gets its final name once OUT is published."""
        copy_file(source, self.stage / name)

    def small_files(self) -> dict[str, str]:
        """The digests of all files beside the shards that have been written so far, by name."""
        shards = {shard.name for shard in self._shards}
        with translating_os_errors(self.path, "reading what was written"):
            return {name: file_digest(self.stage / name) for name in self._names() if name not in shards}

    def _names(self) -> list[str]:
        """All files that have no final name yet."""
        entries = [entry for entry in self.stage.rglob("*") if entry.is_symlink() or not entry.is_dir()]
        return sorted(str(entry.relative_to(self.stage)) for entry in entries)

    # --- publishing --------------------------------------------------------------------------------------------

    def publish(self, last: Sequence[str], announce: Callable[[Sequence[str]], None]) -> None:
        """Give every file its final name, those in `last` after all others; then OUT is whole.

        Args:
            last: names, the very last one at the end: the sign that OUT is whole.
            announce: called with all names before the first is given, to make them durable.

        Raises:
            MergeloomError: where the safetensors library does not accept a shard, or the disk got in the way.
        """
        self._stop_reserving()
        self._files.close()
        for shard in self._shards:
            validate_shard(self.stage / shard.name, shard.name)
        with translating_os_errors(self.path, "giving the files their names"):
            names = self._names()
            taken = [name for name in names if os.path.lexists(self.path / name)]
            if taken:
                raise EnvironmentFailure(
                    f"{self.path}: {taken[0]} was put there during the merge; move it away and run the same "
                    "command again"
                )
            for directory in self._directories(names, self.stage):
                sync_directory(directory)
            announce(names)
            ends = [name for name in last if name in names]
            # each step is durable before the next one: an index whose shards are not there is a broken model
            for step in ([name for name in names if name not in ends], ends[:-1], ends[-1:]):
                for name in step:
                    make_directory((self.path / name).parent)
                    rename(self.stage / name, self.path / name)
                for directory in self._directories(step, self.path):
                    sync_directory(directory)
            remove(self.journal)
            remove_tree(self.work)

    def _unpublish(self) -> None:
        """Put the files that an interrupted `publish` gave their names back beside those that it had not come to."""
        names = published_names(self.found) if self.found is not None else []
        published = [name for name in names if os.path.lexists(self.path / name)]
        for name in published:
            if os.path.lexists(self.stage / name):
                raise UsageError(
                    f"{self.path}: {name} was put there since the merge was interrupted; move it away and run the same "
                    "command again"
                )
        for name in published:
            make_directory((self.stage / name).parent)
            rename(self.path / name, self.stage / name)
        for directory in self._directories(published, self.stage):
            sync_directory(directory)
        for directory in self._directories(names, self.path):
            if directory != self.path:
                with contextlib.suppress(OSError):
                    remove_directory(directory)
        sync_directory(self.path)

    @staticmethod
    def _directories(names: Iterable[str], root: Path) -> list[Path]:
        """The directories that files lie in, up to `root`, the deepest first."""
        found = {root}
        for name in names:
            found.update(directory for directory in (root / name).parents if directory.is_relative_to(root))
        return sorted(found, key=lambda directory: -len(directory.parts))

    # --- ending ------------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Remove what was begun, and OUT itself where this merge made it. Only for a merge with nothing durable."""
        self._stop_reserving()
        self._files.close()
        super().abandon()

    def _stop_reserving(self) -> None:
        if self._reservation is not None:
            self._reservation.stop()
            self._reservation = None

    def close(self) -> None:
        """Let others have OUT; a second time does nothing."""
        self._stop_reserving()
        self._files.close()
        self._sources.close()
        self.release()


def missing_space(out: Path, shards: Sequence[ShardFile], shared: int) -> int:
    """The bytes of disk space that the shards of a merge still need.

    Args:
        out: the output directory; an unfinished merge in it may have allocated some of the space.
        shards: all of them.
        shared: bytes of them that share blocks with source files when the merge is finished.
    """
    needed = sum(shard.nbytes for shard in shards) - shared
    return max(0, needed - sum(_allocated(out, shard) for shard in shards))


def _allocated(out: Path, shard: ShardFile) -> int:
    """The bytes of disk space that a shard has for ranges of its own.

    The system counts blocks that are shared with another file like all others, so data in the ranges that are to be
    shared is subtracted.
    """
    for path in (out / WORK / STAGE / shard.name, out / shard.name):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            taken = os.fstat(descriptor).st_blocks * 512
            shared = sum(data_bytes(descriptor, *extent) for extent in _shared_ranges(shard))
        finally:
            os.close(descriptor)
        return max(0, min(taken, shard.nbytes) - shared)
    return 0


def _shared_ranges(shard: ShardFile) -> list[tuple[int, int]]:
    """The ranges (offset, bytes) of a shard that share blocks with source files: all but the header and `computed`."""
    ends = [len(shard.header), *(offset + nbytes for offset, nbytes in shard.computed)]
    starts = [*(offset for offset, _ in shard.computed), shard.nbytes]
    return [(end, start - end) for end, start in zip(ends, starts, strict=True) if start > end]


def index_bytes(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """A ``model.safetensors.index.json``: the shard of each tensor, and the bytes of all tensors together."""
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def preload_validator() -> None:
    """Import what `validate_shard` needs in a thread: safetensors imports numpy, which takes a tenth of a second."""
    threading.Thread(target=importlib.import_module, args=("numpy",), name="judge", daemon=True).start()


def validate_shard(file: Path, name: str) -> None:
    """Let the safetensors library open a shard, which must be whole. Raises EnvironmentFailure where it doesn't."""
    import safetensors

    try:
        with safetensors.safe_open(file, framework="numpy"):
            return
    except (safetensors.SafetensorError, OSError) as error:
        raise EnvironmentFailure(
            f"{name}: the safetensors library does not accept what was written ({error}): the disk lost data, or this "
            "is a bug; please report it"
        ) from error
