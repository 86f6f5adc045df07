"""Memory and CPU limits of this process's cgroups (v1 and v2). The lowest limit on the path to the root applies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc/self")


def memory_limit() -> int | None:
    """The memory limit of the cgroups in bytes; None if there is none."""
    limits = [limit for directory in directories("memory") if (limit := _limit(directory)) is not None]
    return min(limits, default=None)


def memory_left() -> int | None:
    """Bytes of memory left below the cgroups' limits, counting page cache as free; None without a limit."""
    left = []
    for directory in directories("memory"):
        limit = _limit(directory)
        used = _number(directory / "memory.current", directory / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            fields = _fields(directory / "memory.stat")
            # v1 includes descendants only in the total_* fields
            left.append(limit - used + fields.get("total_inactive_file", fields.get("inactive_file", 0)))
    return min(left, default=None)


def cpu_limit() -> int | None:
    """The CPU limit of the cgroups in cores, rounded up; None if there is none."""
    cores = []
    for directory in directories("cpu"):
        try:
            quota, period = (directory / "cpu.max").read_text().split()
        except (OSError, ValueError):
            numbers = (_number(directory / f"cpu.cfs_{name}_us") for name in ("quota", "period"))  # -1: no quota
            quota, period = (str(number or "max") for number in numbers)
        if quota.isdecimal() and period.isdecimal():
            cores.append(max(1, -(-int(quota) // int(period))))
    return min(cores, default=None)


def directories(controller: str) -> list[Path]:
    """List the directories of this process's cgroups, each followed by its ancestors up to the mount point.

    Args:
        controller: the v1 controller, ``memory`` or ``cpu``; the v2 hierarchy is always included.
    """
    result: list[Path] = []
    for version, own in _memberships(controller):
        for point, root in _mounts(version, controller):
            # in a container the mount's root is the container's own cgroup, which the path may not include
            relative = own[len(root) :] if own == root or own.startswith(root.rstrip("/") + "/") else ""
            directory = point / relative.lstrip("/")
            if not directory.is_dir():
                directory = point
            ancestors = (parent for parent in directory.parents if parent == point or point in parent.parents)
            result += [directory, *ancestors]
    return list(dict.fromkeys(result))


def _memberships(controller: str) -> Iterator[tuple[int, str]]:
    """Yield the version and path of each cgroup in which `controller` may limit this process."""
    for line in _lines(_PROC / "cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            yield 2, path
        elif controller in controllers.split(","):
            yield 1, path


def _mounts(version: int, controller: str) -> Iterator[tuple[Path, str]]:
    """Yield each mount point of a hierarchy and the cgroup that is the root of that mount."""
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
    """The memory limit of a cgroup. "No limit" is "max" in v2 and a number larger than any memory in v1."""
    limit = _number(directory / "memory.max", directory / "memory.limit_in_bytes")
    return limit if limit is not None and limit < 1 << 60 else None


def _number(*files: Path) -> int | None:
    """The number in the first file that exists; None if it does not contain a number."""
    for file in files:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() else None
    return None


def _fields(file: Path) -> dict[str, int]:
    return {key: int(value) for key, _, value in (line.partition(" ") for line in _lines(file)) if value.isdecimal()}
