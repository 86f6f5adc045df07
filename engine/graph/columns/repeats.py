"""Pieces of a graph that repeat others: what differs between them is in columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Structure(NamedTuple):
    """How the nodes of a piece use its reads and each other, numbered from its first read and its first node.

    Args:
        reads: number of reads.
        lengths: for each node, the number of its sources.
        sources: the sources of all nodes.
        read_users: for each read, the first node with it as its first source; -1 if there is none.
        node_users: for each node, likewise.
        results: nodes that compute several tensors, with those that stand for the others.
        outputs: node of each output.
    """

    reads: int
    lengths: tuple[int, ...]
    sources: tuple[int, ...]
    read_users: tuple[int, ...]
    node_users: tuple[int, ...]
    results: tuple[tuple[int, tuple[int, ...]], ...]
    outputs: tuple[int, ...]


class Piece(NamedTuple):
    """A piece of a graph.

    Args:
        first_read: its first read.
        first_node: its first node.
        first_output: its first output.
        structure: how they are connected; equal ones are one object for most pieces.
    """

    first_read: int
    first_node: int
    first_output: int
    structure: Structure

    @property
    def reads(self) -> range:
        """Its reads."""
        return range(self.first_read, self.first_read + self.structure.reads)

    @property
    def nodes(self) -> range:
        """Its nodes."""
        return range(self.first_node, self.first_node + len(self.structure.lengths))

    @property
    def outputs(self) -> range:
        """Its outputs."""
        return range(self.first_output, self.first_output + len(self.structure.outputs))


class Repeat(NamedTuple):
    """Consecutive pieces that repeat others.

    Args:
        likes: the other pieces.
        reads: reads of all pieces.
        nodes: nodes of all pieces.
        outputs: outputs of all pieces.
    """

    likes: Sequence[Piece]
    reads: range
    nodes: range
    outputs: range
