"""Derives the config.json of a stage's output: compares the inputs', updates layers, and adapts keys to the tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ...graph.build import BuiltGraph, OutputStack
from ...model.layers import Stack
from ...model.warnings import ModelWarning
from ...recipe.entries.dtype_lookup import nominal_dtype, requested_blocks
from ...recipe.types import Stage
from .adapt import adapt_config, drop_quantization, main_dtype
from .compare import NamedConfig, check_layouts, compare_configs, compare_layers
from .compare_heads import compare_heads
from .fp8_section import describe_blocks, replace_description, stores_blocks
from .mixed_dtypes import mixed_dtypes
from .moved_modules import move_entries
from .rearrange import MergedConfig, merged_config, stated_layers
from .skip_list import extend_skip_list


def output_config(
    config: Mapping[str, Any],
    stage: Stage,
    built: BuiltGraph,
    stacks: Sequence[OutputStack],
    used: str,
    *,
    is_written: bool,
) -> MergedConfig:
    """Derive the config.json of a stage's output.

    Args:
        config: config.json of the donor, or of the model that `files_from` names.
        stage: the stage.
        built: graph of the stage, with its models.
        stacks: the output's stacks, with layer indices of the model that `config` belongs to.
        used: name of that model.
        is_written: whether the stage's output is written, and not only an input of the next stage.

    Raises:
        CheckpointError: the config.json files of the models contradict each other.
    """
    chosen = stage.files_from is not None
    warnings = _compare(config, built, used, chosen=chosen, has_base=stage.base_model is not None)
    result: dict[str, Any] = copy.deepcopy(dict(config))
    blocks = requested_blocks(stage)
    if blocks is not None and not stores_blocks(built):
        blocks = None
    if blocks is not None:
        warnings += replace_description(result, blocks)
    else:
        warnings += _describe_formats(result, stacks, built, used, chosen=chosen)
    dtype = _dtype(stage, built)
    if not stacks:  # config.json describes the layers already, but perhaps not the dtype and the head
        count = stated_layers(config, None) or 0
        stacks = (OutputStack(Stack("", count), tuple(range(count)), ()),)
        if "torch_dtype" not in config and "dtype" not in config:
            dtype = None  # in config.json of diffusers, it is not a known key
    for stack in stacks:
        merged = merged_config(
            result,
            layers=len(stack.sources),
            source_layers=stack.sources,
            # without a head, the donor's is already tied or it is not a language model
            tied=False if built.head else None,
            dtype=dtype,
            main=stack.donor.config_path,
            key=stack.donor.config_key,
            donor_layers=stack.donor.count,
            others={} if chosen or not stack.inputs else _other_layers(stack, built),
        )
        result = merged.config
        warnings += merged.warnings
    if blocks is not None:
        describe_blocks(result, built, blocks)
    is_mixed = nominal_dtype(stage) is None and built.dtype is None
    warnings += adapt_config(result, built, is_mixed=is_mixed)
    if is_mixed and is_written and stage.out_dtype is None:
        warnings += mixed_dtypes(built)
    return MergedConfig(result, tuple(warnings))


def _describe_formats(
    config: dict[str, Any], stacks: Sequence[OutputStack], built: BuiltGraph, used: str, *, chosen: bool
) -> list[ModelWarning]:
    """Make the description of quantized tensors agree with those of the output."""
    return [
        *drop_quantization(config, built, used),
        *move_entries(config, stacks, built, chosen=chosen),
        *extend_skip_list(config, built),
    ]


def _dtype(stage: Stage, built: BuiltGraph) -> str | None:
    """torch's name of the dtype that config.json states; None to leave it as it is."""
    wanted = nominal_dtype(stage)
    dtype = wanted.torch_name if wanted is not None else built.dtype
    if dtype is None and stage.out_dtype is not None and not stage.out_dtype.is_constant:
        return main_dtype(built)
    return dtype


def _compare(
    config: Mapping[str, Any], built: BuiltGraph, used: str, *, chosen: bool, has_base: bool
) -> list[ModelWarning]:
    """Compare the config that is used with those of all models that tensors are read from."""
    named = {number: model for number in sorted(set(built.graph.read_models)) if (model := _named(built, number))}
    main = built.stacks[0].donor.config_path if built.stacks else ()
    reference = NamedConfig(used if chosen else built.models[built.donor].name, config, main)
    warnings = compare_configs(reference, list(named.values()), chosen=chosen, has_base=has_base)
    if len(named) > 1:
        check_layouts({model.name: model for model in (reference, *named.values())}, built.graph)
    warnings += compare_heads(built)
    for stack in built.stacks[:1]:
        warnings += compare_layers(named, stack.inputs)
    return warnings


def _named(built: BuiltGraph, number: int) -> NamedConfig | None:
    """The config.json of an input model; None if it has none."""
    model = built.models[number]
    if model.checkpoint.config is None:
        return None
    return NamedConfig(model.name, model.checkpoint.config, model.layers.main.config_path)


def _other_layers(stack: OutputStack, built: BuiltGraph) -> dict[int, tuple[Mapping[str, Any], int]]:
    """The config section and the layer in it of each output layer that another model than the donor provides."""
    donor = built.models[built.donor]
    mains = [main.prefix for main in donor.layers.mains]
    number_of_stack = mains.index(stack.donor.prefix)
    sections = {}
    for number in {inputs[0][0] for inputs in stack.inputs} - {built.donor}:
        model = built.models[number]
        if model.checkpoint.config is not None:
            path = model.stack(number_of_stack).config_path
            sections[number] = NamedConfig(model.name, model.checkpoint.config, path).section
    firsts = ((new, *inputs[0]) for new, inputs in enumerate(stack.inputs))
    return {new: (sections[number], layer) for new, number, layer in firsts if number in sections}
