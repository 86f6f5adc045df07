"""Distinguishes misspelt paths from Hub ids, before any model is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import CheckpointError, HubUnreachable, RecipeError
from ...io.hub.repository import cached_snapshot, is_hub_id
from ..recipe.local import is_local, siblings, similar_path
from ..recipe.nodes import Keys
from ..recipe.types import ModelReference, Recipe
from .warnings import ModelWarning, ModelWarningKind

_PLACEHOLDERS = frozenset(("none", "null", "nil", "nan", "undefined", "~"))
_SHOWN = 6
_URL = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[^/?#]+/[^/?#]+)(?:/tree/(?P<revision>[^/?#]+))?"
)


def path_problem(reference: ModelReference) -> str | None:
    """What is wrong with a reference, by the local file system only; None if it may name a model.

    A name that could be a Hub id counts as a misspelt path if a directory differs from it only by a typo, unless it has
    a revision or is in the Hub's cache.
    """
    path, revision = reference.path, reference.revision
    if is_local(path):
        return None
    if (url := _URL.match(path)) is not None:
        repository = f"{url['id']}@{revision or url['revision']}" if revision or url["revision"] else url["id"]
        return f"{reference.text} is a URL: for the model of the Hub, write its id, `{repository}`"
    if "://" in path:
        return f"{reference.text} is a URL: download the model, and write its directory"
    if path.lower() in _PLACEHOLDERS:
        return f"{path!r} does not name a model: write a directory or a Hub id"
    text = reference.text
    if not is_hub_id(path):
        near = similar_path(text) or similar_path(path)
        return f"there is no directory {text} here; did you mean `{near}`?" if near else None
    near = similar_path(text, typo=True)
    if near is None or revision is not None or cached_snapshot(path, None) is not None:
        return None
    return f"there is no directory {text} here; did you mean `{near}`? (for a model of the Hub, write `{path}@main`)"


def check_paths(recipe: Recipe) -> None:
    """Check the paths of all models of a recipe, before any is opened. Raises RecipeError for all misspelt ones."""
    mistakes = [
        recipe.error(place, problem)
        for reference, place in places_of(recipe).items()
        if not reference.adapters and (problem := path_problem(reference)) is not None
    ]
    for reference, place in places_of(recipe).items():
        mistakes += [
            recipe.error(place, f"{each.text} is a stage, whose output is a model and not an adapter")
            for each in reference.adapters
            if recipe.stage(each) is not None
        ]
    if mistakes:
        raise RecipeError.together(mistakes)


def ignored_revisions(recipe: Recipe) -> list[ModelWarning]:
    """Warn about revisions of local directories, which have none. ``main`` is taken for what was downloaded."""
    named = (
        (each, place)
        for each, place in places_of(recipe).items()
        if each.revision not in (None, "main") and not each.adapters  # base and adapters are listed, too
    )
    return [
        ModelWarning(
            ModelWarningKind.FILES,
            f"{each.path} is a directory here and has no revisions: @{each.revision} is ignored",
            f"remove @{each.revision}, or rename the directory to use the Hub's model",
            location=recipe.origins.locate(place),
        )
        for each, place in named
        if is_local(each.path)
    ]


def siblings_note(path: str) -> str:
    """The directories next to a missing one, for a message; empty if there are none."""
    found = siblings(path)
    if found is None:
        return ""
    parent, names = found
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"; {parent} contains {', '.join(names[:_SHOWN])}{more}"


@contextmanager
def located(recipe: Recipe, *references: ModelReference) -> Iterator[None]:
    """Begin the message of an error about a model with the line that names the model, unless it has a location.

    Args:
        recipe: the recipe.
        references: the model, and others whose line to use if the recipe doesn't name it, as for a stage.
    """
    try:
        yield
    except (CheckpointError, HubUnreachable) as error:
        places = places_of(recipe)
        place = next((places[each] for each in references if each in places), None)
        if place is not None:
            error.add_location(recipe.origins.locate(place))
        raise


def places_of(recipe: Recipe) -> dict[ModelReference, Keys]:
    """The first place of each model in the recipe that isn't a stage, and of the parts of models with adapters."""
    places: dict[ModelReference, Keys] = {}
    for stage in recipe.stages:
        for reference, place in stage.references():
            candidates = (*place, "model"), (*place[:-1], "tokenizer_source"), place
            known = candidates if place not in recipe.origins else candidates[::2]
            located = next((each for each in known if each in recipe.origins), place)
            for each in (reference, *reference.parts):
                if recipe.stage(each) is None:
                    places.setdefault(each, located)
    return places
