"""Finds models that a recipe lists under several names, such as a directory with and without ``./``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ....errors import RecipeError
from ...model.inputs import BoundSlice
from ...model.warnings import ModelWarning, ModelWarningKind
from ...recipe.nodes import Keys
from ...recipe.types import Recipe


class Duplicate(NamedTuple):
    """A source of a slice that is the same model as an earlier one under another name.

    Args:
        places: key paths of both sources in the recipe.
        warning: the warning about them.
    """

    places: tuple[Keys, ...]
    warning: ModelWarning


def find_duplicates(recipe: Recipe, parts: Iterable[BoundSlice]) -> Iterator[Duplicate]:
    """The sources of slices that have the same files and the same layers as another source of the slice.

    Links are resolved, so a Hub id and its snapshot in the Hub's cache are the same model; a copy is not.
    """
    files: dict[int, tuple[str, ...]] = {}
    known: set[tuple[str, ...]] = set()
    for part in parts:
        first: dict[object, int] = {}
        for index, (source, model) in enumerate(zip(part.slice.sources, part.models, strict=True)):
            if len(part.models) == 1 or not model.checkpoint.files:  # a stage has no files
                continue
            if model.number not in files:
                files[model.number] = tuple(sorted({os.path.realpath(file) for file in model.checkpoint.files}))
            adapters = tuple(os.path.realpath(os.path.expanduser(each.text)) for each in model.reference.adapters)  # noqa: PTH111
            other = first.setdefault((files[model.number], adapters, source.layer_range), index)
            names = tuple(dict.fromkeys((part.models[other].name, model.name)))
            if len(names) > 1 and names not in known:
                known.add(names)
                sources = (part.slice.sources[other], source)
                location = recipe.origins.locate(source.place)
                warning = replace(_warning(part, (other, index), files[model.number]), location=location)
                yield Duplicate(tuple(each.place for each in sources), warning)


def _warning(part: BoundSlice, indices: Sequence[int], files: Sequence[str]) -> ModelWarning:
    first, second = (part.models[index].name for index in indices)
    where = os.path.dirname(files[0]) if len(files) > 1 else files[0]  # noqa: PTH120  a text, not a path
    problem = f"{first} and {second} are the same model, {where}"
    if part.base in indices:
        base, other = (first, second) if part.base == indices[0] else (second, first)
        problem += f": the difference between {other} and the base model, {base}, is zero"
    else:
        problem += ", which therefore counts twice"
    return ModelWarning(ModelWarningKind.DUPLICATE_MODEL, problem, "use one name for it", (first, second))


def explained(error: RecipeError, duplicates: Iterable[Duplicate]) -> RecipeError:
    """An error about a source, which names its duplicate if it has one."""
    for duplicate in duplicates:
        if any(error.path[: len(place)] == place for place in duplicate.places):
            first, second = duplicate.warning.names
            message = f"{error.message}; {first} and {second} are the same model: {duplicate.warning.advice}"
            return RecipeError.at(error.location, message, more=error.more)
    return error


__all__ = ["Duplicate", "explained", "find_duplicates"]
