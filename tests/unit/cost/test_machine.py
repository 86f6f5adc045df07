"""What the machine has: cgroup limits count, devices are found or refused by name."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from mergeloom.__main__ import main
from mergeloom.engine.cost import devices, machine
from mergeloom.engine.cost.machine import Machine
from mergeloom.engine.cost.process_size import OUTPUT_BYTES, READ_BYTES, SCHEDULES, GraphSize
from mergeloom.engine.run import merge as merging
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.engine.schedule.budget import DeviceBudget
from mergeloom.engine.schedule.step_list import step_list_bytes
from mergeloom.errors import UsageError
from mergeloom.io import platform
from mergeloom.report.plan import plan_text
from tests.support.plans import linear

GIB = 1 << 30


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


def test_a_cgroup_limit_counts_where_it_is_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    machines, available = psutil.virtual_memory().total, machine.available_ram()
    for limit, expected in ((None, machines), (GIB, GIB), (2 * machines, machines)):
        monkeypatch.setattr(machine, "memory_limit", lambda limit=limit: limit)
        assert machine.total_ram() == expected
    for left, expected in ((1000, 1000), (-5, 0)):
        monkeypatch.setattr(machine, "memory_left", lambda left=left: left)
        assert machine.available_ram() == expected
    monkeypatch.setattr(machine, "memory_left", lambda: None)
    assert machine.available_ram() > available // 2


@pytest.mark.parametrize(("limit", "expected"), [(None, 6), (2, 2), (99, 6)])
def test_cores(monkeypatch: pytest.MonkeyPatch, limit: int | None, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr(machine, "cpu_limit", lambda: limit)
    assert machine.usable_cores() == expected


@pytest.mark.parametrize(
    ("given", "there", "expected"),
    [
        (None, None, None),
        (GIB, Machine(vram=GIB), None),
        (GIB, Machine(ram=GIB), None),
        (2 * GIB, Machine(ram=GIB), "--max-ram 2GiB is more than the 1GiB of memory that the machine of --for has"),
        (1 << 60, None, "of memory that this process may use"),
    ],
)
def test_a_budget_beyond_the_memory_is_reported(given: int | None, there: Machine | None, expected: str | None) -> None:
    remark = machine.memory_remark(given, there)
    assert (remark is None) == (expected is None)
    if remark is not None and expected is not None:
        assert expected in remark


# ------------------------------------------------------------------------------------------------ devices


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """A machine with two GPUs of 80 and 40 GiB."""
    found = {0: 80 * GIB, 1: 40 * GIB}
    monkeypatch.setattr(devices, "_gpus", lambda: found)
    monkeypatch.setattr(devices, "_has_gpu_driver", lambda: True)
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
    assert [device.name for device in devices.find_devices(wanted, None, 3)] == names


def test_the_share_of_a_gpu(gpus: dict[int, int]) -> None:
    shares = [device.vram for device in devices.find_devices("cuda", None, 3)]
    assert shares == [int(80 * GIB * devices.VRAM_SHARE), int(40 * GIB * devices.VRAM_SHARE)]
    assert {device.vram for device in devices.find_devices("cuda", 7 * GIB, 3)} == {7 * GIB}
    assert devices.find_devices("cpu", 7 * GIB, 3) == (DeviceBudget("cpu", None, 3),)


@pytest.mark.parametrize("wanted", ["gpu", "", "cuda:", "cuda:x", "cuda:²", "cuda:-1", "cpu,cuda", "cuda:0;cuda:1"])
def test_an_unknown_device_is_refused(gpus: dict[int, int], wanted: str) -> None:
    if wanted == "cuda:":
        assert len(devices.find_devices(wanted, None, 1)) == 2
        return
    with pytest.raises(UsageError, match=r"unknown device .* for --device: use auto, cpu, cuda"):
        devices.find_devices(wanted, None, 1)


def test_a_device_that_is_not_here(gpus: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--device cuda:2: this machine has only cuda:0, cuda:1; use one of them"):
        devices.find_devices("cuda:2", None, 1)
    gpus.clear()
    with pytest.raises(UsageError, match="--device cuda: this machine has no CUDA device; use --device cpu"):
        devices.find_devices("cuda", None, 1)
    assert devices.find_devices("auto", None, 1) == (DeviceBudget("cpu", None, 1),)


def test_budgets(gpus: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = machine.ProcessMemory(now=(100 << 20) + 1, peak=(200 << 20) + 1)
    monkeypatch.setattr(machine, "process_memory", lambda: memory)
    cpu, cuda = devices.find_devices("cpu", None, 2), devices.find_devices("cuda", None, 2)
    copying = machine.make_budget(None, cpu, computes=False)
    assert copying.ram == int(machine.total_ram() * machine.RAM_SHARE)
    assert copying.baseline == (104 << 20) + machine.COPYING_SLACK_BYTES + machine.VALIDATION_BYTES
    computing = machine.make_budget(5 * GIB, cpu, computes=True)
    assert (computing.ram, computing.baseline, computing.held) == (5 * GIB, (112 << 20) + machine.SLACK_BYTES, 0)
    size = GraphSize(reads=30, outputs=10, steps=1000, sources=3000)
    large = machine.make_budget(5 * GIB, cpu, computes=True, size=size)
    counted = SCHEDULES * step_list_bytes(1000, 3000, separate=False)
    counted += 10 * OUTPUT_BYTES + 30 * READ_BYTES
    assert large.baseline - computing.baseline == size.nbytes() == counted
    assert size.nbytes(separate=True) > counted
    on_gpu = machine.make_budget(None, cuda, computes=True)
    assert on_gpu.baseline - computing.baseline == machine.CUDA_BYTES
    assert on_gpu.devices == cuda
    monkeypatch.setattr(platform, "OWN_PROCESS", True)  # of which the peak so far counts, too
    assert machine.make_budget(5 * GIB, cpu, computes=True).held == 208 << 20
    assert machine.make_budget(5 * GIB, cpu, computes=True, total=GIB).held == 0


# ------------------------------------------------------------------------------------------------ ulimit -v


def limited(limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command with so many bytes of address space."""
    command = [sys.executable, "-m", "mergeloom", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )


