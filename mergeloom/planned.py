"""The plan of a merge as the public API returns it."""

from __future__ import annotations

from dataclasses import fields

from .engine.run import plan as engine_plan


class Plan(engine_plan.Plan):
    """A plan of a merge. `print(plan)` shows what ``mergeloom plan`` prints, and a notebook displays it as HTML."""

    __slots__ = ()

    def __str__(self) -> str:
        from .report.plan import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        """Return the plan as HTML, which notebooks display."""
        from .report.html.notebook import make_fragment

        return make_fragment(self)


def public_plan(planned: engine_plan.Plan) -> Plan:
    """Return a plan of the engine as one that prints as the dry run."""
    if isinstance(planned, Plan):
        return planned
    return Plan(**{field.name: getattr(planned, field.name) for field in fields(planned)})
