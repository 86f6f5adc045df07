"""Limits of cgroups: v1 and v2, nested, and in containers that mount only their own cgroup."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeloom.io import cgroups

GIB = 1 << 30
UNLIMITED = "9223372036854771712"


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that takes the place of /proc/self."""
    directory = tmp_path / "proc"
    directory.mkdir()
    monkeypatch.setattr(cgroups, "_PROC", directory)
    return directory


def mounted(proc: Path, point: Path, kind: str, options: str = "rw", root: str = "/") -> None:
    """Mount a hierarchy."""
    line = f"31 23 0:27 {root} {point} rw,nosuid - {kind} cgroup {options}\n"
    with (proc / "mountinfo").open("a") as file:
        file.write("22 1 8:1 / / rw - ext4 /dev/root rw\n" + line)


def group(directory: Path, **files: object) -> Path:
    """A cgroup with files, of which the names have underscores for dots."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("_", ".", 1)).write_text(f"{content}\n")
    return directory


def test_no_cgroups(proc: Path) -> None:
    assert cgroups.directories("memory") == []
    assert (cgroups.memory_limit(), cgroups.memory_left(), cgroups.cpu_limit()) == (None, None, None)


def test_version_2_the_lowest_limit_counts(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "unified"
    mounted(proc, root, "cgroup2")
    (proc / "cgroup").write_text("0::/outer/inner\n")
    inner = group(root / "outer" / "inner", memory_max="max", cpu_max="max 100000")
    assert cgroups.directories("memory") == [inner, inner.parent, root]
    assert (cgroups.memory_limit(), cgroups.cpu_limit()) == (None, None)
    group(inner, memory_max=2 * GIB, memory_current=GIB, cpu_max="350000 100000")
    group(inner.parent, memory_max=GIB, memory_current=GIB // 2, memory_stat="anon 5\ninactive_file 1000")
    assert cgroups.memory_limit() == GIB
    assert cgroups.memory_left() == GIB // 2 + 1000
    assert cgroups.cpu_limit() == 4
    group(inner.parent, cpu_max="50000 100000")
    assert cgroups.cpu_limit() == 1


def test_version_1_the_lowest_limit_counts(proc: Path, tmp_path: Path) -> None:
    memory, cpu = tmp_path / "memory", tmp_path / "cpu,cpuacct"
    mounted(proc, memory, "cgroup", "rw,memory")
    mounted(proc, cpu, "cgroup", "rw,cpu,cpuacct")
    (proc / "cgroup").write_text("5:memory:/outer/inner\n4:cpu,cpuacct:/outer\n1:name=systemd:/x\n")
    inner = group(memory / "outer" / "inner", memory_limit_in_bytes=UNLIMITED)
    group(cpu / "outer", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100_000)
    assert cgroups.directories("memory") == [inner, inner.parent, memory]
    assert (cgroups.memory_limit(), cgroups.cpu_limit()) == (None, None)
    group(inner.parent, memory_limit_in_bytes=GIB, memory_usage_in_bytes=GIB // 4)
    group(inner.parent, memory_stat="inactive_file 1\ntotal_inactive_file 1000")
    group(cpu / "outer", cpu_cfs_quota_us=150_000)
    assert cgroups.memory_limit() == GIB
    assert cgroups.memory_left() == GIB - GIB // 4 + 1000
    assert cgroups.cpu_limit() == 2


def test_both_versions_at_once(proc: Path, tmp_path: Path) -> None:
    mounted(proc, tmp_path / "unified", "cgroup2")
    mounted(proc, tmp_path / "memory", "cgroup", "rw,memory")
    (proc / "cgroup").write_text("5:memory:/a\n0::/b\n")
    group(tmp_path / "unified" / "b", memory_max=3 * GIB)
    group(tmp_path / "memory" / "a", memory_limit_in_bytes=2 * GIB)
    assert cgroups.memory_limit() == 2 * GIB


@pytest.mark.parametrize("root", ["/docker/abc", "/"])
@pytest.mark.parametrize("version", [1, 2])
def test_in_a_container(proc: Path, tmp_path: Path, version: int, root: str) -> None:
    """The mount is the container's own group, of which /proc/self/cgroup gives the path on the host."""
    point = tmp_path / "mount"
    if version == 1:
        mounted(proc, point, "cgroup", "rw,memory", root)
        (proc / "cgroup").write_text("5:memory:/docker/abc\n")
        group(point, memory_limit_in_bytes=GIB)
    else:
        mounted(proc, point, "cgroup2", root=root)
        (proc / "cgroup").write_text("0::/docker/abc\n")
        group(point, memory_max=GIB)
    assert cgroups.directories("memory") == [point]
    assert cgroups.memory_limit() == GIB
