"""Runs processes and measures them from start to end: seconds, CPU seconds, peak RSS, with inputs warm or cold.

Imports nothing but the standard library: the kernel counts what the parent holds at the moment of spawning as the
child's.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Measured:
    """The time and memory that one process used.

    Args:
        seconds: time from the start of the process to its end.
        cpu_seconds: CPU time, summed over all cores.
        others_cpu_seconds: CPU time of all other processes and of the kernel's threads during the run.
        peak_rss: peak resident set size in bytes.
    """

    seconds: float
    cpu_seconds: float
    others_cpu_seconds: float
    peak_rss: int


class ProcessError(Exception):
    """A measured process did not end with exit code 0; its log is in the text."""


def run(command: list[str], durable: Path | None = None) -> Measured:
    """Run a program from its start to its end; to the end of an fsync of all files below `durable`, if given."""
    with tempfile.TemporaryFile() as log:
        actions = [(os.POSIX_SPAWN_DUP2, log.fileno(), 1), (os.POSIX_SPAWN_DUP2, log.fileno(), 2)]
        busy = busy_seconds()
        began = time.monotonic()
        child = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
        _, status, usage = os.wait4(child, 0)
        if durable is not None:
            sync(durable)
        seconds = time.monotonic() - began
        busy = busy_seconds() - busy
        if status:
            log.seek(0)
            tail = log.read().decode(errors="replace")[-4000:]
            raise ProcessError(f"{' '.join(command)}\nended with {os.waitstatus_to_exitcode(status)}:\n{tail}")
    own = usage.ru_utime + usage.ru_stime
    return Measured(seconds, own, max(0.0, busy - own), usage.ru_maxrss * 1024)


def busy_seconds() -> float:
    """CPU seconds that the machine has spent on anything since it started."""
    user, nice, system, _idle, _waiting, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def sync(directory: Path) -> None:
    """Make every file below a directory, and the directories, durable."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def shards(directory: Path) -> list[Path]:
    """The safetensors files of a model."""
    return sorted(directory.glob("*.safetensors"))


def tensor_bytes(directory: Path) -> int:
    """The bytes of all tensors of a model, by its headers."""
    total = 0
    for path in shards(directory):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(
            entry["data_offsets"][1] - entry["data_offsets"][0] for key, entry in header.items() if key[0] != "_"
        )
    return total


def warm(files: Iterable[Path]) -> None:
    """Read files once to bring them into the page cache."""
    buffer = bytearray(1 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cool(files: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch_memory(size: int) -> None:
    """Use and free `size` bytes of memory, to have the host back that memory before the next process starts."""
    path = Path(f"/dev/shm/mergeloom-bench-{os.getpid()}")
    piece = bytes(1 << 20)
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(size >> 20):
                file.write(piece)
    finally:
        path.unlink(missing_ok=True)


def wait_for_quiet(limit: float) -> None:
    """Wait until other processes leave the machine alone for two seconds; at most `limit` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        busy = busy_seconds()
        time.sleep(2)
        if busy_seconds() - busy < 0.2:
            return


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return {
        "cpu": cpu[1] if cpu else os.uname().machine,
        "cores": len(os.sched_getaffinity(0)),
        "ram": int(memory[1]) << 10 if memory else 0,
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Installed versions, as another interpreter sees them; what isn't there is left out."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(json.dumps({p: found[p] for p in sys.argv[1:] if p in found}))"
    )
    read, write = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, write, 1)]
    child = os.posix_spawn(str(python), [str(python), "-c", code, *packages], os.environ, file_actions=actions)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    found: dict[str, str] = json.loads(text)
    return found
