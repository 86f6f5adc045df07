"""Faults on purpose, at the one place where an output's files are changed (`mergeloom.io.platform.WATCH`)."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergeloom.io import platform

SECTOR = 512


class Stopped(BaseException):
    """The process was killed, or the power failed: whatever the code then does, no call gets to the disk."""


@contextmanager
def watching(watch: Callable[..., None]) -> Iterator[None]:
    """Let every call that changes files go by `watch`."""
    platform.WATCH = watch
    try:
        yield
    finally:
        platform.WATCH = None


class Kill:
    """Lets a number of calls through and no more, as a SIGKILL between two system calls does.

    Args:
        after: how many calls get through; None for all of them.
        torn: whether half of the bytes of the first write that doesn't get through do.
    """

    def __init__(self, after: int | None = None, *, torn: bool = False) -> None:
        self.calls: list[str] = []
        self.dead = False
        self._after = after
        self._torn = torn
        self._lock = threading.Lock()

    def __call__(self, call: str, *arguments: Any) -> None:
        with self._lock:
            if not self.dead:
                self.calls.append(call)
                self.dead = self._after is not None and len(self.calls) > self._after
                if self.dead and self._torn and call == "write":
                    descriptor, data, offset = arguments
                    os.pwrite(descriptor, data[: len(data) // 2], offset)
            if self.dead:
                raise Stopped


class Fail:
    """Lets one call fail as the system would, and no other.

    Args:
        number: number of the error.
        at: index of the call of that kind that fails.
        call: its kind.
        ending: what the name of the file that it is made on ends with.
        partly: whether half of a write gets through.
    """

    def __init__(self, number: int, at: int, call: str, *, ending: str = "", partly: bool = False) -> None:
        self.seen = 0
        self._number = number
        self._at = at
        self._call = call
        self._ending = ending
        self._partly = partly
        self._lock = threading.Lock()

    def __call__(self, call: str, *arguments: Any) -> None:
        if call != self._call or not name_of(arguments).endswith(self._ending):
            return
        with self._lock:
            self.seen += 1
            if self.seen != self._at + 1:
                return
        if self._partly:
            descriptor, data, offset = arguments
            os.pwrite(descriptor, data[: len(data) // 2], offset)
        raise OSError(self._number, os.strerror(self._number))


def name_of(arguments: tuple[Any, ...]) -> str:
    """The file that a call is made on."""
    first = arguments[0]
    return str(first) if isinstance(first, Path) else str(Path(f"/proc/self/fd/{first}").readlink())


# ------------------------------------------------------------------------------------------------ power failures


@dataclass(eq=False)
class _File:
    """A file: its durable content, and the writes since the last sync."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # (offset, data), or (size, None)

    def apply(self, offset: int, data: bytes | None) -> None:
        if data is None:
            del self.durable[offset:]
            self.durable.extend(bytes(offset - len(self.durable)))
            return
        if len(self.durable) < offset + len(data):
            self.durable.extend(bytes(offset + len(data) - len(self.durable)))
        self.durable[offset : offset + len(data)] = data


Directory = None
"""What stands in a tree for a directory."""
Tree = dict[Path, "_File | None"]


