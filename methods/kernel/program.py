"""The instructions that compute some nodes of an expression graph for a tile, and the buffers that they need.

A backend that performs one operation at a time executes a program. Buffers are assigned when it is compiled: an
operation can overwrite an operand that nothing needs afterwards. This module does not import torch, because planning
needs the size of the workspace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .arithmetic import COMPARISONS
from .expression import Node, Type, reachable
from .reduction.reductions import Reduction, Selection, Sum
from .spec import BLOCK

_BYTES = {Type.NUMBER: 0, Type.WIDE: 8, Type.FLAG: 1, Type.INTEGER: 8, Type.HASH: 4}
"""Bytes per element; 0 for the width of the work dtype."""

_SCRATCH: dict[str, tuple[int, ...]] = {
    "hash": (4,),
    "sqrt": (8,),
    "row_sum": (8,),
    "row_rank": (8,),
    "minimum": (1,),
    "maximum": (1,),
    "round": (),
    "block_max": (),
    "selected": (1,),
}
"""Bytes per element of the scratch buffers of operations."""

_IN_PLACE = frozenset(
    ("add", "sub", "mul", "div", "neg", "abs", "and", "or", "not", "fraction", "iadd", "iand", "ior", "ishl", "ishr")
) | set(COMPARISONS)
"""Operations whose result can overwrite an operand of the same width."""

_REDUCTION_SCRATCH: dict[type[Reduction], tuple[int, ...]] = {Selection: (4, 1, 1)}
_SUM_COLUMNS = 1 << 11  # columns per block of a sum; see `block_sums`


class Slot(NamedTuple):
    """A buffer of a program: its bytes per element (0 for the width of the work dtype), and its number."""

    width: int
    number: int


@dataclass(frozen=True, slots=True)
class Instruction:
    """One operation.

    Args:
        node: node that is computed, or reduced.
        op: name of the operation, or "reduce".
        args: operands: the slot of a computed node, or the node of a constant or scalar.
        out: slot of the result; None for "reduce".
        scratch: slots of the scratch buffers.
    """

    node: Node
    op: str
    args: tuple[Slot | Node, ...]
    out: Slot | None
    scratch: tuple[Slot, ...] = ()


class Program:
    """The instructions for the operands of some reductions, or for the outputs.

    Args:
        targets: nodes to compute; those of reductions are reduced as soon as their operand is there.

    Attributes:
        instructions: instructions in order.
        widths: number of buffers by bytes per element; 0 for the width of the work dtype.
        results: slot of each output.
        scalars: nodes of the scalars and columns that earlier passes have computed.
        sums: number of sums.
    """

    def __init__(self, targets: Sequence[Node]) -> None:
        self.instructions: list[Instruction] = []
        self.widths: Counter[int] = Counter()
        self.sums = sum(isinstance(target.value, Sum) for target in targets)
        self.results: list[Slot] = []
        self._free: dict[int, list[int]] = {}
        wanted = [target.args[0] if target.op == "reduce" else target for target in targets]
        order = reachable(*wanted, in_tile=True)
        self.scalars = [node for node in order if not node.in_tile and not node.constant]
        self._uses = Counter(id(arg) for node in order if node.in_tile for arg in node.args)
        self._uses.update(map(id, wanted))
        self._slots: dict[int, Slot] = {}
        self._joined = _joined(order, wanted)
        done = set(self._joined)
        for target, node in zip(targets, wanted, strict=True):
            for each in reachable(node, in_tile=True):
                if each.in_tile and id(each) not in done:
                    done.add(id(each))
                    self._compute(each)
            source = self._slots.get(id(node), node)
            if target.op == "reduce":
                scratch = [self._take(width) for width in _REDUCTION_SCRATCH.get(type(target.value), ())]
                self.instructions.append(Instruction(target, "reduce", (source,), None, tuple(scratch)))
                self._release(*scratch)
                self._drop([node])
            else:
                self.results.append(self._slots[id(node)])

    def _compute(self, node: Node) -> None:
        op, args = node.op, node.args
        if op == "number" and id(args[0]) in self._joined:
            op, args = args[0].op, args[0].args
        operands = tuple(self._slots.get(id(arg), arg) for arg in args)
        scratch = [self._take(width) for width in _SCRATCH.get(op, ())]
        overwritten = [arg for arg in args if op in _IN_PLACE and arg.extent is node.extent]
        self._drop(overwritten)
        out = self._take(_BYTES[node.type])
        self._drop([arg for arg in args if arg not in overwritten])
        self._release(*scratch)
        self._slots[id(node)] = out
        self.instructions.append(Instruction(node, op, operands, out, tuple(scratch)))

    def _take(self, width: int) -> Slot:
        free = self._free.setdefault(width, [])
        if free:
            return Slot(width, free.pop())
        self.widths[width] += 1
        return Slot(width, self.widths[width] - 1)

    def _drop(self, nodes: Sequence[Node]) -> None:
        """Count a use of each node, and free the slots of those without further uses."""
        for node in nodes:
            self._uses[id(node)] -= 1
            if not self._uses[id(node)] and (slot := self._slots.pop(id(node), None)) is not None:
                self._release(slot)

    def _release(self, *slots: Slot) -> None:
        for slot in slots:
            self._free[slot.width].append(slot.number)

    def nbytes(self, elements: int, itemsize: int) -> int:
        """The size in bytes of the workspace for a tile; each buffer is aligned to 64 bytes.

        Args:
            elements: number of elements of the tile.
            itemsize: bytes per element of the work dtype.
        """
        buffers = sum(count * aligned(elements * (width or itemsize)) for width, count in self.widths.items())
        lines = -(-elements * _SUM_COLUMNS // BLOCK)  # at most: blocks of other sizes have fewer columns
        return buffers + (aligned(self.sums * lines * 8) + aligned(lines * 8) if self.sums else 0) + 64


def aligned(nbytes: int) -> int:
    """The number of bytes that a buffer takes from the workspace."""
    return -(-nbytes // 64) * 64


def _joined(order: Sequence[Node], wanted: Sequence[Node]) -> set[int]:
    """The ids of the comparisons that are only used as numbers: they are computed as numbers at once."""
    users: dict[int, list[Node]] = {}
    for node in order:
        for arg in node.args:
            users.setdefault(id(arg), []).append(node)
    return {
        id(node)
        for node in order
        if (node.op in COMPARISONS or node.op == "selected")
        and node.in_tile
        and all(user.op == "number" for user in users.get(id(node), ()))
        and node not in wanted
    }
