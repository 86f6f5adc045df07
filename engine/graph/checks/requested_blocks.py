"""Checks the FP8 blocks that a recipe asks for: that tensors are stored so, and that nothing else is quantized."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import islice

from ....errors import CheckpointError
from ....io.units import plural
from ...model.inputs import Model
from ...model.logical import Encoding, LogicalTensor, LogicalTensors, codes_of
from ...model.warnings import ModelWarning, ModelWarningKind
from ...recipe.entries.block_format import BlockFormat
from ...recipe.entries.dtype_lookup import OutputDtypes
from ...recipe.types import Recipe, Stage
from ..encoding.linear import holds_all_experts, split_groups
from ..graph import Kind, MergeGraph

_MOST_REASONS = 4
"""Number of reasons that an error lists."""


def check_requested_blocks(
    recipe: Recipe, stage: Stage, dtypes: OutputDtypes, graph: MergeGraph, models: Sequence[Model]
) -> Iterator[ModelWarning]:
    """Check the outputs of a stage whose recipe asks for FP8 blocks.

    Args:
        recipe: the recipe, for the location of a rule.
        stage: the stage.
        dtypes: the dtypes and formats of its output tensors, all of which were looked up.
        graph: complete graph of the stage.
        models: the stage's models.

    Yields:
        A warning if some of the weights that loaders fuse are stored as blocks and others aren't.

    Raises:
        RecipeError: a rule applies to no tensor that can be stored so.
        CheckpointError: a tensor that is copied is quantized in another format.
    """
    assert dtypes.blocks is not None
    for rule in stage.out_dtype.rules if stage.out_dtype is not None else ():
        if rule in dtypes.refused and rule not in dtypes.encoded:
            which = "no tensor" if rule.matches("") else f"none of the tensors that filter {rule.filter!r} matches"
            reasons = islice(dtypes.refused[rule].items(), _MOST_REASONS)
            message = "; ".join(f"{name}: {reason}" for reason, name in reasons)
            raise recipe.error(
                rule.place, f"{which} can be stored as FP8 blocks ({message}). Set another dtype for them"
            )
    _check_copies(graph, models, dtypes.blocks)
    yield from _split_warnings(graph.outputs.names)
    yield from _expert_warnings(stage, graph)


def _check_copies(graph: MergeGraph, models: Sequence[Model], form: BlockFormat) -> None:
    """Raise CheckpointError if the output has copies of quantized tensors in another format."""
    codes = [codes_of(model.tensors) for model in models]
    for node in graph.outputs.nodes if any(codes) or any(model.quantized for model in models) else ():
        for read in graph.reads_of(node) if graph.operation(node).kind is Kind.COPY else ():
            number, name = graph.read_models[read], graph.read_names[read]
            model = models[number]
            if name in model.quantized or (name in codes[number] and not _is_part_of(model, name, Encoding.of(form))):
                reason = model.quantized.get(name) or f"its format is {codes[number][name]}"
                raise CheckpointError(
                    f"tensor {name} of {model.name} is quantized ({reason}) and is copied, but the recipe asks for "
                    f"{form.label}, and config.json can only describe one format: set a dtype for this tensor in "
                    "out_dtype, such as bfloat16"
                )


def _expert_warnings(stage: Stage, graph: MergeGraph) -> Iterator[ModelWarning]:
    """Warn about fused experts, which are most of a model, if they would be stored as blocks but for their layout."""
    rules = [rule for rule in stage.out_dtype.rules if isinstance(rule.value, BlockFormat)] if stage.out_dtype else []
    names = [
        name
        for name, node in zip(graph.outputs.names, graph.outputs.nodes, strict=True)
        if holds_all_experts(name, graph.shape(node)) and any(rule.matches(name) for rule in rules)
    ]
    if names:
        yield ModelWarning(
            ModelWarningKind.QUANTIZATION,
            f"{plural(len(names), 'tensor')} with all experts of a layer, such as {names[0]}, "
            f"{'is' if len(names) == 1 else 'are'} not stored as FP8 blocks: loaders have no common names for scales",
            "use a model with separate experts as base_model, to write them separately",
            tuple(names),
        )


def _is_part_of(model: Model, part: str, encoding: Encoding) -> bool:
    """Whether a stored tensor of a model is a part of a value in an encoding."""
    tensors = model.tensors
    names = tensors.values_of(part) if isinstance(tensors, LogicalTensors) else ()
    values = (tensors[name] for name in names)
    return any(isinstance(value, LogicalTensor) and value.encoding == encoding for value in values)


def _split_warnings(names: Collection[str]) -> Iterator[ModelWarning]:
    """Warn about projections that are loaded together and are not all stored as blocks."""
    weights = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    stored = {name.removesuffix(".weight_scale_inv") for name in names if name.endswith(".weight_scale_inv")}
    found = sorted(split_groups(weights, stored))
    if found:
        encoded, other = found[0]
        yield ModelWarning(
            ModelWarningKind.QUANTIZATION,
            f"{encoded} is stored as FP8 blocks and {other} is not ({len(found)} such pairs): vLLM and SGLang load "
            "them as one tensor, and reject a model in which their formats differ",
            "use a filter for `out_dtype` that matches both or none",
            (encoded, other),
        )
