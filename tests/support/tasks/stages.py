"""A recipe of 23 stages, each of which uses up to three earlier ones, as one file and as 23 recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

STAGES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("slerp", "b", ("b", "c")),
    ("ties", "base", ("1", "d", "e")),
    ("task_arithmetic", "base", ("1", "2", "f")),
    ("model_stock", "base", ("2", "3", "1")),
    ("linear", "", ("1", "4", "2")),
    ("slerp", "3", ("3", "5")),
    ("ties", "base", ("6", "3", "4")),
    ("task_arithmetic", "base", ("4", "7", "6")),
    ("model_stock", "base", ("6", "7", "8")),
    ("linear", "", ("8", "6", "7")),
    ("slerp", "9", ("9", "7")),
    ("ties", "base", ("10", "11", "8")),
    ("task_arithmetic", "base", ("12", "9", "11")),
    ("model_stock", "base", ("10", "11", "13")),
    ("linear", "", ("11", "12", "14")),
    ("slerp", "14", ("14", "15")),
    ("ties", "base", ("13", "14", "15")),
    ("task_arithmetic", "base", ("17", "16", "14")),
    ("model_stock", "base", ("16", "15", "18")),
    ("linear", "", ("17", "18", "19")),
    ("slerp", "19", ("19", "18")),
    ("ties", "base", ("18", "19", "21")),
    ("linear", "", ("22", "21", "20")),
)
"""For each stage, from 1: the method, the base, and the models; letters are models in files, numbers are stages."""
WEIGHTS = (0.5, 0.3, 0.2)


def stage(number: int, models: Mapping[str, Path]) -> dict[str, Any]:
    """The recipe of one stage, whose inputs are models in files and the outputs of other stages.

    Args:
        number: number of the stage, from 1.
        models: path of each model by its letter, and of each stage by its number; a stage without one is named.
    """
    method, base, sources = STAGES[number - 1]

    def reference(name: str) -> str:
        return str(models.get(name, f"stage-{name}"))

    inputs: list[dict[str, Any]] = [{"model": reference(name)} for name in sources]
    recipe: dict[str, Any] = {"merge_method": method, "models": inputs, "dtype": "bfloat16", "out_dtype": "bfloat16"}
    if base:
        recipe["base_model"] = reference(base)
    if method == "slerp":
        recipe["parameters"] = {"t": [0.2, 0.5, 0.8]}
    elif method != "model_stock":
        density = {"density": 0.5} if method == "ties" else {}
        for each, weight in zip(inputs, WEIGHTS, strict=True):
            each["parameters"] = {"weight": weight, **density}
    return recipe


def write_recipe(path: Path, models: Mapping[str, Path]) -> Path:
    """Write the recipe of all stages."""
    count = len(STAGES)
    stages = [stage(number, models) for number in range(1, count + 1)]
    named = [{"name": f"stage-{number}", **each} for number, each in enumerate(stages[:-1], 1)]
    path.write_text(yaml.safe_dump_all([*named, stages[-1]], sort_keys=False))
    return path
