"""Plans a merge for other budgets: a few sizes of RAM and VRAM, each with its own schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import BudgetError
from ...io.sizes import format_size, parse_size
from ..cost.estimate import Estimate, Rates, estimate
from ..schedule.budget import Budget
from ..schedule.schedule import Schedule, make_schedule

if TYPE_CHECKING:
    from .plan import Plan

THIS = "this plan"
_MAX_SIZES = 8
"""Maximum number of sizes of RAM, and of VRAM, that are tried."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """The costs of a merge with another budget.

    Args:
        ram: RAM budget in bytes.
        vram: VRAM budget of each GPU in bytes; 0 without a GPU.
        bytes_read: bytes read from files, re-reads included.
        bytes_reread: bytes that are read again.
        bytes_uploaded: bytes copied to the GPUs.
        peak_ram: peak RAM in bytes.
        peak_vram: peak VRAM in bytes.
        time: time estimate; None if no rates are known.
        planned: whether this is the plan's own budget.
    """

    ram: int
    vram: int
    bytes_read: int
    bytes_reread: int
    bytes_uploaded: int
    peak_ram: int
    peak_vram: int
    time: Estimate | None
    planned: bool = False

    @property
    def cost(self) -> tuple[int, int]:
        """Costs that more memory could reduce: bytes read, and bytes copied to GPUs."""
        return self.bytes_read, self.bytes_uploaded

    def to_dict(self) -> dict[str, Any]:
        """Return the costs as plain data, as ``plan --json`` prints them. Sizes are in bytes."""
        return {
            "max_ram": self.ram,
            "max_vram": self.vram,
            "bytes_read": self.bytes_read,
            "bytes_reread": self.bytes_reread,
            "bytes_uploaded": self.bytes_uploaded,
            "peak_ram": self.peak_ram,
            "peak_vram": self.peak_vram,
            "seconds": None if self.time is None else self.time.seconds,
            "planned": self.planned,
        }


def alternatives(plan: Plan, rates: Rates | None = None) -> list[Alternative]:
    """Plan other budgets: from the minimum RAM up to where more saves nothing, and the same for VRAM.

    Args:
        plan: plan of the merge.
        rates: rates for time estimates; None for no estimates.
    """
    budget = plan.schedule.budget
    bypassed = plan.bypassed
    tried = {(budget.ram, _vram(budget)): _alternative(plan, plan.schedule, rates, planned=True)}
    for ram in _sizes(plan.schedule.minimum_ram):
        other = _try(plan, replace(budget, ram=ram), bypassed, rates)
        if other is not None:
            tried.setdefault((other.ram, other.vram), other)
            if not other.bytes_reread:
                break
    if _vram(budget):
        before: Alternative | None = None
        minimum = sum(ref.nbytes for ref in plan.built.graph.reads)
        for vram in _sizes(plan.schedule.minimum_vram):
            devices = tuple(replace(d, vram=None if d.vram is None else vram) for d in budget.devices)
            other = _try(plan, replace(budget, devices=devices), bypassed, rates)
            if other is not None:
                tried.setdefault((other.ram, other.vram), other)
                if other.bytes_uploaded <= minimum or (before is not None and before.cost == other.cost):
                    break
                before = other
    own = tried[budget.ram, _vram(budget)]
    varied = [one for one in tried.values() if one.vram == own.vram]
    others = [one for one in tried.values() if one.vram != own.vram]
    return sorted(varied, key=lambda one: one.ram) + sorted(others, key=lambda one: one.vram)


def _vram(budget: Budget) -> int:
    return max((device.vram or 0 for device in budget.devices), default=0)


def _sizes(minimum: int) -> Iterator[int]:
    """Yield the minimum budget, rounded as it is printed, and then powers of two."""
    smallest = parse_size(format_size(minimum, up=True))
    yield smallest
    power = max(28, math.floor(math.log2(smallest)) + 1)
    for number in range(power, power + _MAX_SIZES):
        yield 1 << number


def _try(plan: Plan, budget: Budget, bypassed: Mapping[int, int], rates: Rates | None) -> Alternative | None:
    try:
        return _alternative(plan, make_schedule(plan.built.graph, budget, done=bypassed), rates)
    except BudgetError:
        return None


def _alternative(plan: Plan, schedule: Schedule, rates: Rates | None, *, planned: bool = False) -> Alternative:
    time = estimate(replace(plan, schedule=schedule).workload, rates) if rates is not None else None
    budget = schedule.budget
    return Alternative(
        budget.ram,
        _vram(budget),
        schedule.bytes_read + plan.bytes_copied + plan.bytes_digested,
        schedule.bytes_reread,
        schedule.uploaded,
        schedule.peak_ram,
        schedule.peak_vram,
        time,
        planned,
    )
