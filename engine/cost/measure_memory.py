"""Finds the memory of a compute thread for each kernel of a graph, without reading any tensor.

Compiled loops know what they take. The memory of torch's operations is measured instead.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from ...io.tensors.dtypes import DType
from ...methods.kernel.expression import reachable
from ...methods.kernel.kernel import Kernel
from ..graph.footprint import Footprint, Line
from ..graph.graph import Kind, MergeGraph
from .kernel_class import kernel_class

_COMPILER_BYTES = 20 << 20
"""Memory of LLVM while it compiles a simple kernel, in bytes, after `prepare.load_compiler`: 17 MiB were measured."""
_COMPILER_BYTES_OF_NODE = 24 << 10
"""Further memory of LLVM for each node of the largest expression: 15 to 20 KiB were measured."""
_CODE_BYTES = 512 << 10
"""Memory of a kernel's code, in bytes."""


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
    found: dict[Hashable, Footprint] = {}
    for number, node in enumerate(graph.class_nodes):
        operation = graph.operation(node)
        if operation.kernel is None or operation.kind is not Kind.MERGE or not graph.elements(node):
            continue
        dtypes, outs = tuple(map(graph.value_dtype, graph.node_sources[node])), graph.result_dtypes(node)
        same: Hashable = graph.node_operation[node]
        if operation.kernel.any_shape and not separate:  # kernels for other shapes have the same expressions
            same = tuple(map(id, operation.kernel.outputs))
        key = (same, dtypes, outs)
        result = found.get(key)
        if result is None:
            if separate:
                result = measured_footprint(operation, dtypes, outs)
            else:
                result = compiled_footprint(operation.kernel, dtypes, outs)
            found[key] = result
        graph.footprints[number] = result


def compiled_footprint(kernel: Kernel, dtypes: tuple[DType, ...], outs: tuple[DType, ...]) -> Footprint:
    """Return the memory of a thread that computes a kernel with compiled loops. Nothing is compiled.

    Args:
        kernel: kernel.
        dtypes: dtypes of the kernel's inputs.
        outs: dtype of each output.
    """
    from ...methods.kernel.fused.compiled import Compiled

    compiled = Compiled(kernel, [dtype.name for dtype in dtypes], *(out.name for out in outs))
    return Footprint(Line(compiled.scratch), Line(compiled.allocated))


def compiler_memory(graph: MergeGraph) -> int:
    """Return the memory that compiling a graph's kernels takes at most, in bytes, with an empty cache of kernels.

    The process that `plan` measures has loaded LLVM, and has compiled nothing but an empty function.
    """
    largest: dict[tuple[Any, ...], int] = {}
    for operation in graph.operations:
        kernel = operation.kernel
        if kernel is not None and operation.kind is Kind.MERGE:
            key = kernel_class(kernel)
            largest[key] = largest.get(key) or len(reachable(*kernel.outputs))
    if not largest:
        return 0
    return _COMPILER_BYTES + _COMPILER_BYTES_OF_NODE * max(largest.values()) + _CODE_BYTES * len(largest)
