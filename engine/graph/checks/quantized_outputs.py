"""Checks that the output's config.json describes the quantized tensors that are copied, and reports decoded ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ....errors import CheckpointError
from ....io.units import data_size, plural
from ....methods.kernel.access import ALIGNED
from ...model.checks.formats import format_name, quantization_config, unquantized
from ...model.inputs import Model
from ...model.logical import LogicalTensor, LogicalTensors, codes_of, format_of
from ...model.warnings import ModelWarning, ModelWarningKind
from ...recipe.entries.dtype_lookup import Refuse
from ..encoding.linear import experts_of, kinds_of, split_groups, without_numbers
from ..encoding.sizes import sizes_of
from ..graph import Kind, MergeGraph

_UNRELATED = (
    "modules_to_not_convert",
    "ignored_layers",
    "ignore",
    "dataset",
    "tokenizer",
    "meta",
    "version",
    "batch_size",
)
"""Keys that say how a model was quantized, or which modules, but not how codes become values."""


def check_quantized_outputs(graph: MergeGraph, models: Sequence[Model], donor: Model) -> Iterator[ModelWarning]:
    """Compare the formats of the models whose quantized tensors are copied with that of the donor of config.json.

    Args:
        graph: complete graph of a stage.
        models: the stage's models.
        donor: the model that config.json comes from.

    Yields:
        Warnings about models whose config.json describes the same format differently.

    Raises:
        CheckpointError: a model has another format than the donor, so its tensors would be read as something else.
    """
    copied: dict[int, str] = _copied_codes(graph, models)
    values: dict[int, str] = {}
    if any(model.quantized for model in models):
        for number, name in zip(graph.read_models, graph.read_names, strict=True):
            if name in models[number].quantized:
                copied.setdefault(number, name)
            elif name in donor.quantized:
                values.setdefault(number, name)
    label = _format_of(donor) if copied else None
    for number, name in values.items() if copied else ():
        raise CheckpointError(
            f"tensor {name} of {models[number].name} is not quantized, but config.json comes from {donor.name}, where "
            f"it is quantized ({label}; {donor.quantized[name]}): loaders would read it as codes; "
            f"{unquantized(donor.reference.text, donor.checkpoint)}"
        )
    for number, name in copied.items():
        model = models[number]
        own = _format_of(model)
        if model is not donor and own != label:
            described = "is not quantized" if label is None else f"is quantized with {label}"
            codes = codes_of(model.tensors).get(name)
            reason = model.quantized[name] if codes is None else f"it is a part of {codes}"
            advice = unquantized(model.reference.text, model.checkpoint)
            if codes is not None:
                advice = "set dtype in the recipe, for example dtype: bfloat16, to decode it"
            raise CheckpointError(
                f"tensor {name} of {model.name} is quantized ({own}; {reason}) and is copied, but config.json comes "
                f"from {donor.name}, which {described}: loaders would read it as something else; {advice}"
            )
        if model is not donor and (keys := _different_settings(model, donor)):
            yield ModelWarning(
                ModelWarningKind.QUANTIZATION,
                f"{model.name} and {donor.name} are both quantized ({own}), but their config.json files describe it "
                f"differently: {', '.join(keys)}. config.json of {donor.name} is used for all tensors",
                "use models that were quantized with the same settings",
                tuple(keys),
            )


def decoded_outputs(graph: MergeGraph, donor: Model) -> Iterator[tuple[str, int]]:
    """The outputs that are not quantized, although tensors of their kind are quantized in the donor: names and nodes.

    Tensors of a kind differ only in the numbers of layers and experts.
    """
    if not isinstance(donor.tensors, LogicalTensors):
        return
    kinds = kinds_of(donor.tensors.quantized)
    wide = graph.by_class(lambda node: _is_wide(graph, node))
    for name, node in zip(graph.outputs.names, graph.outputs.nodes, strict=True) if kinds else ():
        if wide[node] and without_numbers(name) in kinds:
            yield name, node


def newly_decoded(graph: MergeGraph, models: Sequence[Model], donor: Model) -> list[tuple[str, int]]:
    """Those of the `decoded_outputs` that are computed from quantized tensors, and not just like in their models."""
    decoded = list(decoded_outputs(graph, donor))
    if not decoded:
        return []
    tensors, decodes = [model.tensors for model in models], bytearray()
    for sources in graph.node_sources:  # those of a node come before it
        decodes.append(
            any(
                decodes[~value] if value < 0 else format_of(tensors[graph.read_models[value]], graph.read_names[value])
                for value in sources
            )
        )
    return [(name, node) for name, node in decoded if decodes[node]]


def _is_wide(graph: MergeGraph, node: int) -> bool:
    """Whether a node makes floating-point numbers of 16 bits or more, apart from scales."""
    return graph.operation(node).made is ALIGNED and graph.node_dtype[node].is_wide_float


def decoding_warnings(
    graph: MergeGraph, models: Sequence[Model], donor: Model, refuse: Refuse
) -> Iterator[ModelWarning]:
    """Warn about quantized tensors that are decoded although the recipe does not ask for a dtype.

    Args:
        graph: complete graph of a stage.
        models: the stage's models.
        donor: the model that config.json comes from.
        refuse: says which tensors can't be stored as FP8 blocks instead.
    """
    decoded = newly_decoded(graph, models, donor)
    if not decoded:
        return
    nbytes = sum(graph.nbytes(node) for _, node in decoded)
    found = ((name, graph.shape(node), _stored_bytes(donor, name), 1) for name, node in decoded)
    sizes = sizes_of(found, refuse)
    stored = sizes.stored
    dtypes = sorted({graph.node_dtype[node].torch_name or "" for _, node in decoded})
    size = f"{data_size(nbytes)} instead of {data_size(stored)}" if stored else data_size(nbytes)
    yield ModelWarning(
        ModelWarningKind.QUANTIZATION,
        f"{plural(len(decoded), 'tensor')} of a kind that {donor.name} stores quantized ({_format_of(donor)}) "
        f"{'is' if len(decoded) == 1 else 'are'} written in {' and '.join(dtypes)}: {size}",
        f"set dtype: {dtypes[0]} in the recipe if you want that"
        + (f", or out_dtype: fp8_blocks ({data_size(sizes.blocks)})" if sizes.encoded else ""),
    )


def split_warnings(graph: MergeGraph, models: Sequence[Model], donor: Model) -> Iterator[ModelWarning]:
    """Warn about decoded weights that loaders fuse with weights that are still quantized.

    Args:
        graph: complete graph of a stage.
        models: the stage's models.
        donor: the model that config.json comes from.
    """
    decoded = {name.removesuffix(".weight"): node for name, node in newly_decoded(graph, models, donor)}
    if not decoded:
        return
    stored: dict[str, None] = {}
    for name, node in zip(graph.outputs.names, graph.outputs.nodes, strict=True):
        if not graph.node_dtype[node].is_wide_float:
            stored[name.rpartition(".")[0]] = None
    found = sorted(split_groups({*decoded, *stored}, set(stored)))
    parts = sorted({module.rpartition(".")[2] for module, _ in found}) or ["experts"]
    if not found:
        lists = {owner: module for module in stored if (owner := experts_of(module))}
        owners = ((experts_of(module), module) for module in decoded)
        found = [(lists[owner], module) for owner, module in owners if owner in lists]
    if found:
        quantized, other = found[0]
        target = graph.node_dtype[decoded[other]].torch_name
        rules = ", ".join(f"{{filter: {part}, value: {target}}}" for part in parts)
        yield ModelWarning(
            ModelWarningKind.QUANTIZATION,
            f"{other} is written in {target} and {quantized} stays quantized ({len(found)} such pairs): vLLM "
            "and SGLang load them as one tensor, and reject a model in which their formats differ",
            f"decode these, too, with {rules} first in out_dtype",
            (other, quantized),
        )


def _stored_bytes(donor: Model, name: str) -> int:
    """The bytes that the donor stores of a tensor; 0 if it has none of this name."""
    tensor = donor.tensors.get(name)
    return tensor.own_bytes if isinstance(tensor, LogicalTensor) else 0


def _copied_codes(graph: MergeGraph, models: Sequence[Model]) -> dict[int, str]:
    """By model, a stored tensor in a known format that an output copies."""
    copied: dict[int, str] = {}
    if not any(isinstance(model.tensors, LogicalTensors) for model in models):
        return copied
    copies = [operation.kind is Kind.COPY for operation in graph.operations]
    codes = [codes_of(model.tensors) if any(copies) else {} for model in models]
    for node in graph.outputs.nodes if any(codes) else ():
        for read in graph.reads_of(node) if copies[graph.node_operation[node]] else ():
            number, name = graph.read_models[read], graph.read_names[read]
            if name in codes[number]:
                copied.setdefault(number, name)
    return copied


def _format_of(model: Model) -> str | None:
    """The name of a model's format; None if it is not quantized."""
    names = {**codes_of(model.tensors), **model.quantized}
    return format_name(model.checkpoint, names) if names else None


def _different_settings(model: Model, donor: Model) -> list[str]:
    """The keys under which two models describe a quantization differently, with both values."""
    described = [quantization_config(each.checkpoint.config) for each in (model, donor)]
    own, other = (section for _, section in (each or ("", {}) for each in described))
    keys = [key for key in {**own, **other} if key not in _UNRELATED and own.get(key) != other.get(key)]
    return [f"{key} ({own.get(key)!r} and {other.get(key)!r})" for key in keys]
