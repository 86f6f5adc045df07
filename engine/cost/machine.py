"""The machine's resources that this process may use, the memory of the process, and the budget of a merge."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from ...errors import BudgetError, UsageError
from ...io import platform
from ...io.cgroups import cpu_limit, memory_left, memory_limit
from ...io.sizes import Limit, Share, format_size, parse_memory
from ..schedule.budget import Budget, DeviceBudget
from ..schedule.schedule import Schedule
from .process_size import GraphSize, agreed_sizes, rounded

RAM_SHARE = 0.7
"""The default --max-ram, as a share of the machine's memory (or of the cgroup's limit)."""
CACHED_SHARE = 0.5
"""Inputs larger than this share of the free memory are dropped from the page cache after they are read."""
CUDA_BYTES = 1200 << 20
"""RAM that a CUDA context takes in the process, in bytes."""
SLACK_BYTES = 10 << 20
"""RAM for thread stacks, file buffers and the display, in bytes."""
COPYING_SLACK_BYTES = 5 << 20
"""`SLACK_BYTES` of a merge that computes nothing."""
VALIDATION_BYTES = 12 << 20
"""RAM of the safetensors library and numpy, which validate the shards, in bytes. A merge that computes counts them in
its measured memory."""
MEMORY_STEP = 16 << 20
"""The measured memory of the process is rounded up to a multiple of this, in bytes: it varies from run to run."""
COPYING_MEMORY_STEP = 4 << 20
"""`MEMORY_STEP` of a merge that computes nothing; its process is small."""
HEAPS = 2
"""Number of malloc heaps that threads share if address space is limited."""
THREAD_ADDRESSES = 8 << 20
"""Address space of a thread's stack in bytes if the system sets no limit."""


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """The resident memory of this process, in bytes.

    Args:
        now: current size (VmRSS).
        peak: peak size so far (VmHWM).
    """

    now: int
    peak: int


@dataclass(frozen=True, slots=True)
class Machine:
    """Another machine that a merge is planned for (``--for``).

    Args:
        ram: size of its RAM in bytes; that of this machine if None.
        vram: memory of each of its GPUs in bytes; None if it has no GPU.
        gpus: number of its GPUs.
        cores: number of cores that the process may use; that of this machine if None.
    """

    ram: int | None = None
    vram: int | None = None
    gpus: int = 1
    cores: int | None = None

    @property
    def memory_of_gpus(self) -> dict[int, int]:
        """Memory of each of its GPUs in bytes, by number."""
        return {} if self.vram is None else dict.fromkeys(range(self.gpus), self.vram)


def parse_machine(text: str) -> Machine:
    """Parse the value of ``--for``, such as ``vram=24GiB,ram=64GiB,cores=16,gpus=2``.

    Raises:
        UsageError: if it is invalid.
    """
    values: dict[str, int] = {}
    for part in text.split(","):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in ("ram", "vram", "gpus", "cores"):
            raise UsageError(f"--for {text}: unknown key {key!r}; use ram, vram, gpus or cores, such as ram=64GiB")
        if key in values:
            raise UsageError(f"--for {text}: {key} is given more than once")
        if key in ("ram", "vram"):
            try:
                values[key] = parse_memory(value)
            except UsageError as error:
                raise UsageError(f"--for {text}: {error}") from error
        elif value.isdecimal() and int(value) > 0:
            values[key] = int(value)
        else:
            raise UsageError(f"--for {text}: invalid value {value!r} for {key}: use a whole number above 0")
    if "gpus" in values and "vram" not in values:
        raise UsageError(f"--for {text}: gpus needs vram, the memory of each GPU: add it, such as vram=24GiB")
    return Machine(**values)


def process_memory() -> ProcessMemory:
    """Return the current and the peak memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return ProcessMemory(*(int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM")))
    import psutil

    resident = psutil.Process().memory_info().rss
    return ProcessMemory(resident, resident)


def resident_memory() -> int:
    """Return the current resident memory of this process in bytes (VmRSS), in one system call where there is one."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return process_memory().now


