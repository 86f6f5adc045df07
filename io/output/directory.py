"""The output directory during a merge: creates, writes, syncs and publishes shards and small files."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import TracebackType

from ...errors import CheckpointError, DiskSpaceError, EnvironmentFailure
from ..os_errors import translate_os_error, translating_os_errors
from ..platform import (
    create_file,
    file_system,
    make_directory,
    remove,
    remove_tree,
    reserve_space,
    start_writeback,
    sync_data,
    sync_directory,
    truncate,
    write_at,
)
from ..reading import FilePool, FileStamps, acquire_source
from ..sizes import format_size
from .clone import CopyStats, move
from .digests import file_digest
from .file_copy import copy_file
from .lock import OutputLock
from .publish import parent_directories, publish_files, staged_names, unpublish_files
from .shards import ShardFile, missing_space, validate_shard

_IN_MEMORY = {"tmpfs", "ramfs"}  # where reserving space fills it with zeros: a fifth of the time of a linear merge
_WRITEBACK_BYTES = 1 << 20


class OutputDirectory:
    """A locked output directory. Files are staged in it under temporary names until `publish`.

    An unfinished merge of an earlier process is kept, to be resumed, until `start_over`.

    Args:
        lock: the lock, acquired. Closing the output directory releases it.
    """

    def __init__(self, lock: OutputLock) -> None:
        self.lock = lock
        self.path = lock.path
        self.work = lock.work
        self.stage = lock.stage
        self._files = FilePool(os.O_RDWR, 128)
        self._sources = FilePool(os.O_RDONLY, 128)
        self._shards: tuple[ShardFile, ...] = ()

    @classmethod
    def open(cls, path: Path, completion_marker: str = "") -> OutputDirectory:
        """Lock a directory, creating it if it does not exist. For arguments and errors see `OutputLock`."""
        return cls(OutputLock(path, completion_marker).acquire())

    def __enter__(self) -> OutputDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- starting ----------------------------------------------------------------------------------------------

    def start_over(self) -> None:
        """Discard the unfinished merge."""
        with translating_os_errors(self.path, "removing the unfinished merge"):
            unpublish_files(self.lock)
            remove(self.lock.journal_path)
            remove_tree(self.stage)
            make_directory(self.stage)
        self.lock.journal = None

    def begin(self, shards: Sequence[ShardFile], shared: int = 0, stamps: FileStamps | None = None) -> None:
        """Create all shards at full size with their headers, and reserve disk space for their computed ranges.

        When a merge is resumed, its shards are kept and all its other files are removed. The result is durable.

        Args:
            shards: all shards of the merge.
            shared: the number of bytes that will share blocks with source files and need no space.
            stamps: the expected stamps of the source files that `receive` copies from.

        Raises:
            DiskSpaceError: the disk is too small.
            EnvironmentFailure: a shard of the unfinished merge was removed or changed, or the file system failed.
        """
        self._shards = tuple(shards)
        self._sources = FilePool(os.O_RDONLY, 128, stamps)
        resumes = self.lock.journal is not None
        with translating_os_errors(self.path, "creating the shards"):
            if resumes:
                unpublish_files(self.lock)
                for shard in shards:
                    self._check_shard(shard)
                for name in staged_names(self.stage):
                    if name not in {shard.name for shard in shards}:
                        remove(self.stage / name)
            self._check_space(shared)
            in_memory = file_system(self.path) in _IN_MEMORY
            for shard in shards:
                self._create_shard(shard, exists=resumes, reserve=not in_memory)
            staged = parent_directories([shard.name for shard in shards], self.stage)
            for directory in (*staged, self.work, self.path):
                sync_directory(directory)
            self.sync_parents()

    def sync_parents(self) -> None:
        """Make the names of OUT and its parents durable: this merge or a killed one may have created them."""
        path = self.path.resolve()
        for directory in path.parents:
            if directory.stat().st_dev != path.stat().st_dev:
                return
            with contextlib.suppress(PermissionError):  # it may be traversable but not readable
                sync_directory(directory)

    def _create_shard(self, shard: ShardFile, *, exists: bool, reserve: bool) -> None:
        """Create a shard unless it exists, and reserve space for its computed ranges."""
        path = self.stage / shard.name
        make_directory(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC) if exists else create_file(path)
        try:
            if not exists:
                truncate(descriptor, shard.nbytes)
                write_at(descriptor, shard.header, 0)
            for offset, nbytes in shard.computed if reserve else ():
                reserve_space(descriptor, offset, nbytes)
            sync_data(descriptor)
        except OSError as error:
            raise translate_os_error(error, self.path, f"creating {shard.name}") from error
        finally:
            os.close(descriptor)

    def _check_space(self, shared: int) -> None:
        """Raise DiskSpaceError if the shards need more space than is free."""
        needed = missing_space(self.path, self._shards, shared)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise DiskSpaceError(
                f"{self.path}: the output needs {format_size(needed, up=True)}, but only {format_size(free)} are free; "
                "make room and run the same command again"
            )

    def _check_shard(self, shard: ShardFile) -> None:
        """Raise EnvironmentFailure unless a shard of the unfinished merge has the planned size and header."""
        path = self.stage / shard.name
        if path.is_file() and path.stat().st_size == shard.nbytes:
            with path.open("rb") as stream:
                if stream.read(len(shard.header)) == shard.header:
                    return
        raise EnvironmentFailure(
            f"{self.path}: {shard.name} of the unfinished merge was removed or changed; start over with --restart"
        )

    # --- writing -----------------------------------------------------------------------------------------------

    def shard_path(self, number: int) -> Path:
        """The path of a shard until it is published."""
        return self.stage / self._shards[number].name

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write `data` at `offset` of a shard. Thread-safe."""
        path = self.shard_path(shard)
        with translating_os_errors(self.path, f"writing {len(data)} bytes to {path.name}"):
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
        """Copy a range of a source file to a shard, sharing blocks where possible.

        Thread-safe if each thread uses its own buffer.

        Args:
            shard: the number of the shard.
            target: the offset in the shard in bytes.
            source: the source file.
            offset: the offset in the source file in bytes.
            nbytes: the size of the range in bytes.
            buffer: the buffer for bytes that the kernel can't copy.
            share: whether to share blocks; see `clone.move`.

        Raises:
            SharingRefused: the file system can't share these blocks; nothing was copied.
            CheckpointError: the source is not readable, has changed, or ends too early.
            DiskSpaceError: the disk is full.
            EnvironmentFailure: the copy failed otherwise.
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
                f"{source}: ends at byte {error}, before the end of a tensor: the file was truncated during the merge; "
                "put the file back and run the same command again"
            ) from error
        except OSError as error:
            action = f"copying {nbytes} bytes from {source} to {path.name}"
            raise translate_os_error(error, self.path, action) from error
        finally:
            self._sources.release(descriptor)

    def sync(self, shards: Collection[int]) -> None:
        """Make all data written to these shards durable."""
        for number in shards:
            path = self.shard_path(number)
            with translating_os_errors(self.path, f"syncing {path.name}"):
                descriptor = self._files.acquire(path)
                try:
                    sync_data(descriptor)
                finally:
                    self._files.release(descriptor)

    def write_file(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """Write and sync a small file, from its bytes or from pieces of them. It is staged until `publish`."""
        target = self.stage / name
        with translating_os_errors(self.path, f"writing {name}"):
            make_directory(target.parent)
            descriptor = create_file(target)
            try:
                end = 0
                for piece in (data,) if isinstance(data, bytes) else data:
                    write_at(descriptor, piece, end)
                    end += len(piece)
                sync_data(descriptor)
            finally:
                os.close(descriptor)

    def copy_file(self, name: str, source: Path) -> None:
        """Copy and sync a small file. It is staged until `publish`."""
        copy_file(source, self.stage / name)

    def small_files(self) -> dict[str, str]:
        """Compute the digests of all staged files other than shards, by name."""
        shards = {shard.name for shard in self._shards}
        with translating_os_errors(self.path, "reading the staged files"):
            return {name: file_digest(self.stage / name) for name in staged_names(self.stage) if name not in shards}

    # --- ending ------------------------------------------------------------------------------------------------

    def publish(self, last: Sequence[str], announce: Callable[[Sequence[str]], None]) -> None:
        """Validate all shards and give every file its final name; see `publish_files`.

        Raises:
            MergeloomError: the safetensors library rejects a shard, a name is taken, or the file system failed.
        """
        self._files.close()
        for shard in self._shards:
            validate_shard(self.stage / shard.name, shard.name)
        with translating_os_errors(self.path, "publishing the files"):
            publish_files(self.lock, last, announce)

    def abandon(self) -> None:
        """Remove everything this merge created, including OUT. Only for a merge that has made nothing durable."""
        self._files.close()
        self.lock.abandon()

    def close(self) -> None:
        """Close all files and release the lock. Calling it again has no effect."""
        self._files.close()
        self._sources.close()
        self.lock.release()
