"""The limits of this process's cgroups, version 1 and 2: memory, and CPU time. The lowest limit up the tree counts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc/self")


def memory_limit() -> int | None:
    """Bytes of memory that the cgroups allow; None without a limit."""
    limits = [limit for directory in directories("memory") if (limit := _limit(directory)) is not None]
    return min(limits, default=None)


def memory_left() -> int | None:
    """Bytes of memory that the cgroups allow beyond what they use, page cache not counted; None without a limit."""
    left = []
    for directory in directories("memory"):
        limit = _limit(directory)
        used = _number(directory / "memory.current", directory / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            fields = _fields(directory / "memory.stat")
            # version 1 counts the groups below only in the fields with "total"
            left.append(limit - used + fields.get("total_inactive_file", fields.get("inactive_file", 0)))
    return min(left, default=None)


def cpu_limit() -> int | None:
    """How many cores' time the cgroups allow, rounded up; None without a limit."""
    cores = []
    for directory in directories("cpu"):
        try:
            quota, period = (directory / "cpu.max").read_text().split()
        except (OSError, ValueError):
            found = (_number(directory / f"cpu.cfs_{name}_us") for name in ("quota", "period"))  # -1: no quota
            quota, period = (str(number or "max") for number in found)
        if quota.isdecimal() and period.isdecimal():
            cores.append(max(1, -(-int(quota) // int(period))))
    return min(cores, default=None)


def directories(controller: str) -> list[Path]:
    """The directories of the cgroups that this process is in, each followed by its parents up to the mount.

    Args:
        controller: ``memory`` or ``cpu``: which hierarchy of version 1, besides that of version 2.
    """
    found: list[Path] = []
    for version, own in _memberships(controller):
        for point, root in _mounts(version, controller):
            # in a container the mount's root is the container's own group, of which the path may say nothing
            relative = own[len(root) :] if own == root or own.startswith(root.rstrip("/") + "/") else ""
            directory = point / relative.lstrip("/")
            if not directory.is_dir():
                directory = point
            above = (parent for parent in directory.parents if parent == point or point in parent.parents)
            found += [directory, *above]
    return list(dict.fromkeys(found))


def _memberships(controller: str) -> Iterator[tuple[int, str]]:
    """Version and path of each cgroup of this process that limits what the controller is for."""
    for line in _lines(_PROC / "cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            yield 2, path
        elif controller in controllers.split(","):
            yield 1, path


def _mounts(version: int, controller: str) -> Iterator[tuple[Path, str]]:
    """Where a hierarchy is mounted, and which of its cgroups is the root of the mount."""
    for line in _lines(_PROC / "mountinfo"):
        fields, _, rest = line.partition(" - ")
        kind, _, options = [*rest.split(" "), "", ""][:3]
        if (version, kind) == (2, "cgroup2") or ((version, kind) == (1, "cgroup") and controller in options.split(",")):
            _, _, _, root, point, *_ = fields.split(" ")
            yield Path(_unescaped(point)), _unescaped(root)


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _limit(directory: Path) -> int | None:
    """The memory limit of a cgroup: "max", or without a limit in version 1 a number larger than any memory, is none."""
    limit = _number(directory / "memory.max", directory / "memory.limit_in_bytes")
    return limit if limit is not None and limit < 1 << 60 else None


def _number(*files: Path) -> int | None:
    """The number in the first of the files that exists; None where it holds none."""
    for file in files:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() else None
    return None


def _fields(file: Path) -> dict[str, int]:
    return {key: int(value) for key, _, value in (line.partition(" ") for line in _lines(file)) if value.isdecimal()}
