"""Checks the formats in which a stage's output is stored, and warns about what loaders would read differently."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...model.inputs import Model
from ...model.warnings import ModelWarning
from ...recipe.entries.dtype_lookup import OutputDtypes
from ...recipe.types import Recipe, Stage
from ..graph import MergeGraph
from .quantized_outputs import check_quantized_outputs, decoding_warnings, split_warnings
from .requested_blocks import check_requested_blocks


def check_output_formats(
    recipe: Recipe, stage: Stage, graph: MergeGraph, models: Sequence[Model], donor: Model, dtypes: OutputDtypes
) -> Iterator[ModelWarning]:
    """Check the formats of the output.

    Args:
        recipe: the recipe, for error messages.
        stage: the stage.
        graph: complete graph of the stage.
        models: the stage's models.
        donor: the model that config.json comes from.
        dtypes: the dtypes and formats of the output tensors.

    Raises:
        RecipeError: the recipe asks for a format that no tensor can be stored in.
        CheckpointError: the output has quantized tensors that config.json does not describe.
    """
    if dtypes.blocks is not None:
        if donor.checkpoint.config is None and stage.files_from is None and stage.out_dtype and stage.out_dtype.blocks:
            message = f"FP8 blocks are described in config.json, which {donor.name} does not have"
            advice = "name a model that has one with base_model or files_from, or set another dtype"
            raise recipe.error(stage.out_dtype.blocks.place, f"{message}: {advice}")
        yield from check_requested_blocks(recipe, stage, dtypes, graph, models)
    else:
        if stage.files_from is None:
            yield from check_quantized_outputs(graph, models, donor)
        yield from split_warnings(graph, models, donor)
    if stage.out_dtype is None and stage.dtype is None:
        yield from decoding_warnings(graph, models, donor, dtypes.refuse)


def refuse_blocks_between_stages(recipe: Recipe, stage: Stage) -> None:
    """Raise RecipeError if a stage whose output is an input of another one asks for FP8 blocks."""
    rule = None if stage.out_dtype is None else stage.out_dtype.blocks
    if rule is not None:
        message = "only the output of the last stage is stored as FP8 blocks: other stages use the values of this one"
        raise recipe.error(rule.place, f"{message}. Leave out `fp8_blocks` here, or run this stage on its own")
