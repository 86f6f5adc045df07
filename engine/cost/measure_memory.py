"""Finds the memory of a compute thread for each kernel of a graph, without reading any tensor.

Compiled loops know what they take. The memory of torch's operations is measured instead.
"""

from __future__ import annotations

from typing import Any

from ...io.safetensors.dtypes import DType
from ...methods.kernel.kernel import Kernel
from ..graph.footprint import Footprint, Line
from ..graph.graph import Kind, MergeGraph
from .kernel_class import kernel_class

_known: dict[tuple[Any, ...], Footprint] = {}
"""Footprints that were found in this process."""


def measure_footprints(graph: MergeGraph, *, separate: bool) -> None:
    """Find the footprints of a graph's kernels, and store them in its `footprints`.

    Args:
        graph: graph to measure.
        separate: whether a device with its own memory computes, with torch, which this then imports.

    Raises:
        UsageError: if a method fails on the synthetic values that torch's memory is measured with.
    """
    if separate:
        from .measure_torch_memory import footprint as measured_footprint
    for node in graph:
        operation = graph.operation(node)
        if operation.kernel is None or operation.kind is not Kind.MERGE or not graph.elements(node):
            continue
        dtypes, out = tuple(graph.reads[read].dtype for read in graph.node_sources[node]), graph.node_dtype[node]
        if separate:
            graph.footprints[node] = measured_footprint(operation, dtypes, out)
        else:
            graph.footprints[node] = compiled_footprint(operation.kernel, dtypes, out)


def compiled_footprint(kernel: Kernel, dtypes: tuple[DType, ...], out: DType) -> Footprint:
    """Return the memory of a thread that computes a kernel with compiled loops. Nothing is compiled.

    Args:
        kernel: kernel.
        dtypes: dtypes of the kernel's inputs.
        out: dtype of the output.
    """
    from ...methods.kernel.fused.compiled import Compiled

    names = tuple(dtype.name for dtype in dtypes)
    key = (kernel_class(kernel), kernel.inputs.shape, names, out.name)
    result = _known.get(key)
    if result is None:
        compiled = Compiled(kernel, names, out.name)
        result = _known[key] = Footprint(Line(compiled.scratch), Line(compiled.allocated))
    return result
