"""Loads what a merge computes with, before the memory of the process is measured and the merge is scheduled.

A CPU merge loads numpy and the compiler. Only devices with their own memory load torch.
"""

from __future__ import annotations

import gc
import importlib
import mmap
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from ...errors import BudgetError
from ...io import platform
from ...io.sizes import format_size
from ..graph.graph import MergeGraph
from ..schedule.budget import DeviceBudget
from .machine import address_space, address_space_limit
from .measure_memory import compiler_memory, measure_footprints


def prepare_to_compute(graph: MergeGraph, devices: Sequence[DeviceBudget], modules: Sequence[str] = ()) -> int:
    """Load the libraries and the engine, and find the memory that each kernel takes.

    Both `plan` and `merge` do this, so they measure the same process.

    Args:
        graph: graph whose kernels are measured.
        devices: budgets of the devices that compute.
        modules: further modules that a merge imports.

    Returns:
        The memory in bytes that compiling the kernels will take.

    Raises:
        BudgetError: if ``ulimit -v`` leaves too little address space for the libraries.
        UsageError: if a user's method fails.
    """
    separate = any(device.separate for device in devices)
    check_libraries_fit("torch" if separate else "llvmlite")
    platform.return_large_blocks()
    if separate:
        import_torch()
    else:
        load_compiler()
    for module in ("safetensors", "numpy", *modules):
        importlib.import_module(module)
    measure_footprints(graph, separate=separate)
    return 0 if separate else compiler_memory(graph)


def import_torch() -> ModuleType:
    """Import torch with garbage collection off: hundreds of collections would find nothing to free."""
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch
    finally:
        if collects:
            gc.enable()
    return torch


def load_compiler() -> None:
    """Load the compiler, and compile an empty function: most of LLVM's memory is in use once it has run.

    So the measured process has this memory, whether or not the kernels of the merge are cached. It takes 20 to 40 ms.
    """
    from ...methods.kernel.fused.compiler import compiled, target, target_machine

    compiled("define void @nothing() {\n  ret void\n}\n", target_machine(*target()))


_TRY = {
    "torch": """
import torch
torch.set_num_threads(1)
torch.rand(1 << 16).sum()
""",
    "llvmlite": """
import numpy
from mergeloom.engine.cost.prepare import load_compiler
load_compiler()
""",
}
_TRIED = {"torch": "import torch", "llvmlite": "load numpy and llvmlite"}
_MEASURED = """
import sys
def size():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0])
before = size()
{use}
sys.stdout.write(str(size() - before))
"""


def check_libraries_fit(library: str) -> None:
    """Check that ``ulimit -v`` leaves enough address space for the libraries that compute.

    Without enough, a library or one of its own would end the process without a message. So a child process tries it.

    Args:
        library: ``torch``, or ``llvmlite`` for what the CPU computes with.

    Raises:
        BudgetError: if it does not.
    """
    limit = address_space_limit()
    if limit is None or library in sys.modules:
        return
    import subprocess

    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    program = _MEASURED.format(use=_TRY[library])
    command = [sys.executable, "-c", program]
    tried = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    added = int(tried.stdout) * mmap.PAGESIZE if tried.returncode == 0 and tried.stdout.isdecimal() else None
    if added is None or address_space() + added > limit:
        needed = "" if added is None else f" ({format_size(address_space() + added, up=True)} are needed)"
        raise BudgetError(
            f"ulimit -v allows {format_size(limit)} of address space, which is too little to {_TRIED[library]}{needed}:"
            " raise it, for example with `ulimit -v unlimited`; --max-ram already limits the memory that is used"
        )
