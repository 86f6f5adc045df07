"""What the machine has: cgroup limits count, devices are found or refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from mergeloom import machine
from mergeloom.engine.schedule import DeviceBudget
from mergeloom.errors import UsageError

GIB = 1 << 30


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the process's own cgroup, inside another."""
    own = tmp_path / "outer" / "inner"
    own.mkdir(parents=True)
    monkeypatch.setattr(machine, "_cgroup_directories", lambda: [own, own.parent, tmp_path])
    return own


def test_memory_of_the_process() -> None:
    memory = machine.process_memory()
    assert 10 << 20 < memory.now <= memory.peak
    held = bytearray(os.urandom(1 << 20) * 32)
    assert machine.process_memory().now > memory.now + (24 << 20)
    del held
    assert machine.process_memory().peak > memory.now + (24 << 20)


def test_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert machine.process_memory().now > 10 << 20


def test_the_lowest_limit_counts(cgroup: Path) -> None:
    machines = psutil.virtual_memory().total
    (cgroup / "memory.max").write_text("max\n")
    assert machine.total_ram() == machines
    (cgroup.parent / "memory.max").write_text(f"{GIB}\n")
    (cgroup / "memory.max").write_text(f"{2 * GIB}\n")
    assert machine.total_ram() == GIB
    (cgroup.parent / "memory.max").write_text(f"{machines * 2}\n")
    (cgroup / "memory.max").unlink()
    assert machine.total_ram() == machines


def test_what_is_free_counts_the_page_cache(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text(f"{GIB}\n")
    assert machine.available_ram() > GIB  # what the group uses isn't known
    (cgroup / "memory.current").write_text(f"{GIB // 2}\n")
    assert machine.available_ram() == GIB // 2
    (cgroup / "memory.stat").write_text("anon 5\ninactive_file 1000\n")
    assert machine.available_ram() == GIB // 2 + 1000
    (cgroup / "memory.current").write_text(f"{GIB * 2}\n")
    assert machine.available_ram() == 0


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", 6), ("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", 6), ("?", 6)],
)
def test_cores(cgroup: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    (cgroup.parent / "cpu.max").write_text(f"{limit}\n")
    assert machine.usable_cores() == expected


def test_the_cgroups_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    for path in machine._cgroup_directories():
        assert path == tmp_path or tmp_path in path.parents


# ------------------------------------------------------------------------------------------------ devices


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """A machine with two GPUs of 80 and 40 GiB."""
    found = {0: 80 * GIB, 1: 40 * GIB}
    monkeypatch.setattr(machine, "_gpus", lambda: found)
    monkeypatch.setattr(machine, "_has_gpu_driver", lambda: True)
    return found


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("auto", ["cuda:0", "cuda:1"]),
        ("cuda", ["cuda:0", "cuda:1"]),
        ("cuda:1", ["cuda:1"]),
        ("cuda:1, cuda:0,cuda:1", ["cuda:1", "cuda:0"]),
        ("cpu", ["cpu"]),
    ],
)
def test_devices(gpus: dict[int, int], wanted: str, names: list[str]) -> None:
    assert [device.name for device in machine.find_devices(wanted, None, 3)] == names


def test_the_share_of_a_gpu(gpus: dict[int, int]) -> None:
    shares = [device.vram for device in machine.find_devices("cuda", None, 3)]
    assert shares == [int(80 * GIB * machine.VRAM_SHARE), int(40 * GIB * machine.VRAM_SHARE)]
    assert {device.vram for device in machine.find_devices("cuda", 7 * GIB, 3)} == {7 * GIB}
    assert machine.find_devices("cpu", 7 * GIB, 3) == (DeviceBudget("cpu", None, 3),)


@pytest.mark.parametrize("wanted", ["gpu", "", "cuda:", "cuda:x", "cuda:²", "cuda:-1", "cpu,cuda", "cuda:0;cuda:1"])
def test_what_is_no_device(gpus: dict[int, int], wanted: str) -> None:
    if wanted == "cuda:":
        assert len(machine.find_devices(wanted, None, 1)) == 2
        return
    with pytest.raises(UsageError, match=r"is no device: give auto, cpu, cuda"):
        machine.find_devices(wanted, None, 1)


def test_a_device_that_is_not_here(gpus: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--device cuda:2: this machine has cuda:0, cuda:1"):
        machine.find_devices("cuda:2", None, 1)
    gpus.clear()
    with pytest.raises(UsageError, match="--device cuda: this machine has no CUDA device; use --device cpu"):
        machine.find_devices("cuda", None, 1)
    assert machine.find_devices("auto", None, 1) == (DeviceBudget("cpu", None, 1),)


def test_budgets(gpus: dict[int, int]) -> None:
    cpu, cuda = machine.find_devices("cpu", None, 2), machine.find_devices("cuda", None, 2)
    copying = machine.make_budget(None, cpu, computes=False)
    assert copying.ram == int(machine.total_ram() * machine.RAM_SHARE)
    assert machine.process_memory().now < copying.baseline + machine.SLACK_BYTES
    assert machine.make_budget(5 * GIB, cpu, computes=True).ram == 5 * GIB
    computing, on_gpu = (machine.make_budget(None, devices, computes=True) for devices in (cpu, cuda))
    assert on_gpu.baseline - computing.baseline > machine.CUDA_BYTES - (64 << 20)
    assert on_gpu.devices == cuda
