"""Tensors that are not stored as they are: their values are gathered or decoded chunk by chunk, as in a merge."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ....io.tensors.assembled import read_tensor
from ....io.tensors.dtypes import DType
from ....io.tensors.refs import TensorRef
from ....methods import merge_methods
from ....methods.kernel.access import GatheredRows
from ....methods.kernel.fused.compiled import Compiled, aligned
from ....methods.kernel.fused.passes import FusedPass
from ....methods.kernel.fused.run import Chunk
from ...cost.prepare import prepare_to_compute
from ...graph.extents import bytes_of_chunks, extent, source_width, staged_bytes
from ...graph.graph import Kind, MergeGraph
from ...graph.values import TensorValues
from ...model.logical import LogicalTensor
from ...recipe.types import ModelReference

Read = Callable[[Path, int, memoryview], None]
"""``read(file, offset, buffer)`` fills `buffer` with the bytes of `file` that start at `offset`."""


@dataclass(frozen=True, slots=True)
class ComputedTensor:
    """A tensor that a node of a graph gathers or decodes.

    Args:
        graph: graph that has the node.
        node: number of the node.
        tensor: what the node computes.
    """

    graph: MergeGraph
    node: int
    tensor: LogicalTensor = field(compare=False)

    @property
    def dtype(self) -> DType:
        """The dtype of the values in memory."""
        return self.graph.node_dtype[self.node]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.tensor.shape

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.tensor.elements

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The stored tensors."""
        return tuple(part.ref for part in self.tensor.parts)

    @property
    def file(self) -> Path:
        """The file with the first part."""
        return self.tensor.parts[0].ref.file

    @property
    def offset(self) -> int:
        """The position of the first part in the file, in bytes."""
        return self.tensor.parts[0].ref.offset

    @property
    def decoded(self) -> bool:
        """Whether a kernel computes the values; otherwise they are stored elements."""
        return self.graph.operation(self.node).kind is Kind.MERGE

    def staging(self, elements: int) -> list[int]:
        """Where each part is staged for a number of consecutive elements, and the end, in bytes."""
        offsets = [0]
        for place in range(len(self.tensor.parts)) if self.decoded else ():
            nbytes = staged_bytes(self.graph, self.node, place, min(elements, self.elements))
            offsets.append(offsets[-1] + aligned(nbytes))
        return offsets

    def bytes_read(self, chunk: int) -> int:
        """Size of what is read of all parts in chunks of `chunk` elements, in bytes."""
        total = 0
        for place in range(len(self.tensor.parts)):
            access = self.graph.access(self.node, place)
            if access.aligned and not isinstance(access, GatheredRows):  # rows of zeros are not read
                total += self.elements * source_width(self.graph, self.node, place)
            else:
                count = -(-self.elements // chunk)
                total += bytes_of_chunks(self.graph, self.node, place, chunk, 0, count)
        return total


class ComputedTensors:
    """The computed tensors of a comparison, and the loops that compute them.

    Args:
        models: names of the two models.
        adapters: adapters that values of the models are computed with.
    """

    def __init__(self, models: tuple[str, str], adapters: Sequence[ModelReference] = ()) -> None:
        self._graph = MergeGraph((*models, *(adapter.text for adapter in adapters)))
        self._owners = {adapter: number for number, adapter in enumerate(adapters, len(models))}
        self._values: TensorValues | None = None
        self._known: dict[LogicalTensor, ComputedTensor] = {}
        self._loops: dict[tuple[int, tuple[str, ...], str], Compiled] = {}
        self._lock = threading.Lock()

    def add(self, model: int, tensor: TensorRef | LogicalTensor) -> TensorRef | ComputedTensor:
        """Add a tensor of a model, unless it is stored as it is. The same tensor is added once."""
        if isinstance(tensor, TensorRef):
            return tensor
        known = self._known.get(tensor)
        if known is None:
            if self._values is None:
                self._values = TensorValues(self._graph, merge_methods()["passthrough"], self._owners)
            add = self._values.picked if tensor.picked else self._values.computed
            known = self._known[tensor] = ComputedTensor(self._graph, add(model, tensor), tensor)
        return known

    @property
    def decodes(self) -> bool:
        """Whether any tensor is decoded."""
        return any(each.decoded for each in self._known.values())

    def prepare(self) -> int:
        """Load the compiler if a tensor is decoded; return the memory that compiling takes, in bytes.

        Raises:
            BudgetError: if ``ulimit -v`` leaves too little address space for the compiler.
        """
        return prepare_to_compute(self._graph, ()) if self.decodes else 0

    @property
    def scratch(self) -> int:
        """Scratch memory of each thread in bytes, after `prepare`."""
        return max((int(each.workspace.constant) for each in self._graph.footprints.values()), default=0)

    @property
    def allocated(self) -> int:
        """What a thread allocates besides, in bytes, after `prepare`."""
        return max((int(each.allocated.constant) for each in self._graph.footprints.values()), default=0)

    def load(
        self,
        tensor: ComputedTensor,
        first: int,
        out: memoryview,
        staging: memoryview,
        scratch: memoryview,
        read: Read,
    ) -> int:
        """Compute a range of a tensor's elements. Thread-safe.

        Args:
            tensor: the tensor.
            first: index of the first element, a multiple of `BLOCK`.
            out: buffer that receives the values in the tensor's dtype; its size is that of the range.
            staging: buffer for what is staged, at least as large as `ComputedTensor.staging` says.
            scratch: memory for the loops, aligned to 64 bytes.
            read: function that reads from a file.

        Returns:
            The number of bytes read.
        """
        count = len(out) * 8 // tensor.dtype.bits
        if not tensor.decoded:
            return self._stage(tensor, 0, first, count, out, read)[1]
        inputs, total = [], 0
        for place, offset in enumerate(tensor.staging(count)[:-1]):
            staged, nbytes = self._stage(tensor, place, first, count, staging[offset:], read)
            inputs.append(staged)
            total += nbytes
        chunk = Chunk(inputs, first, count, 0, (0,) * len(inputs))
        FusedPass(self._compiled(tensor.node), None, None, scratch).combine(chunk, out)
        return total

    def _stage(
        self, tensor: ComputedTensor, place: int, first: int, count: int, buffer: memoryview, read: Read
    ) -> tuple[memoryview, int]:
        """Stage what a range of elements needs of a part; return it, and the number of bytes read."""
        ref, done, total = tensor.refs[place], 0, 0
        for offset, nbytes in extent(self._graph, tensor.node, place, first, count):
            target = buffer[done : done + nbytes]
            done += nbytes
            if offset < 0:
                target[:] = bytes(nbytes)
            else:
                read_tensor(read, ref, offset, target)
                total += nbytes
        return buffer[:done], total

    def _compiled(self, node: int) -> Compiled:
        """The loops of a node, which equal nodes share; compiled by the first thread that needs them."""
        graph, kernel = self._graph, self._graph.operation(node).kernel
        assert kernel is not None
        dtypes = tuple(graph.value_dtype(value).name for value in graph.node_sources[node])
        out = graph.node_dtype[node].name
        with self._lock:
            loops = self._loops.get((id(kernel), dtypes, out))
            if loops is None:
                loops = self._loops[id(kernel), dtypes, out] = Compiled(kernel, dtypes, out)
                loops.prepare()
        return loops
