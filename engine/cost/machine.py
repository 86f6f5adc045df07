"""What the machine has: memory, cores and GPUs that this process may use, and what the process itself takes."""

from __future__ import annotations

import importlib
import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import BudgetError, UsageError
from ...io import platform
from ...io.cgroups import cpu_limit, memory_left, memory_limit
from ...io.sizes import format_size, parse_size
from ..graph.graph import MergeGraph
from ..schedule.schedule import Budget, DeviceBudget, Schedule

RAM_SHARE = 0.7
"""The default --max-ram, as a share of the machine's memory (or of the cgroup's limit)."""
CACHED_SHARE = 0.5
"""Inputs larger than this share of the free memory are dropped from the page cache after they are read."""
VRAM_SHARE = 0.85
"""The default --max-vram, as a share of the GPU's memory."""
CUDA_BYTES = 1200 << 20
"""What a CUDA context adds to the process in host memory, in bytes."""
SLACK_BYTES = 10 << 20
"""For thread stacks, file buffers and the display, in bytes."""
COPYING_SLACK_BYTES = 5 << 20
"""The same where nothing is computed."""
JUDGE_BYTES = 12 << 20
"""What the safetensors library, and numpy with it, take to look at what was written; where torch is imported, it has
imported both."""
STEP_BYTES = 900
"""What the schedule takes for each step, in bytes: two schedules exist at the same time while OUT is looked at."""
OUTPUT_BYTES = 1024
"""What digests, journal and manifest take for each output tensor, in bytes."""
MEMORY_STEP = 16 << 20
"""The measured memory of the process is rounded up to this, in bytes: it varies a little from run to run, and `plan`
and `merge` should agree."""
COPYING_MEMORY_STEP = 4 << 20
"""The same where nothing is computed, and the process is small."""
HEAPS = 2
"""Heaps that threads share where address space is limited."""
THREAD_ADDRESSES = 8 << 20
"""Address space of a thread's stack, in bytes, where the system does not say."""


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """The resident memory of this process, in bytes.

    Args:
        now: at this moment.
        peak: the most so far (VmHWM).
    """

    now: int
    peak: int


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that a merge is planned for without being there. What isn't said is as it is here.

    Args:
        ram: bytes of its memory, or None.
        vram: bytes of the memory of each of its GPUs, or None where it has none.
        gpus: how many GPUs it has.
        cores: how many cores the process may use, or None.
    """

    ram: int | None = None
    vram: int | None = None
    gpus: int = 1
    cores: int | None = None

    @property
    def memory_of_gpus(self) -> dict[int, int]:
        """The memory of each of its GPUs, in bytes."""
        return {} if self.vram is None else dict.fromkeys(range(self.gpus), self.vram)


def parse_machine(text: str) -> Machine:
    """A machine from ``vram=24GiB,ram=64GiB,cores=16,gpus=2``. Raises UsageError."""
    found: dict[str, int] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in ("ram", "vram", "gpus", "cores"):
            raise UsageError(f"--for {text}: {part.strip()!r} is nothing of a machine: give ram, vram, gpus or cores")
        if key in found:
            raise UsageError(f"--for {text}: {key} is there twice")
        if key in ("ram", "vram"):
            found[key] = parse_size(value)
        elif value.isdecimal() and int(value) > 0:
            found[key] = int(value)
        else:
            raise UsageError(f"--for {text}: {key} is {value!r}, and must be a whole number above 0")
    if "gpus" in found and "vram" not in found:
        raise UsageError(f"--for {text}: say how much memory each GPU has, such as vram=24GiB")
    return Machine(**found)


def process_memory() -> ProcessMemory:
    """What this process takes now and took at the most."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return ProcessMemory(*(int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM")))
    import psutil

    resident = psutil.Process().memory_info().rss
    return ProcessMemory(resident, resident)


def total_ram() -> int:
    """Bytes of memory that this process may use: the machine's, or the cgroup's limit where it is lower."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = memory_limit()
    return total if limit is None else min(total, limit)


def available_ram() -> int:
    """Bytes of memory that are free for this process now, page cache included."""
    import psutil

    available = int(psutil.virtual_memory().available)
    left = memory_left()
    return available if left is None else max(0, min(available, left))


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the cgroup's CPU limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cpu_limit()
    return cores if limit is None else min(cores, limit)


def find_devices(
    wanted: str, max_vram: int | None, threads: int, gpus: Mapping[int, int] | None = None
) -> tuple[DeviceBudget, ...]:
    """The devices that compute.

    Args:
        wanted: ``auto``, ``cpu``, ``cuda`` (all GPUs), ``cuda:1``, or several of these with commas.
        max_vram: bytes that may be held on each GPU; a share of its memory where None.
        threads: compute threads of the CPU.
        gpus: the memory of each GPU in bytes; those of this machine where None.

    Raises:
        UsageError: for a device that isn't there.
    """
    there = "this machine" if gpus is None else "the machine of --for"
    if wanted == "auto":
        wanted = "cuda" if gpus or (gpus is None and _has_gpu_driver() and _gpus()) else "cpu"
    if wanted == "cpu":
        return (DeviceBudget("cpu", None, threads),)
    gpus = _gpus() if gpus is None else gpus
    numbers: list[int] = []
    for part in wanted.split(","):
        kind, _, number = part.strip().partition(":")
        if kind != "cuda" or (number and not number.isdecimal()):
            raise UsageError(f"{wanted!r} is no device: give auto, cpu, cuda, cuda:0, or cuda:0,cuda:1")
        numbers += [int(number)] if number else list(gpus)
    missing = [number for number in numbers if number not in gpus]
    if missing or not numbers:
        here = ", ".join(f"cuda:{number}" for number in gpus) or "no CUDA device"
        raise UsageError(f"--device {wanted}: {there} has {here}; use --device cpu, or one that is there")
    return tuple(
        DeviceBudget(f"cuda:{number}", max_vram or int(gpus[number] * VRAM_SHARE), 2)
        for number in dict.fromkeys(numbers)
    )


def _has_gpu_driver() -> bool:
    """Whether it is worth importing torch to look for a GPU."""
    return any(Path(path).exists() for path in ("/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/dxg"))


def _gpus() -> dict[int, int]:
    """The memory of each CUDA device, in bytes."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        number: int(torch.cuda.get_device_properties(number).total_memory)
        for number in range(torch.cuda.device_count())
    }


