"""Loads a recipe from a YAML file, a YAML text or plain data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import RecipeError
from ...methods.kernel.contract import Method
from .nodes import node_of
from .overrides import override, parse_without_lines
from .reader import recipe_of
from .types import Recipe
from .yaml import YamlSource, parse_yaml, read_yaml


def load_recipe(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, object] | Sequence[Mapping[str, object]],
    *,
    strict: bool = False,
    methods: Mapping[str, Method],
    overrides: Sequence[str] = (),
) -> Recipe:
    """Read and validate a recipe.

    Args:
        recipe: the path of a YAML file, a dict with the same content, or a list of dicts for several stages. A Recipe
            is returned as it is if there are no overrides.
        strict: whether unknown keys and parameters, and parameters without effect, are errors rather than warnings.
        methods: the merge methods by name.
        overrides: changes of the recipe, such as ``parameters.weight=0.3`` (see `overrides`).

    Raises:
        RecipeError: if the recipe is invalid or the file can't be read.
        UsageError: if an override is invalid.
    """
    if isinstance(recipe, Recipe):
        if not overrides:
            return recipe
        changed = override(parse_without_lines(recipe.text), overrides)
        return recipe_of(changed, recipe.source, strict=strict, methods=methods)
    if isinstance(recipe, (str, os.PathLike)):
        text = os.fsdecode(recipe)
        if "\n" in text and isinstance(recipe, str):
            raise RecipeError("expected the path of a file, got a string of several lines: use parse_recipe")
        path = Path(text)
        return recipe_of(override(read_yaml(path), overrides), path, strict=strict, methods=methods)
    if not isinstance(recipe, (Mapping, list, tuple)):
        raise RecipeError(f"expected a path, a dict or a list of dicts, got a {type(recipe).__name__}")
    documents = tuple(node_of(item) for item in ((recipe,) if isinstance(recipe, Mapping) else recipe))
    return recipe_of(override(YamlSource("", documents, ()), overrides), None, strict=strict, methods=methods)


def parse_recipe(
    text: str, *, source: Path | None = None, strict: bool = False, methods: Mapping[str, Method]
) -> Recipe:
    """Validate a recipe given as YAML text, like `load_recipe`. Errors name `source` as the file."""
    return recipe_of(parse_yaml(text, source), source, strict=strict, methods=methods)
