"""Adds nodes that store values as FP8 blocks: codes, and one scale for each block."""

from __future__ import annotations

from ....io.tensors.dtypes import DTYPES, DType
from ....methods.formats.fp8_encoder import FP8_BLOCKS
from ....methods.kernel.access import BlockRows
from ....methods.kernel.spec import InputSpec
from ..graph import Kind, MergeGraph, Operation, Value


class BlockEncoders:
    """The encoders of a graph. Equal ones share an operation.

    Args:
        graph: the graph that receives the nodes.
    """

    def __init__(self, graph: MergeGraph) -> None:
        self._graph = graph
        self._operations: dict[tuple[object, ...], Operation] = {}

    def fp8(
        self,
        node: int,
        blocks: BlockRows,
        scales: DType,
        *,
        power_of_two: bool = False,
        counts: tuple[int, ...] | None = None,
        base: Value | None = None,
    ) -> tuple[int, int]:
        """Add the nodes that store a node's output; fusing computes both in one kernel with it.

        Args:
            node: number of the node. Its output is not rounded to the node's dtype before.
            blocks: rows and columns of a block.
            scales: dtype of the scales: F32, BF16, F8_E8M0, or U8 for the exponents of powers of 2.
            power_of_two: whether scales of other dtypes are powers of 2, too.
            counts: shape of the scales, if it is another one than the numbers of blocks in rows and columns.
            base: value of the base, a source of the node, that what is stored is compared with; see `survival`.

        Returns:
            The node of the codes, with the shape of the node's output, and that of the scales.
        """
        shape = self._graph.shape(node)
        parameters = {
            "rows": blocks.rows,
            "columns": blocks.columns,
            "scale_dtype": scales.name,
            "power_of_two": power_of_two,
        }
        given = tuple(parameters.items())
        sources = (~node,) if base is None else (~node, base)
        operation = self._operations.get((shape, given, len(sources)))
        if operation is None:
            kernel = FP8_BLOCKS.kernel(InputSpec(len(sources), None, shape), parameters)
            operation = Operation(Kind.MERGE, FP8_BLOCKS.name, given, kernel=kernel)
            self._operations[shape, given, len(sources)] = operation
        codes = self._graph.add_node(operation, sources, DTYPES["F8_E4M3"], shape=shape)
        others = self._graph.results(codes)[1:]
        if not others:
            others = self._graph.add_results(codes, [(scales, counts or _counts(shape, blocks))])
        return codes, others[0]


def _counts(shape: tuple[int, ...], blocks: BlockRows) -> tuple[int, ...]:
    """The numbers of blocks of each matrix in its last dimensions."""
    sizes = (blocks.rows, blocks.columns)[-len(shape) :] if shape else ()
    before = shape[: len(shape) - len(sizes)]
    return (*before, *(-(-count // size) for count, size in zip(shape[len(before) :], sizes, strict=True)))