def make_budget(
    max_ram: int | None,
    devices: tuple[DeviceBudget, ...],
    computes: bool,
    total: int | None = None,
    *,
    steps: int = 0,
    outputs: int = 0,
) -> Budget:
    """The budget of a merge. Measures this process: `prepare_to_compute` comes first where anything is computed.

    Args:
        max_ram: the bound on the process's resident memory in bytes; a share of the machine's where None.
        devices: those that compute.
        computes: whether anything is computed.
        total: bytes of the machine's memory, where it isn't this one.
        steps: of the schedule that is going to be made.
        outputs: output tensors.
    """
    step = MEMORY_STEP if computes else COPYING_MEMORY_STEP
    baseline = -(-process_memory().now // step) * step + steps * STEP_BYTES + outputs * OUTPUT_BYTES
    baseline += SLACK_BYTES if computes else COPYING_SLACK_BYTES + JUDGE_BYTES
    if computes and any(device.vram is not None for device in devices):
        baseline += CUDA_BYTES
    held = -(-process_memory().peak // step) * step if platform.OWN_PROCESS and total is None else 0
    return Budget(max_ram or int((total or total_ram()) * RAM_SHARE), baseline, devices, held)


def prepare_to_compute(graph: MergeGraph, modules: Sequence[str] = ()) -> None:
    """Bring the process into the state in which a merge computes: torch and the engine imported, every kind of kernel
    run once on a small tile, which also measures its memory. `plan` and `merge` both do this.

    Args:
        graph: the graph whose kernels are measured.
        modules: modules that a merge imports later than a plan.

    Raises:
        BudgetError: where ``ulimit -v`` leaves too little address space for torch, which would end the process.
        UsageError: where a user's method fails.
    """
    check_torch_fits()
    from ..execute.passes import import_torch
    from .measure_memory import measure_footprints

    platform.return_large_blocks()
    import_torch()
    for module in ("safetensors", "numpy", *modules):
        importlib.import_module(module)
    measure_footprints(graph)


_TRY_TORCH = """
import sys
def size():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0])
before = size()
import torch
torch.set_num_threads(1)
torch.rand(1 << 16).sum()
sys.stdout.write(str(size() - before))
"""


def check_torch_fits() -> None:
    """Raises BudgetError where ``ulimit -v`` leaves too little address space to import torch.

    torch, or a library of its, would end the process without a message. So another process tries it.
    """
    limit = address_space_limit()
    if limit is None or "torch" in sys.modules:
        return
    import subprocess

    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    tried = subprocess.run(
        [sys.executable, "-c", _TRY_TORCH], capture_output=True, text=True, env=environment, check=False
    )
    added = int(tried.stdout) * mmap.PAGESIZE if tried.returncode == 0 and tried.stdout.isdecimal() else None
    if added is None or address_space() + added > limit:
        needed = "" if added is None else f" ({format_size(address_space() + added, up=True)} are needed)"
        raise BudgetError(
            f"ulimit -v allows {format_size(limit)} of address space, which is too little to import torch{needed}: "
            "raise it, as with `ulimit -v unlimited`; --max-ram limits the memory that is used"
        )


def check_address_space(schedule: Schedule, threads: int) -> None:
    """Raises BudgetError where ``ulimit -v`` leaves too little address space for a schedule.

    Args:
        schedule: what is going to be done.
        threads: how many threads do it.
    """
    limit = address_space_limit()
    if limit is None:
        return
    import resource

    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    stack = THREAD_ADDRESSES if stack == resource.RLIM_INFINITY else stack
    platform.share_heaps(HEAPS)
    needed = address_space() + schedule.peak_ram - process_memory().now + threads * stack
    needed += (HEAPS + 1) * platform.ARENA_BYTES  # one more is taken for a moment, to align it
    if needed > limit:
        raise BudgetError(
            f"ulimit -v allows {format_size(limit)} of address space, and the merge needs "
            f"{format_size(needed, up=True)}: raise it, as with `ulimit -v unlimited`, or give a smaller --max-ram"
        )


def address_space_limit() -> int | None:
    """The limit of ``ulimit -v`` in bytes; None without one."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def address_space() -> int:
    """Bytes of address space that this process takes; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    except OSError:
        return 0


def memory_remark(max_ram: int | None, machine: Machine | None) -> str | None:
    """A warning about a budget beyond the memory of the machine; None where it has as much.

    Args:
        max_ram: as given by the user.
        machine: that the merge is planned for; this one where None.
    """
    if max_ram is None or (machine is not None and machine.ram is None):
        return None
    total = total_ram() if machine is None or machine.ram is None else machine.ram
    if max_ram <= total:
        return None
    where = "the machine of --for has" if machine is not None else "this process may use (see also its cgroup's limit)"
    return f"--max-ram {format_size(max_ram)} is more than the {format_size(total)} of memory that {where}"
