"""Recipes as dicts, for tests of plans."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergeloom.engine.run.plan import Options

Recipe = dict[str, Any]

ROOMY = Options(max_ram=4 << 30, device="cpu", threads=2, keep_paths=True)
"""Options with more memory than any small merge needs."""


def linear(*paths: Path, **more: Any) -> Recipe:
    """A mean."""
    models = [{"model": str(path), "parameters": {"weight": 1 / len(paths)}} for path in paths]
    return {"merge_method": "linear", "models": models, **more}


def task_vectors(method: str, base: Path, *paths: Path, **more: Any) -> Recipe:
    """A merge of what fine-tunes add to their base."""
    models = [{"model": str(path), "parameters": {"weight": 0.5, "density": 0.5}} for path in paths]
    return {"merge_method": method, "base_model": str(base), "models": models, **more}


def slerp(base: Path, other: Path, t: Any = 0.3, **more: Any) -> Recipe:
    """Between two models."""
    models = [{"model": str(base)}, {"model": str(other)}]
    return {"merge_method": "slerp", "base_model": str(base), "models": models, "parameters": {"t": t}, **more}


def stacked(*slices: tuple[Path, Sequence[int]], **more: Any) -> Recipe:
    """Layers of models stacked on each other."""
    parts = [{"sources": [{"model": str(path), "layer_range": list(layers)}]} for path, layers in slices]
    return {"merge_method": "passthrough", "slices": parts, **more}


def windows(path: Path, layers: int, window: int, step: int) -> Recipe:
    """A self-merge: windows of a model's layers, a step apart."""
    return stacked(*((path, (first, first + window)) for first in range(0, layers - window + 1, step)))


def sliced(*parts: tuple[Path, int, int], **more: object) -> Recipe:
    """Layer ranges of models, passed through one after the other."""
    slices = [{"sources": [{"model": str(model), "layer_range": [first, end]}]} for model, first, end in parts]
    return {"merge_method": "passthrough", "slices": slices, **more}


def weighted_mean(weights: dict[Path, float], **more: object) -> Recipe:
    """A mean with a weight for each model."""
    models = [{"model": str(model), "parameters": {"weight": weight}} for model, weight in weights.items()]
    return {"merge_method": "linear", "models": models, **more}


def weighted_slices(llamas: dict[str, Path]) -> Recipe:
    """A recipe with copies, casts and sums, and a layer that occurs three times."""
    a, b = str(llamas["a"]), str(llamas["b"])
    parts = ([0, 3], [1, 4], [1, 2])
    slices = [
        {
            "sources": [
                {"model": m, "layer_range": part, "parameters": {"weight": w}} for m, w in ((a, [0.2, 1]), (b, 0.3))
            ]
        }
        for part in parts
    ]
    return {"merge_method": "linear", "slices": slices}


def without_location(error: Exception) -> str:
    """The message of an error about a model, after the key of the model in the recipe, with which it must begin."""
    found = re.match(r"recipe: (?:modules\.\w+\.)?(?:models|slices|base_model|non_layer)[\w.\[\]]*: ", str(error))
    assert found, error
    return str(error)[found.end() :]
