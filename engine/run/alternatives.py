"""What a merge would do within other budgets: a few sizes of RAM and VRAM, each with its own schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import BudgetError
from ...io.sizes import format_size, parse_size
from ..cost.estimate import Estimate, Rates, estimate
from ..schedule.schedule import Budget, Schedule, make_schedule

if TYPE_CHECKING:
    from .plan import Plan

THIS = "this plan"
_MOST = 8
"""How many budgets of a kind are tried."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A plan within another budget.

    Args:
        ram: the budget, in bytes.
        vram: of each GPU, in bytes; 0 without one.
        bytes_read: from files, re-reads included.
        bytes_reread: the part of them that had been read before.
        bytes_uploaded: to the GPUs.
        peak_ram: what is then held, in bytes.
        peak_vram: the same of VRAM.
        time: how long it takes; None where no rates are known.
        planned: whether it is the plan's own budget.
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
        """What more memory could save: bytes read, and bytes copied to GPUs."""
        return self.bytes_read, self.bytes_uploaded

    def to_dict(self) -> dict[str, Any]:
        """As ``plan --json`` prints it. Sizes are in bytes."""
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
    """The plan's own budget among others: from the least RAM that works up to where more saves nothing, and so of VRAM.

    Args:
        plan: whose graph is scheduled anew.
        rates: for the time; None for none.
    """
    budget = plan.schedule.budget
    aside = plan.bypassed
    found = {(budget.ram, _vram(budget)): _alternative(plan, plan.schedule, rates, planned=True)}
    for ram in _sizes(plan.schedule.minimum_ram):
        tried = _try(plan, replace(budget, ram=ram), aside, rates)
        if tried is not None:
            found.setdefault((tried.ram, tried.vram), tried)
            if not tried.bytes_reread:
                break
    if _vram(budget):
        before: Alternative | None = None
        graph = plan.built.graph
        least = sum(graph.reads[read].nbytes for read in {r for n in graph for r in graph.node_sources[n]})
        for vram in _sizes(plan.schedule.minimum_vram):
            devices = tuple(replace(d, vram=None if d.vram is None else vram) for d in budget.devices)
            tried = _try(plan, replace(budget, devices=devices), aside, rates)
            if tried is not None:
                found.setdefault((tried.ram, tried.vram), tried)
                if tried.bytes_uploaded <= least or (before is not None and before.cost == tried.cost):
                    break
                before = tried
    own = found[budget.ram, _vram(budget)]
    varied = [one for one in found.values() if one.vram == own.vram]
    others = [one for one in found.values() if one.vram != own.vram]
    return sorted(varied, key=lambda one: one.ram) + sorted(others, key=lambda one: one.vram)


def _vram(budget: Budget) -> int:
    return max((device.vram or 0 for device in budget.devices), default=0)


def _sizes(least: int) -> Iterator[int]:
    """The smallest budget that works, as it is printed, and then the powers of two."""
    smallest = parse_size(format_size(least, up=True))
    yield smallest
    power = max(28, math.floor(math.log2(smallest)) + 1)
    for number in range(power, power + _MOST):
        yield 1 << number


def _try(plan: Plan, budget: Budget, aside: Mapping[int, int], rates: Rates | None) -> Alternative | None:
    try:
        return _alternative(plan, make_schedule(plan.built.graph, budget, done=aside), rates)
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
