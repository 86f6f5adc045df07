"""Draws random task graphs: every access, tasks of tasks, and parts that several tasks use in different ways."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hypothesis import strategies as st

from mergeloom.methods.kernel.access import (
    ALIGNED,
    Access,
    BlockRows,
    GatheredRows,
    Slice,
    TransposedSlice,
    matrices,
)
from tests.support.blueprints import ELEMENTS
from tests.support.methods.factors import LAYOUTS
from tests.support.tasks.world import KERNELS, Operand, Shape, TaskWorld, size

SHAPES: tuple[Shape, ...] = (
    (1000,),
    (ELEMENTS,),
    (3 * ELEMENTS - 5,),
    (5 * ELEMENTS,),
    (7, 33),
    (40, 1000),
    (3, 20011),  # a row is longer than a chunk
    (2000, 16),
    (2, 9, 40),
    (3, 150, 64),
    (2, 2, 11000),
    (1,),
    (0,),
    (0, 8),
    (2, 0, 3),
)
PART_DTYPES = ("F32", "F32", "BF16", "F16", "F8_E5M2", "I8", "F64")
NODE_DTYPES = ("F32", "F32", "BF16", "F64")
ACCESSES = ("aligned", "aligned", "node", "node", "blocks", "low_rank", "gathered", "slice", "transposed", "again")


@dataclass
class Drawer:
    """Draws the tasks of one world.

    Args:
        draw: hypothesis's function.
        world: the world.
        staged: whether the tasks are like those of stages, which can be fused: in the dtype of their arithmetic, but
            for conversions.
    """

    draw: st.DrawFn
    world: TaskWorld
    staged: bool = False
    parts: list[int] = field(default_factory=list)  # reads that may be used through other accesses, too

    def choose(self, *choices: int) -> int:
        """One of some numbers."""
        return self.draw(st.sampled_from(choices))

    def tasks(self) -> None:
        """Add tasks on values of one shape."""
        draw, world, shape = self.draw, self.world, self.draw(st.sampled_from(SHAPES))
        pool: list[Operand] = []
        nodes: list[Operand] = []
        for _ in range(draw(st.integers(1, 6))):
            kind = draw(st.sampled_from(("copy", "equal", *KERNELS, *KERNELS)))
            if kind == "equal":
                dtype, seed = draw(st.sampled_from(PART_DTYPES)), draw(st.integers(0, 9))
                same = [Operand((world.source(shape, dtype, 1000 + seed),)) for _ in range(self.choose(1, 2, 3))]
                world.task(kind, same, shape, outputs=self.choose(1, 2))
                continue
            chosen = [self.operand(shape, pool, nodes) for _ in range(1 if kind == "copy" else self.choose(1, 2, 3))]
            if kind == "copy" and not chosen[0].copies:
                kind = "sum"
            elif kind == "copy":
                world.task(kind, chosen, shape, outputs=self.choose(1, 2))
                continue
            if draw(st.integers(0, 4)) == 0:
                nodes.append(Operand((~self.blocked(chosen, shape),)))
                continue
            if not self.staged and draw(st.integers(0, 4)) == 0:
                dtypes = draw(st.tuples(*[st.sampled_from(NODE_DTYPES)] * 3))
                nodes.append(Operand((~world.several(chosen, shape, dtypes),)))
                continue
            node = world.task(kind, chosen, shape, self.dtype(chosen), outputs=self.choose(0, 0, 1, 2))
            nodes.append(Operand((~node,)))
            if self.staged and draw(st.booleans()):
                rounded = draw(st.sampled_from(NODE_DTYPES))
                nodes.append(Operand((~world.task("convert", nodes[-1:], shape, rounded, self.choose(0, 0, 1)),)))
        users = world.graph.users()
        for node in world.graph.nodes():
            if node not in users and not any(output.node == node for output in world.graph.outputs):
                world.output(node)

    def blocked(self, chosen: list[Operand], shape: Shape) -> int:
        """Add a task with a tensor of codes and two that have one element per block."""
        draw, (_, _, columns) = self.draw, matrices(shape)
        block = draw(st.sampled_from([(1, 1), (1, 32), (3, 5), (16, 40), (64, 128), (1, columns)]))
        dtypes = self.dtype(chosen), draw(st.sampled_from(NODE_DTYPES)), draw(st.sampled_from(("F8_E8M0", "F32")))
        return self.world.blocked(chosen, shape, dtypes, block)

    def dtype(self, operands: list[Operand]) -> str:
        """The dtype of a task's output."""
        if not self.staged:
            return self.draw(st.sampled_from(NODE_DTYPES))
        values = [value for operand in operands for value in operand.values]
        return "F64" if any(self.wide(value) for value in values) else "F32"

    def wide(self, value: int) -> bool:
        """Whether a value is computed in float64, even if it is rounded to another dtype then."""
        graph = self.world.graph
        return graph.value_dtype(value).name == "F64" or (
            value < 0 and any(self.wide(each) for each in graph.node_sources[~value])
        )

    def operand(self, shape: Shape, pool: list[Operand], nodes: list[Operand]) -> Operand:
        """A node, an operand of another task, or a new one."""
        draw = self.draw
        kind = draw(st.sampled_from(ACCESSES))
        if kind == "node" and nodes:
            return draw(st.sampled_from(nodes))
        if pool and draw(st.integers(0, 2)) == 0:
            return draw(st.sampled_from(pool))
        if kind == "low_rank":
            rank = self.choose(1, 3, 8)
            (left, first), (right, second) = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](shape, rank)
            found = Operand((self.source(first, 2), self.source(second, 2)), (left, right))
        elif size(shape) == 0 or kind not in ("blocks", "gathered", "slice", "transposed", "again"):
            found = Operand((self.source(shape),))
            self.parts.append(found.values[0])
        else:
            read, access = self.accessed(kind, shape)
            found = Operand((read,), (access,))
        pool.append(found)
        return found

    def source(self, shape: Shape, largest: int = 8) -> int:
        """A new tensor."""
        return self.world.source(shape, self.draw(st.sampled_from(PART_DTYPES)), largest=largest)

    def accessed(self, kind: str, shape: Shape) -> tuple[int, Access]:
        """A part with an access to it: a new part, or one that others use."""
        stack, rows, columns = matrices(shape)
        if kind == "again":
            return self.again(shape)
        if kind == "blocks":
            height, width = self.draw(st.sampled_from([(1, 1), (1, 32), (3, 5), (16, 40), (128, 128), (1, columns)]))
            blocks = (stack * math.ceil(rows / height), math.ceil(columns / width))
            return self.source(blocks), BlockRows(height, width)
        if kind == "gathered":
            read = self.source((self.choose(1, 2, 50), columns))
            self.parts.append(read)
            return read, self.gathered(read, shape)
        padding = self.choose(0, 1, 7)
        offset = self.draw(st.integers(0, padding))
        if kind == "transposed" and columns <= 1000:  # each column is a range
            step = self.choose(1, 2)
            height = rows * step + padding
            access: Access = TransposedSlice(offset, height, step, height * columns)
            read = self.source((stack, columns, height))
        else:
            wide = columns + padding
            access, read = Slice(offset, wide, rows * wide), self.source((stack, rows, wide))
        self.parts.append(read)
        return read, access

    def again(self, shape: Shape) -> tuple[int, Access]:
        """A slice of a part that others use, or some rows, if one is large enough."""
        _, rows, columns = matrices(shape)
        enough = [read for read in self.parts if self.world.tensors[read].numel() >= size(shape)]
        if not enough:
            return self.source(shape), ALIGNED
        read = self.draw(st.sampled_from(enough))
        part = self.world.tensors[read]
        if part.shape[-1] == columns and self.draw(st.booleans()):
            return read, self.gathered(read, shape)
        room = part.numel() - size(shape)
        return read, Slice(self.draw(st.integers(0, room)), columns, rows * columns)

    def gathered(self, read: int, shape: Shape) -> GatheredRows:
        """Some rows of a part, zeros, and rows that follow each other."""
        rows = self.world.tensors[read].numel() // shape[-1]
        random = self.draw(st.randoms(use_true_random=False))
        index: list[int] = []
        while len(index) < size(shape[:-1]):
            first = random.randint(-1, rows - 1)
            index += [first] if first < 0 else range(first, min(rows, first + random.choice([1, 1, 4])))
        return GatheredRows.of(tuple(index[: size(shape[:-1])]))


@st.composite
def task_worlds(draw: st.DrawFn, groups: int = 3, staged: bool = False) -> TaskWorld:
    """Worlds with tasks on values of some shapes."""
    drawer = Drawer(draw, TaskWorld(), staged)
    for _ in range(draw(st.integers(1, groups))):
        drawer.tasks()
    drawer.world.measure()
    return drawer.world
