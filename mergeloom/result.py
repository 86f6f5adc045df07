"""The result of a merge as the public API returns it."""

from __future__ import annotations

from dataclasses import fields

from .engine.run import merge as engine_merge
from .planned import Plan, public_plan


class Result(engine_merge.Result):
    """The result of a merge. `print(result)` shows the summary that ``mergeloom merge`` prints."""

    __slots__ = ()

    plan: Plan

    def __str__(self) -> str:
        from .report.result import result_text

        return result_text(self) or repr(self)


def public_result(result: engine_merge.Result) -> Result:
    """Return a result of the engine as one that prints as the summary, with a plan that prints as the dry run."""
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    return Result(**{**values, "plan": public_plan(result.plan)})