def _system_memory(key: str, attribute: str) -> int:
    """Return a figure about the machine's memory in bytes, where possible without psutil, which takes 10 ms to import.

    Args:
        key: name of the figure in ``/proc/meminfo``.
        attribute: name of the figure in psutil.
    """
    file = Path("/proc/meminfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    import psutil

    return int(getattr(psutil.virtual_memory(), attribute))


def total_ram() -> int:
    """Return the RAM that this process may use in bytes: the machine's, or the cgroup's limit if that is lower."""
    total = _system_memory("MemTotal", "total")
    limit = memory_limit()
    return total if limit is None else min(total, limit)


def available_ram() -> int:
    """Return the RAM that is free for this process now in bytes, page cache included."""
    available = _system_memory("MemAvailable", "available")
    left = memory_left()
    return available if left is None else max(0, min(available, left))


def usable_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and the cgroup's CPU limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cpu_limit()
    return cores if limit is None else min(cores, limit)


def limit_of(limit: Limit | None, total: int, default: float) -> int:
    """Return a limit for a memory of `total` bytes in bytes; by default the share `default`."""
    if limit is None:
        return int(total * default)
    return limit.of(total) if isinstance(limit, Share) else limit


def make_budget(
    max_ram: Limit | None,
    devices: tuple[DeviceBudget, ...],
    computes: bool,
    total: int | None = None,
    *,
    size: GraphSize | None = None,
    key: str | None = None,
    compiling: int = 0,
) -> Budget:
    """Return the budget of a merge, with the measured memory of this process as its baseline.

    Call `prepare_to_compute` first if anything is computed.

    Args:
        max_ram: limit of the process's resident memory in bytes or as a share of the machine's memory; `RAM_SHARE`
            if None.
        devices: budgets of the devices that compute.
        computes: whether anything is computed.
        total: RAM of the machine in bytes if it is not this one.
        size: numbers that the memory of the merge grows with; all 0 if None.
        key: `size_key` of the merge, by which `plan` and `merge` agree on the size of their processes; None to round
            the size of this process only.
        compiling: memory that compiling the kernels takes, in bytes.
    """
    step = MEMORY_STEP if computes else COPYING_MEMORY_STEP
    memory = process_memory()
    now, peak = rounded(memory.now, step), rounded(memory.peak, step)
    if key is not None and platform.OWN_PROCESS:
        now, peak = agreed_sizes((memory.now, memory.peak), step, key)
    separate = any(device.vram is not None for device in devices)
    baseline = now + compiling + (0 if size is None else size.nbytes(separate=separate))
    baseline += SLACK_BYTES if computes else COPYING_SLACK_BYTES + VALIDATION_BYTES
    if computes and separate:
        baseline += CUDA_BYTES
    held = peak if platform.OWN_PROCESS and total is None else 0
    ram = max_ram if isinstance(max_ram, int) else limit_of(max_ram, total or total_ram(), RAM_SHARE)
    return Budget(ram, baseline, devices, held)


def check_address_space(schedule: Schedule, threads: int) -> None:
    """Check that ``ulimit -v`` leaves enough address space for a schedule.

    Args:
        schedule: schedule to execute.
        threads: number of threads of the merge.

    Raises:
        BudgetError: if it does not.
    """
    limit = address_space_limit()
    if limit is None:
        return
    import resource

    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    stack = THREAD_ADDRESSES if stack == resource.RLIM_INFINITY else stack
    platform.share_heaps(HEAPS)
    needed = address_space() + schedule.peak_ram - process_memory().now + threads * stack
    needed += (HEAPS + 1) * platform.ARENA_BYTES  # malloc maps one more for a moment, to align a heap
    if needed > limit:
        raise BudgetError(
            f"ulimit -v allows {format_size(limit)} of address space, and the merge needs "
            f"{format_size(needed, up=True)}: raise it, for example with `ulimit -v unlimited`, or use a smaller "
            "--max-ram"
        )


def address_space_limit() -> int | None:
    """Return the limit of ``ulimit -v`` in bytes; None if there is no limit."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def address_space() -> int:
    """Return the address space of this process in bytes; 0 if the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    except OSError:
        return 0


def memory_remark(max_ram: Limit | None, machine: Machine | None) -> str | None:
    """Return a warning if a budget exceeds the memory of the machine, else None.

    Args:
        max_ram: value of ``--max-ram`` in bytes or as a share of the memory, or None.
        machine: machine that the merge is planned for; this one if None.
    """
    if not isinstance(max_ram, int) or (machine is not None and machine.ram is None):
        return None
    total = total_ram() if machine is None or machine.ram is None else machine.ram
    if max_ram <= total:
        return None
    where = "the machine of --for has" if machine is not None else "this process may use (see also its cgroup's limit)"
    return f"--max-ram {format_size(max_ram)} is more than the {format_size(total)} of memory that {where}"
