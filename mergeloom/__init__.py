"""Merge model checkpoints as a task graph within a memory budget.

    import mergeloom

    plan = mergeloom.plan("recipe.yml", max_ram="32GiB")
    print(plan)
    mergeloom.merge(plan, "merged")

Public names are imported on first use, so `import mergeloom` is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .api import Plan, diff, merge, plan
    from .engine.recipe.types import Recipe
    from .engine.run.diff.result import Diff, NotCompared, Similarity, TensorDiff
    from .engine.run.merge import Result
    from .engine.run.plan import Options
    from .engine.run.verify import Unverified, Verdict, verify
    from .errors import (
        BudgetError,
        CheckpointError,
        DiskSpaceError,
        EnvironmentFailure,
        Interrupted,
        MergeloomError,
        RecipeError,
        UsageError,
    )


__all__ = [
    "BudgetError",
    "CheckpointError",
    "Diff",
    "DiskSpaceError",
    "EnvironmentFailure",
    "Interrupted",
    "MergeloomError",
    "NotCompared",
    "Options",
    "Plan",
    "Recipe",
    "RecipeError",
    "Result",
    "Similarity",
    "TensorDiff",
    "Unverified",
    "UsageError",
    "Verdict",
    "__version__",
    "diff",
    "merge",
    "plan",
    "verify",
]

_MODULES = {
    "Diff": "engine.run.diff.result",
    "NotCompared": "engine.run.diff.result",
    "Similarity": "engine.run.diff.result",
    "TensorDiff": "engine.run.diff.result",
    "diff": "api",
    "merge": "api",
    "plan": "api",
    "Options": "engine.run.plan",
    "Plan": "api",
    "Recipe": "engine.recipe.types",
    "Result": "engine.run.merge",
    "Unverified": "engine.run.verify",
    "Verdict": "engine.run.verify",
    "verify": "engine.run.verify",
}
"""The module that defines each public name; the others are in `errors`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_MODULES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
