"""What the machine has: memory, cores and GPUs that this process may use, and what the process itself takes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .engine.schedule import Budget, DeviceBudget
from .errors import UsageError
from .io.sizes import parse_size

RAM_SHARE = 0.7
"""The default --max-ram, as a share of the machine's memory (or of the cgroup's limit)."""
VRAM_SHARE = 0.85
"""The default --max-vram, as a share of the GPU's memory."""
TORCH_BYTES = 194 << 20
"""What importing torch and starting its threads adds to the process, in bytes."""
CUDA_BYTES = 1200 << 20
"""What a CUDA context adds to the process in host memory, in bytes."""
SLACK_BYTES = 24 << 20
"""For thread stacks, file buffers and the display, in bytes."""
COPYING_SLACK_BYTES = 5 << 20
"""The same where nothing is computed."""
JUDGE_BYTES = 12 << 20
"""What the safetensors library, and numpy with it, take to look at what was written; torch's share has both."""
PROGRAM_BYTES = 31 << 20
"""What the process takes once it has planned a small merge: the interpreter and what was imported, in bytes."""
TENSOR_BYTES = 1280
"""What planning takes for each tensor that is read or made, in bytes."""
FIRST_TENSORS, FIRST_BYTES = 4000, 2920
"""So many of the tensors take so much more: with them come files, headers and tables that many tensors share."""
JITTER_BYTES = 2 << 20
"""How much more a process may take than is reckoned before that counts."""
GUEST_STEP = 16 << 20
"""A larger program's memory is rounded up to this, in bytes."""
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Memory:
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


def process_memory() -> Memory:
    """What this process takes now and took at the most."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return Memory(*(int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM")))
    import psutil

    resident = psutil.Process().memory_info().rss
    return Memory(resident, resident)


def total_ram() -> int:
    """Bytes of memory that this process may use: the machine's, or the cgroup's limit where it is lower."""
    import psutil

    total = int(psutil.virtual_memory().total)
    for directory in _cgroup_directories():
        limit = _read_number(directory / "memory.max")
        if limit is not None:
            total = min(total, limit)
    return total


def available_ram() -> int:
    """Bytes of memory that are free for this process now, page cache included."""
    import psutil

    available = int(psutil.virtual_memory().available)
    for directory in _cgroup_directories():
        limit, used = _read_number(directory / "memory.max"), _read_number(directory / "memory.current")
        if limit is not None and used is not None:
            reclaimable = _read_fields(directory / "memory.stat").get("inactive_file", 0)
            available = min(available, limit - used + reclaimable)
    return max(0, available)


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the cgroup's CPU limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for directory in _cgroup_directories():
        try:
            quota, period = (directory / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def _cgroup_directories() -> list[Path]:
    """The directories of this process's cgroup (version 2), from its own up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    directory = _CGROUP / own.lstrip("/")
    return [directory, *(parent for parent in directory.parents if parent == _CGROUP or _CGROUP in parent.parents)]


def _read_number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _read_fields(file: Path) -> dict[str, int]:
    try:
        return {key: int(value) for key, value in (line.split() for line in file.read_text().splitlines())}
    except (OSError, ValueError):
        return {}


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
    tensors: int = 0,
) -> Budget:
    """The budget of a merge.

    Args:
        max_ram: the bound on the process's resident memory in bytes; a share of the machine's where None.
        devices: those that compute.
        computes: whether anything is computed, so that torch is needed.
        total: bytes of the machine's memory, where it isn't this one: what this process holds then doesn't count.
        tensors: how many tensors are read and made, which planning keeps account of.
    """
    # a reckoned figure, not the one of this moment, so that a plan and its merge agree to the byte
    baseline = PROGRAM_BYTES + tensors * TENSOR_BYTES + min(tensors, FIRST_TENSORS) * FIRST_BYTES
    now = process_memory().now
    if total is None and now > baseline + JITTER_BYTES:  # mergeloom is a guest in a larger program
        baseline = -(-now // GUEST_STEP) * GUEST_STEP
    baseline += SLACK_BYTES if computes else COPYING_SLACK_BYTES + JUDGE_BYTES
    if computes and (total is not None or "torch" not in sys.modules):
        baseline += TORCH_BYTES
    if computes and any(device.vram is not None for device in devices):
        baseline += CUDA_BYTES
    return Budget(max_ram or int((total or total_ram()) * RAM_SHARE), baseline, devices)