class Disk:
    """What a disk holds of a directory if the power fails: what was synced, and of the rest as much as chance has it.

    Bytes reach the disk in sectors, in any order, unless their file is synced. Names reach it one by one, in any order,
    unless their directory is synced; that a file is synced says nothing of its name.

    Args:
        root: everything below it is watched; it must be empty.
        after: after how many calls the power fails; None for never.
    """

    def __init__(self, root: Path, after: int | None = None) -> None:
        self.root = root
        self.count = 0
        self.failed = False
        self._after = after
        self._lock = threading.Lock()
        self._now: Tree = {}
        self._durable: Tree = {}
        self._pending: list[tuple[set[Path], list[tuple[Path, _File | str | None]]]] = []
        for path in sorted(root.rglob("*")):
            content = Directory if path.is_dir() else _File(bytearray(path.read_bytes()))
            self._now[path] = self._durable[path] = content

    def __call__(self, call: str, *arguments: Any) -> None:
        with self._lock:
            if self.failed:
                raise Stopped
            self.count += 1
            if self._after is not None and self.count > self._after:
                self.failed = True
                raise Stopped
            getattr(self, f"_{call}")(*arguments)

    # --- calls -------------------------------------------------------------------------------------------------

    def _names(self, *changes: tuple[Path, _File | str | None]) -> None:
        """Names that change together: a path becomes a file or directory, or "" where it goes."""
        changes = tuple(change for change in changes if self.root in change[0].parents)
        for path, content in changes:
            if isinstance(content, str):
                self._now.pop(path, None)
            else:
                self._now[path] = content
        if changes:
            self._pending.append(({changes[-1][0].parent}, list(changes)))

    def _file(self, descriptor: int) -> _File | None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        return self._now.get(path)

    def _create(self, path: Path) -> None:
        found = self._now.get(path)
        if found is not None:
            found.pending.append((0, None))
        else:
            self._names((path, _File()))

    def _truncate(self, descriptor: int, nbytes: int) -> None:
        if (file := self._file(descriptor)) is not None:
            file.pending.append((nbytes, None))

    def _write(self, descriptor: int, data: memoryview, offset: int) -> None:
        if (file := self._file(descriptor)) is not None:
            file.pending.append((offset, bytes(data)))

    def _clone(self, source: int, start: int, target: int, offset: int, nbytes: int) -> None:
        self._write(target, memoryview(os.pread(source, nbytes, start)), offset)

    _copy = _clone

    def _reserve(self, *arguments: int) -> None:
        """A reservation changes no byte."""

    def _sync(self, descriptor: int) -> None:
        if (file := self._file(descriptor)) is not None:
            for change in file.pending:
                file.apply(*change)
            file.pending = []

    def _sync_directory(self, path: Path) -> None:
        left = []
        for directories, changes in self._pending:
            if path in directories:
                self._apply(self._durable, changes)
            else:
                left.append((directories, changes))
        self._pending = left

    @staticmethod
    def _apply(tree: Tree, changes: list[tuple[Path, _File | str | None]]) -> None:
        for path, content in changes:
            if isinstance(content, str):
                tree.pop(path, None)
            else:
                tree[path] = content

    def _rename(self, path: Path, target: Path) -> None:
        self._names((path, ""), (target, self._now[path]))

    def _remove(self, path: Path) -> None:
        if path in self._now:
            self._names((path, ""))

    def _make_directory(self, path: Path) -> None:
        self._names((path, Directory))

    def _remove_directory(self, path: Path) -> None:
        if path in self._now and not any(path in other.parents for other in self._now):
            self._names((path, ""))

    # --- afterwards --------------------------------------------------------------------------------------------

    def content(self) -> dict[Path, bytes | None]:
        """Every file and directory as the calls have left it."""
        for file in self._now.values():
            for change in file.pending if file is not None else ():
                file.apply(*change)  # type: ignore[union-attr]
            if file is not None:
                file.pending = []
        return {path: None if file is None else bytes(file.durable) for path, file in self._now.items()}

    def lose(self, chance: random.Random, share: float) -> None:
        """Make the directory what the disk holds; each unsynced sector and name got there with this probability."""
        tree = dict(self._durable)
        for _, changes in self._pending:
            if chance.random() < share:
                self._apply(tree, changes)
        for file in {id(found): found for found in tree.values() if found is not None}.values():
            for offset, data in file.pending:
                if data is None:
                    if chance.random() < share:
                        file.apply(offset, None)
                    continue
                for start in range(0, len(data), SECTOR):
                    if chance.random() < share:
                        file.apply(offset + start, data[start : start + SECTOR])
        shutil.rmtree(self.root)
        self.root.mkdir()
        for path in sorted(tree, key=lambda path: len(path.parts)):
            content = tree[path]
            if path.parent.is_dir() and content is None:
                path.mkdir()
            elif path.parent.is_dir() and content is not None:
                path.write_bytes(content.durable)
