"""Publishes an output: renames staged files to their final names in an order that is safe at any crash."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ...errors import EnvironmentFailure, UsageError
from ..platform import make_directory, remove, remove_directory, remove_tree, rename, sync_directory
from .lock import OutputLock, published_names


def publish_files(lock: OutputLock, last: Sequence[str], announce: Callable[[Sequence[str]], None]) -> None:
    """Rename all staged files to their final names; after that, OUT is complete and the work directory is gone.

    Each step is durable before the next one starts: an index whose shards are missing is a broken model.

    Args:
        lock: the output directory.
        last: the names to publish after all others, in this order; the last one is the completion marker.
        announce: a function that is called with all names before the first rename and records them durably.

    Raises:
        EnvironmentFailure: one of the names already exists in OUT.
        OSError: the file system failed.
    """
    names = staged_names(lock.stage)
    existing = [name for name in names if os.path.lexists(lock.path / name)]
    if existing:
        raise EnvironmentFailure(
            f"{lock.path}: {existing[0]} was put there during the merge; move it away and run the same command again"
        )
    for directory in parent_directories(names, lock.stage):
        sync_directory(directory)
    announce(names)
    ends = [name for name in last if name in names]
    for step in ([name for name in names if name not in ends], ends[:-1], ends[-1:]):
        for name in step:
            make_directory((lock.path / name).parent)
            rename(lock.stage / name, lock.path / name)
        for directory in parent_directories(step, lock.path):
            sync_directory(directory)
    remove(lock.journal_path)
    remove_tree(lock.work)


def unpublish_files(lock: OutputLock) -> None:
    """Move the files that an interrupted `publish_files` had published back to the stage.

    Raises:
        UsageError: OUT contains another file under one of the names.
        OSError: the file system failed.
    """
    names = published_names(lock.journal) if lock.journal is not None else []
    published = [name for name in names if os.path.lexists(lock.path / name)]
    for name in published:
        if os.path.lexists(lock.stage / name):
            raise UsageError(
                f"{lock.path}: {name} was put there since the merge was interrupted; move it away and run the same "
                "command again"
            )
    for name in published:
        make_directory((lock.stage / name).parent)
        rename(lock.path / name, lock.stage / name)
    for directory in parent_directories(published, lock.stage):
        sync_directory(directory)
    for directory in parent_directories(names, lock.path):
        if directory != lock.path:
            with contextlib.suppress(OSError):
                remove_directory(directory)
    sync_directory(lock.path)


def staged_names(stage: Path) -> list[str]:
    """The files that are not published yet, as paths relative to the stage."""
    entries = [entry for entry in stage.rglob("*") if entry.is_symlink() or not entry.is_dir()]
    return sorted(str(entry.relative_to(stage)) for entry in entries)


def parent_directories(names: Iterable[str], root: Path) -> list[Path]:
    """The directories that contain the named files, up to and including `root`, the deepest ones first."""
    directories = {root}
    for name in names:
        directories.update(directory for directory in (root / name).parents if directory.is_relative_to(root))
    return sorted(directories, key=lambda directory: -len(directory.parts))