def needed_addresses() -> int:
    """Bytes of address space that the libraries of a CPU merge take in this environment."""
    loading = "import numpy; from mergeloom.engine.cost.prepare import load_compiler; load_compiler()"
    program = f"{loading}; print(open('/proc/self/statm').read().split()[0])"
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    return int(found.stdout) * resource.getpagesize()


def test_too_little_address_space_is_an_error(llamas: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(linear(llamas["a"], llamas["b"])))
    needed = needed_addresses()
    for limit in (needed * 2 // 3, needed * 5 // 6, needed + (48 << 20)):
        for command in (["plan", recipe], ["merge", recipe, tmp_path / "out"]):
            ended = limited(limit, *command, "--device", "cpu", "--max-ram", "1GiB")
            assert ended.returncode == 3, ended.stderr
            assert "ulimit -v allows" in ended.stderr
            assert not (tmp_path / "out").exists()
    ended = limited(needed + (2 << 30), "merge", recipe, tmp_path / "out", "--device", "cpu", "--max-ram", "1GiB")
    assert ended.returncode == 0, ended.stderr


# ------------------------------------------------------------------------------------------------ what is reported


def test_a_merge_that_exceeds_its_budget_ends_with_3_and_a_complete_output(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = iter([GIB, 5 * GIB])
    monkeypatch.setattr(merging, "process_memory", lambda: machine.ProcessMemory(GIB, next(peaks)))
    recipe, report = tmp_path / "recipe.yml", tmp_path / "report.json"
    recipe.write_text(yaml.safe_dump(linear(llamas["a"], llamas["b"])))
    arguments = ["merge", recipe, tmp_path / "out", "--quiet", "--device", "cpu", "--max-ram", "4GiB"]
    assert main([*map(str, arguments), "--report", str(report)]) == 3
    said = capsys.readouterr().err
    assert "the merge is complete, but the process used 5GiB of RAM, more than the budget of 4GiB" in said
    assert json.loads(report.read_text())["measured"]["excess_ram"] == GIB
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_peak_from_before_the_merge_is_not_its_own(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "process_memory", lambda: machine.ProcessMemory(GIB, 5 * GIB))
    result = merging.merge(linear(llamas["a"], llamas["b"]), tmp_path / "out", Options(max_ram=4 * GIB, device="cpu"))
    assert (result.peak_rss, result.excess_ram) == (5 * GIB, 0)


def test_plan_and_merge_warn_of_a_budget_beyond_the_memory(
    llamas: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(linear(llamas["a"], llamas["b"])))
    warning = "--max-ram 1024TiB is more than the "
    assert main(["plan", str(recipe), "--device", "cpu", "--max-ram", "1024TiB"]) == 0
    assert warning in capsys.readouterr().out
    assert (
        main(["merge", str(recipe), str(tmp_path / "out"), "--quiet", "--device", "cpu", "--max-ram", "1024TiB"]) == 0
    )
    assert f"warning: {warning}" in capsys.readouterr().err


def test_a_plan_for_another_machine_says_where_the_program_was_measured(llamas: dict[str, Path]) -> None:
    recipe = linear(llamas["a"], llamas["b"])
    assert "(measured on this machine)" in plan_text(plan(recipe, Options(machine=Machine(ram=16 * GIB))))
    assert "measured on" not in plan_text(plan(recipe, Options(device="cpu")))


FRAGMENTS = """
import sys
from mergeloom.io import platform
from mergeloom.engine.cost.machine import process_memory
assert platform.return_large_blocks()
import numpy
kept = []
before = process_memory().now
for _ in range(64):
    large = numpy.ones(4 << 20, dtype=numpy.uint8)
    del large
    kept.append(bytearray(4096))
    held = numpy.ones(1 << 20, dtype=numpy.uint8)
    del held
print(process_memory().now - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_large_blocks_go_back_to_the_system() -> None:
    found = subprocess.run([sys.executable, "-c", FRAGMENTS], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 1 << 20


def test_without_mallopt_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "DISABLED", {"mallopt"})
    assert not platform.return_large_blocks()
