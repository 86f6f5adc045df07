"""Where a page comes from: the command, the machine and the date."""

from __future__ import annotations

import os
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ...engine.cost.machine import Machine, total_ram, usable_cores
from ...io.units import memory_size, plural

_CPU = re.compile(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Origin:
    """The command that made a page, and where and when it ran.

    Args:
        command: command line.
        machine: description of this machine.
        date: date and time with the time zone.
    """

    command: str
    machine: str
    date: str


def find_origin(arguments: Sequence[str]) -> Origin:
    """Describe this run of mergeloom.

    Args:
        arguments: arguments of the command line, without the program's name.
    """
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Origin(shlex.join(["mergeloom", *arguments]), this_machine(), now)


def this_machine() -> str:
    """Describe this machine, without torch: ``AMD EPYC, 2 cores, 23.4GiB RAM, 1 x NVIDIA H200, Linux 6.18``."""
    system = os.uname()
    gpus = _gpu_names()
    parts = (
        _cpu_name() or system.machine,
        plural(usable_cores(), "core"),
        f"{memory_size(total_ram())} RAM",
        *(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)),
        f"{system.sysname} {system.release}",
    )
    return ", ".join(parts)


def other_machine(machine: Machine) -> str:
    """Describe the machine of ``--for``: ``64GiB RAM, 1 GPU with 24GiB, 16 cores``."""
    parts = [f"{memory_size(total_ram() if machine.ram is None else machine.ram)} RAM"]
    if machine.vram is None:
        parts.append("no GPU")
    else:
        parts.append(f"{plural(machine.gpus, 'GPU')} with {memory_size(machine.vram)}")
    parts.append(plural(usable_cores() if machine.cores is None else machine.cores, "core"))
    return ", ".join(parts)


def _cpu_name() -> str:
    """Return the name of the processor; empty if the system does not tell it."""
    try:
        found = _CPU.search(Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor()


def _gpu_names(driver: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Return the names of the GPUs that NVIDIA's driver lists."""
    try:
        texts = [file.read_text() for file in sorted(driver.glob("*/information"))]
    except OSError:
        return []
    return [found[1].strip() for text in texts if (found := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE))]
