"""Gives the text part of one model the names of the other's, such as that of a vision-language and a text model."""

from __future__ import annotations

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ...model.inputs import Model, sort_tensors
from ...model.layers import find_layers
from ...model.naming.parts import AmbiguousNames, match_part, prefix_change
from ...model.naming.renaming import with_names
from ...recipe.types import ModelReference


def with_names_of(checkpoint: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose layers, and what belongs to them, have the names that another one has for them.

    It is the same checkpoint unless both have one main stack of layers of the same length, with different prefixes.
    """
    model, donor = _model(checkpoint), _model(other)
    if model is None or donor is None or len(model.layers.mains) != 1 or len(donor.layers.mains) != 1:
        return checkpoint
    own, stack = model.layers.main, donor.layers.main
    if own.prefix == stack.prefix or own.count != stack.count or prefix_change(own.prefix, stack.prefix) is None:
        return checkpoint
    for each in (model, donor):
        sort_tensors(each)
    try:
        matched = {name: new for new, name in match_part(donor, stack, model, own).items()}
    except AmbiguousNames:
        return checkpoint
    names = {
        f"{stack.prefix}{name[len(own.prefix) :]}" if model.layers.split(name) else matched.get(name, name): name
        for name in checkpoint.tensors
    }
    return with_names(checkpoint, names) if len(names) == len(model.tensors) else checkpoint


def _model(checkpoint: Checkpoint) -> Model | None:
    """The layers of a checkpoint; None if they can't be identified."""
    try:
        layers = find_layers(checkpoint.tensors, checkpoint.config)
    except CheckpointError:
        return None
    return Model(0, ModelReference(str(checkpoint.path)), checkpoint, checkpoint.tensors, layers)
