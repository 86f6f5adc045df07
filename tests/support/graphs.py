"""Small merge graphs in memory, with sources, a sink and the expected outputs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergeloom.engine.graph.footprint import Footprint, Line
from mergeloom.engine.graph.graph import Kind, MergeGraph, Operation
from mergeloom.io.tensors.dtypes import DTYPES, DType
from mergeloom.io.tensors.refs import TensorRef
from mergeloom.methods import Array, Inputs, add, host
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import InputSpec
from tests.support.methods.kernels import method_of


def summed(t: Inputs) -> Array:
    """The sum of the inputs: one pass."""
    return add(t.models)


def above_mean(t: Inputs) -> Array:
    """Three passes: the total of all elements, then how many are above their mean, then sum + count."""
    values = add(t.models)
    count = t.count(values * t.size > t.sum(values))
    return values + host(lambda number: number % 1024, count)


METHODS = {"sum": method_of(summed), "above": method_of(above_mean)}
KERNELS = (
    "sum",
    "above",
    "sum 48",  # its chunks can be as long as those of "sum"
    "sum 9999",  # its chunks can't: no slot of 64 KiB holds a multiple of 16 and of 9999
    "above 9999",
)
"""The kinds of kernels: a method, and the number of elements that its tiles are a multiple of, by default 16."""


def kernel_of(kind: str, inputs: InputSpec) -> Kernel:
    """A kernel of one of the `KERNELS`. Sums of small whole numbers do not depend on the boundaries of tiles."""
    name, _, alignment = kind.partition(" ")
    kernel = METHODS[name].kernel(inputs, {})
    kernel.alignment = int(alignment or 16)
    return kernel


def stored(tensor: Tensor, dtype: DType) -> bytes:
    """Return the bytes of a tensor in a file."""
    assert dtype.torch_name is not None
    if tensor.numel() == 0:
        return b""
    return tensor.to(getattr(torch, dtype.torch_name)).reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass(repr=False)
class World:
    """A graph whose source tensors hold small whole numbers: every order of additions gives the same result."""

    graph: MergeGraph = field(default_factory=lambda: MergeGraph(("m",)))
    files: dict[Path, bytes] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    reads: list[tuple[Path, int, int]] = field(default_factory=list)
    written: dict[int, bytearray] = field(default_factory=dict)
    counts: dict[int, Tensor] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def __repr__(self) -> str:
        sizes = [ref.elements for ref in self.graph.reads]
        nodes = [(self.graph.operation(node).method, self.graph.node_sources[node]) for node in self.graph]
        return f"World(sources={sizes}, nodes={nodes})"

    def source(
        self, shape: int | tuple[int, ...], dtype: str = "F32", seed: int | None = None, largest: int = 8
    ) -> int:
        """Add a source tensor of a shape, or with a number of elements; return its read number.

        Args:
            shape: shape of the tensor, or its length.
            dtype: dtype of the tensor.
            seed: tensors with the same seed are equal.
            largest: largest magnitude of its elements.
        """
        number, dimensions = len(self.tensors), (shape,) if isinstance(shape, int) else shape
        generator = torch.Generator().manual_seed(number if seed is None else seed)
        tensor = torch.randint(-largest, largest, dimensions, generator=generator).to(torch.float32)
        file = Path(f"file{number % 3}")
        data = self.files.get(file, b"")
        values = stored(tensor, DTYPES[dtype])
        ref = TensorRef(file, len(data), len(values), DTYPES[dtype], tuple(tensor.shape))
        self.files[file] = data + values
        self.tensors.append(tensor)
        return self.graph.add_read(0, f"t{number}", ref)

    def node(self, kind: str, sources: Sequence[int], outputs: int = 1) -> int:
        """Add a node of kind ``copy``, ``equal`` or one of the `KERNELS`, with some outputs; return its number.

        A source is a read, or the output ``~n`` of node n.
        """
        shape, dtype = self.graph.value_shape(sources[0]), self.graph.value_dtype(sources[0])
        if kind == "copy":
            operation = Operation(Kind.COPY, "copy")
        elif kind == "equal":
            operation = Operation(Kind.REQUIRE_EQUAL, "equal")
        else:
            operation = Operation(Kind.MERGE, kind, kernel=kernel_of(kind, InputSpec(len(sources), None, shape)))
        node = self.graph.add_node(operation, tuple(sources), dtype)
        if operation.kernel is not None:
            loops = Compiled(operation.kernel, [self.graph.value_dtype(value).name for value in sources], dtype.name)
            self.graph.footprints[self.graph.node_class[node]] = Footprint(Line(loops.scratch), Line(loops.allocated))
        for _ in range(outputs):
            self.graph.add_output(f"out{len(self.graph.outputs)}", node, 0)
        return node

    def expected(self, node: int) -> bytes:
        """Return the expected output bytes of a node."""
        return stored(self._value(~node), self.graph.node_dtype[node])

    def _value(self, value: int) -> Tensor:
        """The elements of a read, or of the output ``~n`` of node n."""
        if value >= 0:
            return self.tensors[value]
        operation, sources = self.graph.operation(~value), self.graph.node_sources[~value]
        if operation.kind is not Kind.MERGE:
            return self._value(sources[0])
        total = sum(self._value(source) for source in sources)
        assert isinstance(total, Tensor)
        if operation.method.startswith("above"):
            values = total.to(torch.int64)
            total = total + int((values * values.numel() > int(values.sum())).sum()) % 1024
        return total

    # the executor's source and sink

    def read(self, file: Path, offset: int, buffer: memoryview) -> None:
        """Fill a buffer."""
        data = self.files[file][offset : offset + len(buffer)]
        buffer[:] = data
        with self.lock:
            self.reads.append((file, offset, len(buffer)))

    def write(self, node: int, offset: int, data: memoryview) -> None:
        """Store the bytes, and count how often each one is written."""
        size = self.graph.nbytes(node)
        with self.lock:
            target = self.written.setdefault(node, bytearray(size))
            target[offset : offset + len(data)] = data
            counts = self.counts.setdefault(node, torch.zeros(size, dtype=torch.int32))
            counts[offset : offset + len(data)] += 1

    def finished(self, node: int) -> None:
        """Do nothing."""

    def check(self) -> None:
        """Check that every output is correct and was written exactly once."""
        for node in self.graph:
            if self.graph.elements(node) == 0:
                continue
            if not self.graph.destinations()[node]:
                assert node not in self.written
                continue
            assert bytes(self.written[node]) == self.expected(node), node
            assert bool((self.counts[node] == 1).all()), node
        assert sum(nbytes for _, _, nbytes in self.reads) >= sum(
            self.graph.reads[read].nbytes
            for read in {value for sources in self.graph.node_sources for value in sources if value >= 0}
        )
