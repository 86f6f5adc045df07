"""The table of a loop: the numbers and addresses that its caller gives it, and what the loop computes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..expression import Node
from ..spec import InputSpec


class Table:
    """The places of numbers and addresses in the table of a stage, by key.

    Attributes:
        places: place of each key.
        parameters: node and place among the parameters of each use of a number, such as a weight.
    """

    def __init__(self) -> None:
        self.places: dict[tuple[Any, ...], int] = {}
        self.parameters: list[tuple[str, Node]] = []

    def place(self, *key: Hashable) -> int:
        """The place of a key, assigned at its first use."""
        return self.places.setdefault(key, len(self.places))

    def parameter(self, kind: str, node: Node) -> int:
        """A new place among the parameters. Every use has its own, so equal weights do not make other loops."""
        self.parameters.append((kind, node))
        return len(self.parameters) - 1


@dataclass(slots=True)
class Target:
    """What a pass computes: a reduction, or an output.

    Args:
        node: node that is computed; the operand of a reduction.
        reduction: the reduction; None for an output.
        number: number of the reduction in the kernel; ``~n`` for output n.
    """

    node: Node
    reduction: object = None
    number: int = -1


class Variant(NamedTuple):
    """What the loops of a group have in common.

    Args:
        inputs: inputs of the kernel.
        dtypes: dtype of each input.
        outs: dtype of each output.
        long: whether the tensor has more than 2^32 elements, so a range can have two streams of random numbers.
        direct: whether segments are the rows of the blocks of sums, so the loop can add to the columns.
    """

    inputs: InputSpec
    dtypes: tuple[str, ...]
    outs: tuple[str, ...]
    long: bool
    direct: bool
