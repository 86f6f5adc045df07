"""All that `mergeloom plan` was asked for, put together: the plan, OUT, the time, other budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .alternatives import alternatives_section
from .destination import destination_section
from .plan import plan_sections, time_section
from .sections import Section

if TYPE_CHECKING:
    from ..engine.cost.estimate import Estimate
    from ..engine.run.alternatives import Alternative
    from ..engine.run.destination import Destination
    from ..engine.run.plan import Plan


@dataclass(frozen=True, slots=True)
class DryRun:
    """What `plan` found out.

    Args:
        plan: what a merge will do.
        destination: OUT, looked at; None without one.
        time: how long it takes; None where that wasn't asked for.
        others: what it would do within other budgets.
    """

    plan: Plan
    destination: Destination | None = None
    time: Estimate | None = None
    others: tuple[Alternative, ...] = ()

    def sections(self) -> list[Section]:
        """As people read it."""
        more = [time_section(self.time)] if self.time is not None else []
        if self.others:
            more.append(alternatives_section(self.others))
        found = plan_sections(self.plan, more)
        return found if self.destination is None else [*found, destination_section(self.destination)]

    def to_dict(self) -> dict[str, Any]:
        """As ``plan --json`` prints it."""
        found = self.plan.to_dict()
        if self.time is not None:
            found["time"] = self.time.to_dict()
        if self.others:
            found["alternatives"] = [other.to_dict() for other in self.others]
        if self.destination is not None:
            found["destination"] = self.destination.to_dict()
        return found
