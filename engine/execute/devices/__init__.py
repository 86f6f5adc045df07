"""Devices that compute, and the function that returns those of a budget."""

from __future__ import annotations

from collections.abc import Sequence

from ...schedule.budget import DeviceBudget
from .base import Device
from .cpu import CpuDevice


def open_devices(budgets: Sequence[DeviceBudget]) -> list[Device]:
    """Return the devices that a budget names.

    Raises:
        UsageError: if this machine lacks one of them.
    """
    devices: list[Device] = []
    for budget in budgets:
        kind, _, number = budget.name.partition(":")
        if kind == "cuda":
            from .cuda import CudaDevice

            devices.append(CudaDevice(int(number or 0), budget.threads))
        else:
            devices.append(CpuDevice(budget.threads))
    return devices
