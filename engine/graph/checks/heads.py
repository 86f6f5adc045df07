"""Checks that the head which a recipe chooses exists: without one, the head is the embedding."""

from __future__ import annotations

from collections.abc import Sequence

from ...model.inputs import Model
from ...model.roles import is_embedding, is_head
from ...recipe.types import Recipe, Stage
from ..graph import MergeGraph


def check_chosen_head(recipe: Recipe, stage: Stage, graph: MergeGraph, models: Sequence[Model]) -> None:
    """Check that `embeddings` chooses the same model as `head`, if no model has a head of its own.

    Args:
        recipe: the recipe, for error messages.
        stage: the stage.
        graph: complete graph of the stage.
        models: the stage's models.

    Raises:
        RecipeError: if it does not.
    """
    chosen = stage.non_layer.head
    if chosen is None or any(map(is_head, graph.outputs.names)):
        return
    embeddings = {
        models[graph.read_models[read]].reference
        for output in graph.outputs
        if is_embedding(output.name)
        for read in graph.reads_of(output.node)
    }
    if embeddings != {chosen}:
        raise recipe.error(
            (*stage.non_layer.place, "head"),
            f"none of the models has a separate head: that of {chosen.text} is tied to its embeddings; set "
            "`embeddings` to the same model",
        )
