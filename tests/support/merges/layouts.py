"""Graphs of copied and computed tensors, and the ranges of their layouts."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from hypothesis import strategies as st

from mergeloom.engine.graph.graph import Kind, MergeGraph, Operation
from mergeloom.engine.graph.layout import BLOCK
from mergeloom.io.tensors.dtypes import DTYPES, F32
from mergeloom.io.tensors.refs import TensorRef
from mergeloom.methods import merge_methods
from mergeloom.methods.kernel.spec import InputSpec

Drawn = tuple[str, tuple[int, ...]]
SIZES = st.sampled_from([(), (0, 3), (1,), (7,), (511, 3), (1024, 1024), (1000, 1001), (3, 2**20)])
TENSORS = st.lists(st.tuples(st.sampled_from(["BF16", "F32", "I64", "U8"]), SIZES), min_size=1, max_size=12)


def source(file: str, tensors: Sequence[Drawn], start: int) -> list[TensorRef]:
    """The tensors of a file whose data begins at `start`."""
    refs = []
    for name, shape in tensors:
        nbytes = DTYPES[name].nbytes(prod(shape))
        refs.append(TensorRef(Path(file), start, nbytes, DTYPES[name], shape))
        start += nbytes
    return refs


def graph_of(groups: Sequence[Sequence[tuple[TensorRef, bool]]], prefix: str = "t") -> MergeGraph:
    """Outputs group by group: each is a tensor that is copied, or cast to float32."""
    graph = MergeGraph(("m",))
    seen: dict[TensorRef, int] = {}
    for group, members in enumerate(groups):
        for ref, copied in members:
            read = graph.add_read(0, f"read{seen.setdefault(ref, len(seen))}", ref)
            if copied:
                node = graph.add_node(Operation(Kind.COPY, "passthrough"), (read,), ref.dtype)
            else:
                kernel = merge_methods()["passthrough"].kernel(InputSpec(1, None, ref.shape), {"scale": (2.0,)})
                node = graph.add_node(Operation(Kind.MERGE, "passthrough", kernel=kernel), (read,), F32)
            graph.add_output(f"{prefix}{len(graph.outputs)}", node, group)
    return graph


def covered(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges with adjacent ones put together."""
    found: list[tuple[int, int]] = []
    for offset, nbytes in sorted(ranges):
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + nbytes)
        else:
            found.append((offset, nbytes))
    return found


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[list[tuple[TensorRef, bool]]], int]:
    """Slices of up to three files, copied or computed, and a shard size."""
    files = [source(f"f{n}", draw(TENSORS), draw(st.integers(8, 3 * BLOCK))) for n in range(draw(st.integers(1, 3)))]
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        file = draw(st.sampled_from(files))
        first = draw(st.integers(0, len(file) - 1))
        members = file[first : first + draw(st.integers(1, len(file)))]
        copied = draw(st.sampled_from([True, True, False]))
        groups.append([(ref, copied or draw(st.integers(0, 5)) == 0) for ref in draw(st.permutations(members))])
    return groups, draw(st.sampled_from([2 * BLOCK, 100_000, 3_000_000, 20_000_000, 10**10]))
