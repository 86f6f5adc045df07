"""Merge model checkpoints as a task graph within a memory budget.

    import mergeloom

    plan = mergeloom.plan("recipe.yml", max_ram="32GiB")
    print(plan)
    mergeloom.merge(plan, "merged")

docs/python.md describes the functions with examples. Public names are imported on first use, so `import mergeloom` is
fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .adapters import extract_lora
    from .api import diff, inspect, merge, plan, stack, verify
    from .engine.execute.measurements import Progress
    from .engine.model.inspect import Inspection
    from .engine.model.warnings import ModelWarning
    from .engine.recipe.types import Recipe
    from .engine.recipe.warnings import RecipeWarning
    from .engine.run.diff.result import Diff, NotCompared, Similarity, TensorDiff
    from .engine.run.extract.result import ExtractedAdapter, MatrixResult
    from .engine.run.plan import Options
    from .engine.run.verify import Unverified, Verdict
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
    from .methods import list_methods as methods
    from .methods.kernel.method import Method
    from .methods.kernel.signature import Parameter
    from .planned import Plan
    from .result import Result


__all__ = [
    "BudgetError",
    "CheckpointError",
    "Diff",
    "DiskSpaceError",
    "EnvironmentFailure",
    "ExtractedAdapter",
    "Inspection",
    "Interrupted",
    "MatrixResult",
    "MergeloomError",
    "Method",
    "ModelWarning",
    "NotCompared",
    "Options",
    "Parameter",
    "Plan",
    "Progress",
    "Recipe",
    "RecipeError",
    "RecipeWarning",
    "Result",
    "Similarity",
    "TensorDiff",
    "Unverified",
    "UsageError",
    "Verdict",
    "__version__",
    "diff",
    "extract_lora",
    "inspect",
    "merge",
    "methods",
    "plan",
    "stack",
    "verify",
]

_MODULES = {
    "adapters": ("extract_lora",),
    "api": ("diff", "inspect", "merge", "plan", "stack", "verify"),
    "engine.execute.measurements": ("Progress",),
    "engine.model.inspect": ("Inspection",),
    "engine.model.warnings": ("ModelWarning",),
    "engine.recipe.types": ("Recipe",),
    "engine.recipe.warnings": ("RecipeWarning",),
    "engine.run.diff.result": ("Diff", "NotCompared", "Similarity", "TensorDiff"),
    "engine.run.extract.result": ("ExtractedAdapter", "MatrixResult"),
    "engine.run.plan": ("Options",),
    "engine.run.verify": ("Unverified", "Verdict"),
    "methods.kernel.method": ("Method",),
    "methods.kernel.signature": ("Parameter",),
    "planned": ("Plan",),
    "result": ("Result",),
}
"""The public names by module. The exceptions are in `errors`; `methods` is a package that can be called."""

_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name == "methods":
        return import_module(".methods", __name__)
    value = getattr(import_module(f".{_MODULE_OF.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
