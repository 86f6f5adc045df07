"""Executes a program on a tile with torch, in the buffers of a workspace."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..expression import Extent, Node, Type
from ..program import Instruction, Slot
from ..reduction.reductions import ColumnSum, Count, Selection, StripSum, Sum
from . import counting
from .block_sums import BlockSums, column_sums
from .blocks import block_maxima, one_per_block
from .context import PassContext
from .hashing import hashes
from .operations import INTEGER_OPERATIONS, OPERATIONS
from .rounding import round_into
from .staging import add_ranks, loaded, staged_values
from .tile import Tile

_DTYPES = {Type.WIDE: torch.float64, Type.FLAG: torch.bool, Type.INTEGER: torch.int64, Type.HASH: torch.int32}
_SMALLEST = 2.0**-149  # the smallest float32
_SCRATCH = {1: torch.bool, 4: torch.int32, 8: torch.float64}


class ProgramRun:
    """One program on one tile.

    Args:
        owner: context of the pass that the program belongs to.
        active: reductions of the program; None for the output.
        tile: tile.
    """

    def __init__(self, owner: PassContext, active: tuple[int, ...] | None, tile: Tile) -> None:
        self.owner = owner
        self.tile = tile
        self.program = owner.kernel.program(active)
        self._device = tile.inputs[0].device
        self._work = owner.workspace.dtype
        self._buffers: dict[tuple[Slot, torch.dtype], Tensor] = {}
        self._memory = {
            Slot(width, number): owner.workspace.take(tile.elements * (width or self._work.itemsize), torch.uint8)
            for width, count in sorted(self.program.widths.items())
            for number in range(count)
        }
        self._rows: dict[int, list[Any]] = {}
        reduced = owner.kernel.reduce_nodes
        numbers = range(len(owner.kernel.reduced), len(reduced)) if active is None else active
        self._numbers = {id(reduced[number]): number for number in numbers}
        self._sums: dict[Hashable, tuple[BlockSums, list[int]]] = {}
        summed = [number for number in numbers if isinstance(reduced[number].value, Sum)]
        for key in dict.fromkeys(reduced[number].value.key for number in summed):
            equal = [number for number in summed if reduced[number].value.key == key]
            reduction = reduced[equal[0]].value
            line = owner.kernel.inputs.columns if isinstance(reduction, StripSum) else 0
            sums = BlockSums(len(equal), tile.elements, reduction.block, owner.workspace, self._device, line)
            self._sums[key] = sums, equal

    def perform(self, instruction: Instruction) -> None:
        """Execute an instruction."""
        op = instruction.op
        if op == "reduce":
            self._reduce(instruction)
            return
        assert instruction.out is not None
        node = instruction.node
        out = self._buffer(instruction.out, self._dtype(node.type), node.extent)
        if op in _SPECIAL:
            _SPECIAL[op](self, instruction, out)
        elif op in INTEGER_OPERATIONS:
            INTEGER_OPERATIONS[op](out, self._operands(instruction)[0], node.value)
        elif op in ("minimum", "maximum") and _is_limit(instruction.args[1]):
            values, limit = self._operands(instruction)
            torch.clamp(values, **{"min" if op == "maximum" else "max": limit}, out=out)
        else:
            tensors = [out, *self._operands(instruction), *self._scratch(instruction)]
            OPERATIONS[op](*self._aligned(instruction, tensors))

    def block_sums(self) -> Iterator[tuple[int, Tensor]]:
        """The number of each summed reduction, and its sums of blocks."""
        for sums, numbers in self._sums.values():
            yield from zip(numbers, sums.partial(), strict=True)

    def results(self) -> list[Tensor]:
        """The elements of each output in the work dtype: in the shape of the tile, or flat with one per block."""
        kernel, tile = self.owner.kernel, self.tile
        values = [self._buffer(slot, self._work) for slot in self.program.results]
        return [
            each if blocks is None else one_per_block(each, blocks, kernel.inputs.shape, tile.element)
            for each, blocks in zip(values, kernel.blocks, strict=True)
        ]

    # --- operands and buffers ----------------------------------------------------------------------------------------

    def _buffer(self, slot: Slot, dtype: torch.dtype, extent: Extent = Extent.ELEMENT) -> Tensor:
        """The buffer of a slot in the shape of the tile; with an extent of rows, one element per row."""
        buffer = self._buffers.get((slot, dtype))
        if buffer is None:
            buffer = self._buffers[slot, dtype] = self._memory[slot].view(dtype).view(self.tile.shape)
        return buffer.view(-1)[: buffer.shape[0]].view(-1, 1) if extent is Extent.ROW else buffer

    def _scratch(self, instruction: Instruction) -> list[Tensor]:
        integers = instruction.op == "row_rank"
        extent = instruction.node.extent if instruction.op in ("minimum", "maximum", "sqrt") else Extent.ELEMENT
        return [
            self._buffer(slot, torch.int64 if integers else _SCRATCH[slot.width], extent)
            for slot in instruction.scratch
        ]

    def _dtype(self, type: Type) -> torch.dtype:
        return _DTYPES.get(type, self._work)

    def _operands(self, instruction: Instruction) -> list[Tensor]:
        nodes = _operand_nodes(instruction)
        wide = Type.WIDE if any(node.type is Type.WIDE and node.in_tile for node in nodes) else Type.NUMBER
        return [
            self._buffer(source, self._dtype(node.type), node.extent)
            if isinstance(source, Slot)
            else self._operand(source, wide)
            for source, node in zip(instruction.args, nodes, strict=True)
        ]

    def _operand(self, node: Node, type: Type) -> Tensor:
        """A constant, scalar or column in the type that it is used in."""
        return self.owner.constant(node, torch.bool if node.type is Type.FLAG else self._dtype(type), self._device)

    def _aligned(self, instruction: Instruction, tensors: list[Tensor]) -> list[Tensor]:
        """View the tensors as slices of lines, if an operand has one value per column, which is an element of a slice.

        A tensor with one value per row has a single element per line. The operands then broadcast.
        """
        columns = [arg for arg in instruction.args if isinstance(arg, Node) and arg.extent is Extent.COLUMN]
        if not columns:
            return tensors
        width = len(self.owner.scalar(columns[0]))
        if width == 1:
            return [tensor.expand(tensors[0].shape) for tensor in tensors]
        length = self.owner.kernel.inputs.columns
        return [
            tensor
            if tensor.ndim == 0
            else tensor.view(-1, width // length, 1 if tensor.ndim == 2 and tensor.shape[1] == 1 else length)
            for tensor in tensors
        ]

    # --- operations that depend on the tile, or on scalars -----------------------------------------------------------

    def _load(self, instruction: Instruction, out: Tensor) -> None:
        index, spec = instruction.node.value, self.owner.kernel.inputs
        out.copy_(
            loaded(self.tile.inputs[index])
            if spec.access(index).aligned
            else staged_values(self.tile, index, spec).view(out.shape)
        )

    def _low_rank(self, instruction: Instruction, out: Tensor) -> None:
        add_ranks(out.view(-1), self.tile, instruction.node.value, self.owner.kernel.inputs)

    def _index(self, instruction: Instruction, out: Tensor) -> None:
        first = self.tile.element
        torch.arange(first, first + self.tile.elements, out=out.view(-1))

    def _hash(self, instruction: Instruction, out: Tensor) -> None:
        index, stream = instruction.node.value
        key, position = stream or (self.tile.key, self.tile.positions[index])
        (scratch,) = self._scratch(instruction)
        hashes(key, position, self.tile.element, out.view(-1), scratch.view(-1))

    def _selected(self, instruction: Instruction, out: Tensor) -> None:
        magnitudes, threshold = _operand_nodes(instruction)
        source = instruction.args[0]
        assert isinstance(source, Slot)
        values = self._buffer(source, self._dtype(magnitudes.type)).view(-1).to(torch.float32)
        (flags,) = self._scratch(instruction)
        block = threshold.args[0].value.block
        found = self.owner.scalar(threshold)
        counting.selected(out.view(-1), values, found, self.tile.element, block, flags.view(-1))

    def _round(self, instruction: Instruction, out: Tensor) -> None:
        (values,) = self._operands(instruction)
        rounded = torch.empty(values.shape, dtype=getattr(torch, instruction.node.value), device=values.device)
        round_into(rounded, values)
        out.copy_(rounded)

    def _block_max(self, instruction: Instruction, out: Tensor) -> None:
        (magnitudes,) = self._operands(instruction)
        block_maxima(out, magnitudes, instruction.node.value, self.owner.kernel.inputs.shape, self.tile.element)

    def _host(self, instruction: Instruction, out: Tensor) -> None:
        """Call a Python function for each row, which waits for the device."""
        call, rows = instruction.node.value, out.shape[0]
        columns = [
            self._buffer(source, self._dtype(leaf.type), leaf.extent).view(-1).tolist()
            if isinstance(source, Slot)
            else [source.value if source.constant else self.owner.scalar(source)] * rows
            for source, leaf in zip(instruction.args, call.leaves, strict=True)
        ]
        results = self._rows[id(instruction.node)] = [call(row) for row in zip(*columns, strict=True)]
        if not isinstance(results[0], (list, tuple)) and all(isinstance(result, (int, float)) for result in results):
            out.copy_(_as_column(results))

    def _item(self, instruction: Instruction, out: Tensor) -> None:
        node = instruction.node
        results = self._rows[id(node.args[0])]
        out.copy_(_as_column([r if isinstance(r, float) else r[node.value] for r in results]))

    # --- reductions --------------------------------------------------------------------------------------------------

    def _reduce(self, instruction: Instruction) -> None:
        node = instruction.node
        number, reduction, source = self._numbers[id(node)], node.value, instruction.args[0]
        assert isinstance(source, Slot)
        values = self._buffer(source, self._dtype(node.args[0].type))
        partials = self.owner.partials[number]
        if isinstance(reduction, Sum):
            sums, numbers = self._sums[reduction.key]
            sums.add(numbers.index(number), values)
        elif isinstance(reduction, Count):
            partials.append(torch.count_nonzero(values))
        elif isinstance(reduction, ColumnSum):
            partials += column_sums(values.view(-1, reduction.width), reduction.height)
        else:
            self._count(instruction, number, reduction, values)

    def _count(self, instruction: Instruction, number: int, selection: Selection, values: Tensor) -> None:
        single, over, inside = (buffer.view(-1) for buffer in self._scratch(instruction))
        flat = values.view(-1)
        bits = (flat if flat.dtype is torch.float32 else single.view(torch.float32).copy_(flat)).view(torch.int32)
        partials = self.owner.partials[number]
        if number in self.owner.sampling:
            partials.append(bits.clone())
            return
        searches = self.owner.searches(number, selection)
        counted: dict[tuple[object, ...], Any] = {}
        for search in searches:
            if search.threshold is None and search.query_key not in counted:
                counted[search.query_key] = counting.count(search, bits, selection.block, over, inside)
        partials.append([None if search.threshold else counted[search.query_key] for search in searches])


_SPECIAL: Mapping[str, Callable[[ProgramRun, Instruction, Tensor], None]] = {
    "load": ProgramRun._load,
    "low_rank": ProgramRun._low_rank,
    "index": ProgramRun._index,
    "hash": ProgramRun._hash,
    "selected": ProgramRun._selected,
    "round": ProgramRun._round,
    "block_max": ProgramRun._block_max,
    "host": ProgramRun._host,
    "item": ProgramRun._item,
}


def _operand_nodes(instruction: Instruction) -> tuple[Node, ...]:
    """The nodes of an instruction's operands; those of the comparison if it is computed as numbers at once."""
    node = instruction.node
    return node.args if node.op in (instruction.op, "reduce") else node.args[0].args


def _is_limit(operand: Slot | Node) -> bool:
    """Whether an operand is a constant to which `torch.clamp` limits values exactly as specified: 0 in no dtype."""
    return isinstance(operand, Node) and operand.constant and abs(operand.value) >= _SMALLEST


def _as_column(values: list[Any]) -> Tensor:
    """Python numbers, rounded to float32, as a column vector."""
    return torch.tensor(values, dtype=torch.float64).to(torch.float32).view(-1, 1)
