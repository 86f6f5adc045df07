"""mergeloom: merge model checkpoints as a task graph, within a memory budget.

    import mergeloom

    plan = mergeloom.plan("recipe.yml", max_ram="32GiB")
    print(plan)
    mergeloom.merge(plan, "merged")

Names are loaded when they are first used, so that importing mergeloom, or a part of it, loads nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import merge, plan
    from .engine.recipe.types import Recipe
    from .engine.run.merge import Result
    from .engine.run.plan import Options, Plan
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

__version__ = "0.2.0.dev1"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "DiskSpaceError",
    "EnvironmentFailure",
    "Interrupted",
    "MergeloomError",
    "Options",
    "Plan",
    "Recipe",
    "RecipeError",
    "Result",
    "Unverified",
    "UsageError",
    "Verdict",
    "__version__",
    "merge",
    "plan",
    "verify",
]

_HOMES = {"merge": "api", "plan": "api", "Options": "planning", "Plan": "planning", "Result": "merging"}
_HOMES["Recipe"] = "engine.recipe"
_HOMES |= dict.fromkeys(("Unverified", "Verdict", "verify"), "verifying")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
