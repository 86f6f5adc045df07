"""The values of an output: what its tensors stand for, where some of them are the codes and scales of one value."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ....methods.formats.scaled import FP8_BLOCKS, FP8_CHANNELS
from ....methods.kernel.access import ALIGNED, BlockRows
from ...model.inputs import Model
from ...model.logical import LogicalTensor, LogicalTensors, format_of
from ..graph import Kind, MergeGraph
from ..values import renamed


class OutputValue(NamedTuple):
    """A value of an output.

    Args:
        name: name of the value.
        node: node that makes it, or the first of its parts.
        shape: shape of the value.
        format: name of the format in which it is stored; empty if it is stored as it is.
        copied: the input's value whose parts are copied; None if it is computed, or stored as it is.
    """

    name: str
    node: int
    shape: tuple[int, ...]
    format: str = ""
    copied: LogicalTensor | None = None


def output_values(graph: MergeGraph, models: Sequence[Model], folder: str = "") -> Iterator[OutputValue]:
    """Yield the values of an output.

    Args:
        graph: complete graph of a merge.
        models: the models that it reads.
        folder: folder of OUT; OUT itself if it is empty.
    """
    formats = graph.by_class(lambda node: _format_of(graph, node))
    kinds = graph.by_class(lambda node: graph.operation(node).kind)
    tensors = [model.tensors for model in models]
    for number in graph.outputs_in(folder):
        name, node = graph.outputs.names[number], graph.outputs.nodes[number]
        read = graph.node_sources[node][0]
        if kinds[node] is Kind.RESULT:
            continue
        if kinds[node] is Kind.COPY and format_of(tensors[graph.read_models[read]], graph.read_names[read]):
            yield from _copied(models[graph.read_models[read]], graph.read_names[read], name, node)
        else:
            yield OutputValue(name, node, graph.shape(node), formats[node])


class OutputCounts(NamedTuple):
    """The size of an output in numbers.

    Args:
        tensors: number of values: codes and their scales are one tensor, as in `inspect`.
        parameters: number of elements of the values: those of codes, without scales.
        stored: number of tensors in the files.
    """

    tensors: int
    parameters: int
    stored: int


def output_counts(graph: MergeGraph, models: Sequence[Model], folder: str = "") -> OutputCounts:
    """Count the values of an output. For the arguments, see `output_values`."""
    nodes = array("I", map(graph.outputs.nodes.__getitem__, graph.outputs_in(folder)))
    scales = graph.by_class(lambda node: graph.operation(node).made is not ALIGNED)
    copies = graph.by_class(lambda node: graph.operation(node).copies_tensor)
    values = graph.total(lambda node: not scales[node], nodes)
    parameters = graph.total(lambda node: 0 if scales[node] else graph.elements(node), nodes)
    for node in nodes if any(isinstance(model.tensors, LogicalTensors) for model in models) else ():
        if copies[node]:
            read = graph.node_sources[node][0]
            tensors = models[graph.read_models[read]].tensors
            found = tensors.counts_of(graph.read_names[read]) if isinstance(tensors, LogicalTensors) else None
            if found is not None:
                values, parameters = values + found[0] - 1, parameters + found[1] - graph.elements(node)
    return OutputCounts(values, parameters, len(nodes))


def labels(graph: MergeGraph, models: Sequence[Model], folder: str = "") -> list[str]:
    """Return the formats and the dtypes of an output's values, each once, for display; see `OutputValue.format`."""
    copies = graph.by_class(lambda node: graph.operation(node).copies_tensor)
    formats = graph.by_class(lambda node: _format_of(graph, node) or graph.node_dtype[node].name)
    scales = graph.by_class(lambda node: graph.operation(node).kind is Kind.RESULT)
    tensors = [model.tensors for model in models]
    found = set()
    for number in graph.outputs_in(folder):
        node = graph.outputs.nodes[number]
        if not scales[node]:
            read = graph.node_sources[node][0] if copies[node] else -1
            own = format_of(tensors[graph.read_models[read]], graph.read_names[read]) if read >= 0 else ""
            found.add(own or formats[node])
    return sorted(found)


def has_formats(graph: MergeGraph, models: Sequence[Model]) -> bool:
    """Return whether any value of the output may be stored as several tensors."""
    encodes = any(operation.kind is Kind.RESULT for operation in graph.operations)
    return encodes or any(isinstance(model.tensors, LogicalTensors) for model in models)


def _copied(model: Model, part: str, output: str, node: int) -> Iterator[OutputValue]:
    """The value whose first part is copied to an output; none for its other parts."""
    tensors = model.tensors
    for name in tensors.values_of(part) if isinstance(tensors, LogicalTensors) else ():
        tensor = tensors[name]
        if isinstance(tensor, LogicalTensor) and tensor.parts[0].name == part:
            yield OutputValue(renamed(name, part, output), node, tensor.shape, tensor.format, tensor)


def _format_of(graph: MergeGraph, node: int) -> str:
    """The name of the format in which a node encodes a value; empty if it computes one tensor."""
    scales = graph.results(node)[1:]
    if not scales:
        return ""
    made, shape = graph.operation(scales[0]).made, graph.shape(node)
    by_row = isinstance(made, BlockRows) and made.rows == 1 and made.columns >= (shape or (1,))[-1]
    return (FP8_CHANNELS if by_row else FP8_BLOCKS).name
