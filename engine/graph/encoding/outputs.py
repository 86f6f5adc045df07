"""Adds the outputs of a tensor that is stored as codes and scales, with the names of its donor or of the format."""

from __future__ import annotations

from collections.abc import Iterator

from ...model.logical import Encoding, LogicalTensor
from ..graph import Kind, MergeGraph, Operation, Value
from ..values import Input, TensorValues, renamed
from .blocks import BlockEncoders


class EncodedOutputs:
    """Adds encoded tensors to a graph.

    Args:
        graph: the graph that receives the nodes.
        values: adds what is copied.
    """

    def __init__(self, graph: MergeGraph, values: TensorValues) -> None:
        self._graph = graph
        self._values = values
        self._encoders = BlockEncoders(graph)

    def add(
        self, node: int, encoding: Encoding, donor: Input | None, name: str, base: Value | None = None
    ) -> Iterator[tuple[str, int]]:
        """Add nodes that store a node's output in blocks.

        Args:
            node: number of the node.
            encoding: how it is stored.
            donor: tensor that is stored in this way; None if only the recipe asks for it.
            name: name of the output tensor.
            base: value of the base, a source of the node, that what is stored is compared with; None for no comparison.

        Yields:
            The name and the node of each tensor of the output: codes, scales, and copies of what belongs to those of
            the donor, such as the scales of activations.
        """
        tensor = donor.kind if donor is not None else None
        counts = tensor.own_parts[1].as_stored.shape if isinstance(tensor, LogicalTensor) else None
        nodes = self._encoders.fp8(
            node, encoding.blocks, encoding.scales, power_of_two=encoding.power_of_two, counts=counts, base=base
        )
        if donor is None:
            yield from zip(Encoding.names(name), nodes, strict=True)
            return
        assert isinstance(tensor, LogicalTensor)
        for part, made in zip(tensor.own_parts, nodes, strict=True):
            yield renamed(part.name, donor.name, name), made
        for part in tensor.companions:
            read = self._values.read(self._values.number(donor.model), part)
            copy = Operation(Kind.COPY, "passthrough")
            yield renamed(part.name, donor.name, name), self._graph.add_node(copy, (read,), part.ref.dtype)
