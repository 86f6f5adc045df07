"""Finds the tokenizer that an adapter has: trainers save it next to the adapter, with the tokens that were added."""

from __future__ import annotations

from collections.abc import Callable

from ....io.checkpoint.checkpoint import Checkpoint
from ...recipe.types import ModelReference
from ..adapters.changes import sort_tensors
from ..adapters.loaded import adapter_location
from ..adapters.resized import is_table
from .tokenizer_files import main_file


def adapter_with_tokenizer(
    reference: ModelReference, open_model: Callable[[ModelReference], Checkpoint]
) -> Checkpoint | None:
    """Return the adapter of a model whose tokenizer files are the model's; None if those are the base's.

    Of several adapters with a tokenizer, it is the one that has embeddings of its own, or else the first one.

    Args:
        reference: the model with its adapters.
        open_model: function that opens a checkpoint.
    """
    opened = [(each.text, open_model(adapter_location(each))) for each in reference.adapters]
    found = [(name, checkpoint) for name, checkpoint in opened if main_file(checkpoint) is not None]
    own = (
        checkpoint for name, checkpoint in found if any(map(is_table, sort_tensors(name, checkpoint.tensors).replaced))
    )
    return next(own, found[0][1] if found else None)
