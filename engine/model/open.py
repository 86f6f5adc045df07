"""Opens the models that users name: a local path or a Hub repository."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import UsageError
from ...io.hub.repository import is_hub_id
from ...io.output.lock import TO_FINISH, WORK, Content, classify
from ...io.safetensors.checkpoint import Checkpoint, open_checkpoint
from ..recipe.types import ModelReference


def reference_of(text: str) -> ModelReference:
    """Parse a model name given outside of a recipe. A path that exists is used verbatim.

    Raises:
        UsageError: for an invalid name.
    """
    if _exists(text):
        return ModelReference(text)
    try:
        return ModelReference.parse(text)
    except ValueError as error:
        raise UsageError(str(error)) from error


def open_model(reference: ModelReference) -> Checkpoint:
    """Open an input model: a local directory or file, or else a Hub repository. Raises MergeloomError.

    The directory of an unfinished merge is rejected, since its shards may be incomplete.
    """
    if not _exists(reference.path) and is_hub_id(reference.path):
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


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))  # noqa: PTH110, PTH111  these never raise
