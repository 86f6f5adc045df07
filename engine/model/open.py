"""What a user names as a model: a path that is here, or a repository of the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import UsageError
from ...io.hub.repository import is_hub_id
from ...io.output.lock import TO_FINISH, WORK, Content, classify
from ...io.safetensors.checkpoint import Checkpoint, open_checkpoint
from ..recipe.types import ModelReference


def reference_of(text: str) -> ModelReference:
    """The model that a text outside of a recipe names. A path that exists is taken as it is, whatever is in it.

    Raises UsageError for what can't be a model, with what to write instead.
    """
    if _exists(text):
        return ModelReference(text)
    try:
        return ModelReference.parse(text)
    except ValueError as error:
        raise UsageError(str(error)) from error


def open_model(reference: ModelReference) -> Checkpoint:
    """The headers of an input model: a directory or file that is there, else one of the Hub. Raises MergeloomError.

    The directory of an unfinished merge is refused: what has its final name there may be a part of the model.
    """
    if not _exists(reference.path) and is_hub_id(reference.path):
        from ...io.hub.checkpoint import open_hub_model

        return open_hub_model(reference.path, reference.revision)
    path = Path(os.path.expanduser(reference.path))  # noqa: PTH111  which leaves "~nobody" as it is
    if os.path.isdir(path / WORK):  # noqa: PTH112  no name makes it fail
        found = classify(path)
        if found.content in (Content.UNFINISHED, Content.IN_USE):
            raise found.error(TO_FINISH[found.content])
    return open_checkpoint(path)


def is_remote(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is the Hub's, so that its files may not be here."""
    return hasattr(checkpoint, "repository")


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))  # noqa: PTH110, PTH111  no text makes these fail
