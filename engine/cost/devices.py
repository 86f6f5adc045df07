"""The devices that compute a merge: the CPU, or GPUs, which need torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from ...errors import UsageError
from ...io.sizes import Limit
from ..schedule.budget import DeviceBudget
from .machine import limit_of

VRAM_SHARE = 0.85
"""The default --max-vram, as a share of the GPU's memory."""
INSTALL_TORCH = "pip install 'mergeloom[cuda]'"
"""Command that installs what computing on a GPU needs."""


def find_devices(
    wanted: str, max_vram: Limit | None, threads: int, gpus: Mapping[int, int] | None = None
) -> tuple[DeviceBudget, ...]:
    """Return the budgets of the devices that compute.

    Args:
        wanted: value of ``--device``: ``auto``, ``cpu``, ``cuda`` (all GPUs), ``cuda:1``, or several with commas.
        max_vram: limit for each GPU in bytes or as a share of its memory; `VRAM_SHARE` if None.
        threads: number of compute threads of the CPU.
        gpus: memory of each GPU in bytes, by number; the GPUs of this machine if None.

    Raises:
        UsageError: if a device is unknown or does not exist, or torch is not installed and a GPU is to compute.
    """
    owner = "this machine" if gpus is None else "the machine of --for"
    if wanted == "auto":
        here = gpus is None and _has_gpu_driver() and _has_torch() and _gpus()
        wanted = "cuda" if gpus or here else "cpu"
    if wanted == "cpu":
        return (DeviceBudget("cpu", None, threads),)
    parts = [part.strip().partition(":") for part in wanted.split(",")]
    if any(kind != "cuda" or (number and not number.isdecimal()) for kind, _, number in parts):
        raise UsageError(f"unknown device {wanted!r} for --device: use auto, cpu, cuda, cuda:0, or cuda:0,cuda:1")
    if not _has_torch():
        raise UsageError(
            f"--device {wanted}: computing on a GPU needs torch, which is not installed: run {INSTALL_TORCH}, or use "
            "--device cpu"
        )
    gpus = _gpus() if gpus is None else gpus
    numbers: list[int] = []
    for _, _, number in parts:
        numbers += [int(number)] if number else list(gpus)
    missing = [number for number in numbers if number not in gpus]
    if missing or not numbers:
        existing = ", ".join(f"cuda:{number}" for number in gpus)
        advice = f"only {existing}; use one of them, or --device cpu" if gpus else "no CUDA device; use --device cpu"
        raise UsageError(f"--device {wanted}: {owner} has {advice}")
    return tuple(
        DeviceBudget(f"cuda:{number}", limit_of(max_vram, gpus[number], VRAM_SHARE), 2)
        for number in dict.fromkeys(numbers)
    )


def torch_remark(wanted: str, gpus: Mapping[int, int] | None = None) -> str | None:
    """Return a warning if the CPU computes only because torch is not installed, else None.

    Args:
        wanted: value of ``--device``.
        gpus: as for `find_devices`.
    """
    if wanted != "auto" or gpus is not None or not _has_gpu_driver() or _has_torch():
        return None
    return (
        "this machine seems to have a GPU, but the CPU computes: a GPU needs torch, which is not installed; run "
        f"{INSTALL_TORCH}, or give --device cpu"
    )


def _has_gpu_driver() -> bool:
    """Return whether there may be a GPU, without importing torch."""
    return any(Path(path).exists() for path in ("/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/dxg"))


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _gpus() -> dict[int, int]:
    """Return the memory of each CUDA device in bytes, by number."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        number: int(torch.cuda.get_device_properties(number).total_memory)
        for number in range(torch.cuda.device_count())
    }
