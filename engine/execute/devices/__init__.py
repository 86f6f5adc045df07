"""The devices that compute, and the function that opens those of a schedule."""

from __future__ import annotations

from collections.abc import Sequence

from ...schedule.schedule import DeviceBudget
from .base import Device
from .cpu import CpuDevice


def open_devices(budgets: Sequence[DeviceBudget]) -> list[Device]:
    """The devices that a schedule's budget names. Raises UsageError for one that isn't here."""
    devices: list[Device] = []
    for budget in budgets:
        kind, _, number = budget.name.partition(":")
        if kind == "cuda":
            from .cuda import CudaDevice

            devices.append(CudaDevice(int(number or 0), budget.threads))
        else:
            devices.append(CpuDevice(budget.threads))
    return devices
