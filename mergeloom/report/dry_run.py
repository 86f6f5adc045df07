"""The complete dry run: the plan, the output directory, the estimated time and other budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .alternatives import alternatives_section
from .destination import destination_section
from .plan import plan_sections
from .sections import Section
from .time import time_section

if TYPE_CHECKING:
    from ..engine.cost.estimate import Estimate
    from ..engine.run.alternatives import Alternative
    from ..engine.run.destination import Destination
    from ..engine.run.plan import Plan


@dataclass(frozen=True, slots=True)
class DryRun:
    """The results of `mergeloom plan`.

    Args:
        plan: plan of the merge.
        destination: state of OUT; None without OUT.
        time: estimated time; None unless it was asked for.
        others: the same merge within other budgets.
    """

    plan: Plan
    destination: Destination | None = None
    time: Estimate | None = None
    others: tuple[Alternative, ...] = ()

    def sections(self) -> list[Section]:
        """Return the sections that people read."""
        more = [time_section(self.time)] if self.time is not None else []
        if self.others:
            more.append(alternatives_section(self.others))
        sections = plan_sections(self.plan, more)
        return sections if self.destination is None else [*sections, destination_section(self.destination)]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``plan --json``."""
        content = self.plan.to_dict()
        if self.time is not None:
            content["time"] = self.time.to_dict()
        if self.others:
            content["alternatives"] = [other.to_dict() for other in self.others]
        if self.destination is not None:
            content["destination"] = self.destination.to_dict()
        return content
