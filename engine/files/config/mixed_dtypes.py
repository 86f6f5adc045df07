"""Warns about an output with several dtypes because its models have different ones."""

from __future__ import annotations

from ...graph.build import BuiltGraph
from ...model.inputs import Model
from ...model.logical import class_counts
from ...model.warnings import ModelWarning, ModelWarningKind

_SHARE = 0.1
"""A dtype of at least this share of a model's bytes is one of its main dtypes; norms or biases in float32 are not."""


def mixed_dtypes(built: BuiltGraph) -> list[ModelWarning]:
    """Warn if the output has several dtypes, and no model has all of them.

    Args:
        built: graph of a stage whose recipe does not set the dtype.
    """
    graph = built.graph
    written = {dtype.name for dtype in graph.outputs.of_nodes(graph.node_dtype)}
    if len(written) < 2:
        return []
    by_dtype: dict[str, list[str]] = {}
    mains = []
    for number in sorted(set(graph.read_models)):
        model = built.models[number]
        if model.is_adapter:
            continue
        found = _main_dtypes(model) & written
        if model.checkpoint.files:  # the output of a stage has none
            mains.append(found)
        for dtype in sorted(found):
            by_dtype.setdefault(dtype, []).append(model.name)
    if len(by_dtype) < 2 or any(found == set(by_dtype) for found in mains):
        return []
    described = " and ".join(f"{dtype} (from {', '.join(names)})" for dtype, names in by_dtype.items())
    names = {dtype.name: dtype.torch_name for dtype in graph.node_dtype}
    suggested = next(iter(sorted(_main_dtypes(built.models[built.donor]) & set(by_dtype))), min(by_dtype))
    return [
        ModelWarning(
            ModelWarningKind.DTYPE,
            f"the output has tensors in {described}: loaders convert all of them to the dtype in config.json",
            f"set dtype in the recipe, for example dtype: {names[suggested]}",
        )
    ]


def _main_dtypes(model: Model) -> set[str]:
    """The names of the unquantized floating-point dtypes of large parts of a model."""
    sizes: dict[str, int] = {}
    for tensor, count in class_counts(model.tensors):
        if tensor.dtype.is_wide_float:
            sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes * count
    return {name for name, size in sizes.items() if size >= _SHARE * sum(sizes.values())}
