"""Recipes of two models, and the error with which they are rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from tests.support.plans import without_location

CPU = Options(device="cpu", threads=1)


def linear(*models: Path) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in models]}


def stack(*models: Path) -> dict[str, Any]:
    slices = [{"sources": [{"model": str(model), "layer_range": [0, 1]}]} for model in models]
    return {"merge_method": "passthrough", "slices": slices}


def refused(recipe: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        plan(recipe, CPU)
    located = str(caught.value).startswith("recipe: ")  # an error about a single part of the output is not
    return without_location(caught.value) if located else str(caught.value)
