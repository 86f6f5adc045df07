"""The limits of a schedule: RAM, and each device's own memory and threads."""

from __future__ import annotations

from dataclasses import dataclass, replace

TILE_ELEMENTS = 1 << 19
"""Elements of a tile on the CPU: its workspace stays in a core's cache."""
DEVICE_TILE_ELEMENTS = 1 << 22
"""Elements of a tile on a device with its own memory."""


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """The budget of a device that computes.

    Args:
        name: name of the device, such as ``cpu`` or ``cuda:0``.
        vram: limit of the device's own memory in bytes, or None if it computes in RAM.
        threads: number of compute threads, each with a workspace.
    """

    name: str
    vram: int | None
    threads: int

    @property
    def separate(self) -> bool:
        """Whether the device has its own memory."""
        return self.vram is not None

    @property
    def tile_elements(self) -> int:
        """Preferred number of elements in a compute tile."""
        return DEVICE_TILE_ELEMENTS if self.separate else TILE_ELEMENTS


@dataclass(frozen=True, slots=True)
class Budget:
    """The limits of a schedule.

    Args:
        ram: limit of the process's resident memory in bytes.
        baseline: bytes of RAM that the process takes without the engine's buffers.
        devices: budgets of the devices that compute, at least one.
        held: peak of the process's resident memory so far in bytes; 0 inside another program.
    """

    ram: int
    baseline: int
    devices: tuple[DeviceBudget, ...]
    held: int = 0


def shrink(budget: Budget, device: str, vram: int) -> Budget:
    """Return the budget with less memory on one device."""
    devices = tuple(replace(each, vram=vram) if each.name == device else each for each in budget.devices)
    return replace(budget, devices=devices)
