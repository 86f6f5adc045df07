"""Opens the models that users name: a local path or a Hub repository."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import CheckpointError, HubUnreachable, ModelNotFound, UsageError
from ...io.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ...io.hub.http import NO_DIRECTORY
from ...io.hub.repository import is_hub_id
from ...io.output.lock import TO_FINISH, WORK, Content, classify
from ..recipe.local import is_local, similar_path
from ..recipe.misplaced import nearest
from ..recipe.types import ModelReference, Recipe
from .adapters.loaded import Adapter, open_adapter
from .naming.renaming import renamed
from .paths import path_problem, places_of, siblings_note


def reference_of(text: str) -> ModelReference:
    """Parse a model name given outside of a recipe. A path that exists is used verbatim.

    Raises:
        UsageError: for an invalid name.
    """
    try:
        return ModelReference(text) if is_local(text) else ModelReference.parse(text)
    except ValueError as error:
        raise UsageError(str(error)) from error


def open_named(text: str) -> tuple[ModelReference, Checkpoint]:
    """Open a model that a command line names; of a model with adapters, the base.

    Raises:
        UsageError: the name is invalid or misspelt.
        MergeloomError: as `open_model`; if the model is missing, the message names similar or neighbouring directories.
    """
    reference = reference_of(text)
    for part in reference.parts:
        if (problem := path_problem(part)) is not None:
            raise UsageError(problem)
    return reference, _open_named(reference.base, text)


def open_adapters(reference: ModelReference) -> tuple[Adapter, ...]:
    """Open the adapters of a model that a command line names. Raises as `open_adapter` and `open_named`."""
    return tuple(open_adapter(each, lambda found: _open_named(found, found.text)) for each in reference.adapters)


def _open_named(reference: ModelReference, text: str) -> Checkpoint:
    """Open a part of a model that a command line names by a text."""
    try:
        return open_model(reference)
    except (ModelNotFound, HubUnreachable) as error:
        near = _similar(reference)
        if near is not None:
            raise UsageError(f"{error}; {near}") from error
        if isinstance(error, HubUnreachable) and text == reference.path and "/" not in text:  # hardly an id of the Hub
            raise ModelNotFound(
                f"{text}: {NO_DIRECTORY} here; the Hub can't be asked for a model of this name"
            ) from error
        raise type(error)(f"{error}{siblings_note(reference.path)}") from error


def open_source_model(name: str, *, was_local: bool) -> Checkpoint:
    """Open a model that a manifest names. Raises MergeloomError.

    Args:
        name: name of the model, or the path that the user gives for it.
        was_local: whether the merge read the model from a directory, so it isn't looked up on the Hub.
    """
    if was_local and not is_local(name):
        raise ModelNotFound(f'no directory "{name}" here')
    return open_model(reference_of(name))


def open_input(recipe: Recipe, reference: ModelReference) -> Checkpoint:
    """Open a model of a recipe.

    Raises:
        RecipeError: the model is neither here nor on the Hub, and a directory or a stage has a similar name, or its
            tensors can't be renamed as the recipe says.
        MergeloomError: as `open_model`; the message begins with the model's line in the recipe.
    """
    try:
        checkpoint = open_model(reference)
    except (ModelNotFound, HubUnreachable) as error:
        place = places_of(recipe).get(reference)
        if place is None:
            raise
        if stage := nearest(reference.path, [stage.name for stage in recipe.stages if stage.name]):
            raise recipe.error(place, f"{error}; did you mean the stage `{stage}`?") from error
        near = _similar(reference)
        if near is not None:
            raise recipe.error(place, f"{error}; {near}") from error
        missing = type(error)(f"{error}{siblings_note(reference.path)}")
        missing.add_location(recipe.origins.locate(place))
        raise missing from error
    except CheckpointError as error:
        if (place := places_of(recipe).get(reference)) is not None:
            error.add_location(recipe.origins.locate(place))
        raise
    rename = recipe.renames.get(reference)
    return checkpoint if rename is None else renamed(recipe, reference, rename, checkpoint)


def _similar(reference: ModelReference) -> str | None:
    """The question whether a directory was meant whose name resembles that of a missing model; None if there is none.

    Only a model of the Hub has a revision.
    """
    near = similar_path(reference.path) if reference.revision is None else None
    return None if near is None else f"did you mean the directory `{near}`?"


def open_model(reference: ModelReference) -> Checkpoint:
    """Open an input model: a local directory or file, or else a Hub repository. Raises MergeloomError.

    The directory of an unfinished merge is rejected, since its shards may be incomplete.
    """
    if not is_local(reference.path) and is_hub_id(reference.path):
        from ...io.hub.checkpoint import open_hub_model

        return open_hub_model(reference.path, reference.revision)
    path = Path(os.path.expanduser(reference.path))  # noqa: PTH111  expanduser of Path fails for "~nobody"
    if os.path.isdir(path / WORK):  # noqa: PTH112  never raises
        directory = classify(path)
        if directory.content in (Content.UNFINISHED, Content.IN_USE):
            raise directory.error(TO_FINISH[directory.content])
    return open_checkpoint(path)


def is_remote(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is on the Hub, so its files may not be downloaded yet."""
    return hasattr(checkpoint, "repository")
