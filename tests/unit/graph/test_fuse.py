"""Fusing: the same bytes whatever is kept, with real methods, compared with each stage evaluated on its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeloom.engine.execute.devices.cpu import CpuDevice
from mergeloom.engine.execute.executor import Executor
from mergeloom.engine.graph.fuse import fuse
from mergeloom.engine.graph.graph import Kind, MergeGraph, Operation
from mergeloom.io.tensors.dtypes import DTYPES
from mergeloom.methods import merge_methods
from mergeloom.methods.kernel.composition import Composition
from mergeloom.methods.kernel.spec import InputSpec
from tests.examples import examples
from tests.support.methods.oracle import evaluate, rounded
from tests.support.tasks.laws import run, scheduled
from tests.support.tasks.world import TaskWorld

SHAPE = (70, 1000)
PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"weight": (0.4, 0.6, 0.1)},
    "slerp": {"t": 0.3},
    "ties": {"weight": (0.4, 0.6, 0.1), "density": (0.5, 0.4, 0.9)},
    "task_arithmetic": {"weight": (0.4, 0.6, 0.1)},
    "model_stock": {},
}
BASED = ("slerp", "ties", "task_arithmetic", "model_stock")


@dataclass(repr=False)
class Stages(TaskWorld):
    """A linked graph of stages, as `build_stages` makes it: in the work dtype, but for conversions."""

    values: dict[int, Tensor] = field(default_factory=dict)

    def normal(self, dtype: str) -> int:
        """A tensor of normally distributed numbers."""
        number = self.source(SHAPE, dtype)
        name = DTYPES[dtype].torch_name
        assert name is not None
        values = np.random.default_rng(number).standard_normal(SHAPE)
        stored = torch.from_numpy(values).to(getattr(torch, name))
        ref = self.graph.reads[number]
        data = bytearray(self.files[ref.file])
        data[ref.offset : ref.offset + ref.nbytes] = stored.view(torch.uint8).numpy().tobytes()
        self.files[ref.file], self.values[number] = bytes(data), stored
        return number

    def stage(self, method: str, sources: Sequence[int]) -> int:
        """A node that merges some values; returns it as a value."""
        base = 0 if method in BASED else None
        parameters = {
            name: value[: len(sources)] if isinstance(value, tuple) else value
            for name, value in PARAMETERS[method].items()
        }
        kernel = merge_methods()[method].kernel(InputSpec(len(sources), base, SHAPE), parameters)
        operation = Operation(Kind.MERGE, method, tuple(parameters.items()), base, (0, 1, 2)[: len(sources)], kernel)
        dtype = "F64" if any(self.wide(value) for value in sources) else "F32"
        return ~self.graph.add_node(operation, tuple(sources), DTYPES[dtype])

    def rounded(self, value: int, dtype: str) -> int:
        """A conversion of a value, as a value."""
        kernel = merge_methods()["passthrough"].kernel(InputSpec(1, None, SHAPE), {})
        return ~self.graph.add_node(Operation(Kind.MERGE, "passthrough", kernel=kernel), (value,), DTYPES[dtype])

    def evaluated(self, value: int, work: torch.dtype) -> Tensor:
        """A value, with all arithmetic in a work dtype. Tensors of the output are rounded before others use them."""
        if value in self.values:
            return self.values[value].to(work)
        operation, dtype = self.graph.operation(~value), self.graph.node_dtype[~value].torch_name
        inputs = [self.evaluated(each, work) for each in self.graph.node_sources[~value]]
        assert operation.kernel is not None
        assert dtype is not None
        if operation.kernel.copies is None:
            return torch.from_numpy(evaluate(operation.kernel, inputs).copy())
        return torch.from_numpy(rounded(inputs[0].numpy(), getattr(torch, dtype))).to(work)

    def wide(self, value: int) -> bool:
        """Whether a value is computed in float64."""
        graph = self.graph
        if value >= 0 or graph.node_dtype[~value].name == "F64":
            return graph.value_dtype(value).name == "F64"
        return any(self.wide(each) for each in graph.node_sources[~value])

    def saved(self, value: int, dtype: str) -> None:
        """Add an output that is a value, rounded to a dtype."""
        value = value if value < 0 and self.graph.value_dtype(value).name == dtype else self.rounded(value, dtype)
        if value not in self.values:
            dtype_of_output = DTYPES[dtype].torch_name
            assert dtype_of_output is not None
            work = torch.float64 if self.wide(value) else torch.float32
            exact = torch.float64  # torch converts float64 to a narrower dtype through float32, and rounds twice
            values = rounded(self.evaluated(value, work).to(exact).numpy(), getattr(torch, dtype_of_output))
            self.values[value] = torch.from_numpy(values).to(getattr(torch, dtype_of_output))
        self.computed[~value] = self.values[value]
        self.output(~value)


@st.composite
def stages(draw: st.DrawFn) -> Stages:
    """Up to six stages, each of which uses up to three values before it."""
    world = Stages()
    float64 = draw(st.integers(0, 2)) == 0
    dtypes = st.sampled_from(["F32", "BF16", "F64"] if float64 else ["F32", "BF16", "F16"])
    values = [world.normal(draw(dtypes)) for _ in range(3)]
    for _ in range(draw(st.integers(2, 6))):
        method = draw(st.sampled_from(sorted(PARAMETERS)))
        count = 2 if method == "slerp" else 3
        sources = draw(st.lists(st.sampled_from(values[-5:]), min_size=count, max_size=count, unique=True))
        value = world.stage(method, sources)
        if draw(st.booleans()):
            value = world.rounded(value, draw(st.sampled_from(["BF16", "F16"])))
        values.append(value)
        if not float64 and draw(st.integers(0, 3)) == 0:
            world.saved(value, draw(st.sampled_from(["BF16", "F32"])))
    world.saved(values[-1], "BF16")
    return world


@settings(max_examples=examples(25), deadline=None, suppress_health_check=list(HealthCheck))
@given(stages())
def test_what_is_kept_changes_no_byte(world: Stages) -> None:
    kept, inlined = (world.fresh(fuse(world.graph, inline=inline)) for inline in (False, True))
    assert list(kept.graph.outputs) == list(inlined.graph.outputs)
    assert inlined.graph.users().keys() <= {output.node for output in inlined.graph.outputs}
    uses = Counter(value for sources in world.graph.node_sources for value in dict.fromkeys(sources))
    most = sum(1 for value, count in uses.items() if value < 0 and count > 1)
    intermediate = len(kept.graph.node_sources) - len({output.node for output in kept.graph.outputs})
    assert intermediate <= most, "a node that is used once is kept"
    for each in (kept, inlined):
        run(each, scheduled(each, 20))


def test_a_selection_over_a_selection_is_sampled_next_to_one_over_inputs() -> None:
    #  a, b, c ─ linear ─ rounded ─ ties ─┬─ saved     the selections of the last node over c and the model stock are
    #  a, b, c ─ model_stock ─────────────┴─ ties      sampled; the one over the first ties depends on one itself
    world = Stages()
    a, b, c = world.normal("BF16"), world.normal("F32"), world.normal("F32")
    first = world.stage("ties", [a, b, world.rounded(world.stage("linear", [a, b, c]), "BF16")])
    world.saved(first, "BF16")
    world.saved(world.stage("ties", [c, world.stage("model_stock", [a, b, c]), first]), "BF16")
    for inline in (False, True):
        each = world.fresh(fuse(world.graph, inline=inline))
        run(each, scheduled(each, 20))


@pytest.mark.parametrize("saved", [False, True])
def test_what_is_rounded_after_float64_is_equal_in_both_forms(saved: bool) -> None:
    #  a (float64) ─ linear ─ rounded ─┬─ slerp ─┬─ linear ─┬─ slerp: whatever is kept, a kernel computes in float64 if
    #                                  └─ slerp ─┘─ linear ─┘         it would with all of its parts
    world = Stages()
    a, b, c = world.normal("F64"), world.normal("F32"), world.normal("F32")
    rounded_once = world.rounded(world.stage("linear", [a, b, c]), "BF16")
    if saved:
        world.graph.add_output("saved", ~rounded_once, 0)
    first, second = world.stage("slerp", [rounded_once, b]), world.stage("slerp", [rounded_once, c])
    pair = [world.stage("linear", sources) for sources in ([first, second, b], [first, second, c])]
    world.graph.add_output("last", ~world.rounded(world.stage("slerp", pair), "BF16"), 0)
    found = []
    for inline in (False, True):
        each = world.fresh(fuse(world.graph, inline=inline))
        Executor(each.graph, scheduled(each, 20), [CpuDevice(1)], each, each).run()
        found.append({output.label: bytes(each.written[output.node]) for output in each.graph.outputs})
    assert found[0] == found[1]


def test_tasks_that_no_output_needs_are_left_out() -> None:
    world = Stages()
    a, b, c = (world.normal("F32") for _ in range(3))
    unneeded = world.stage("slerp", [a, c])
    for other in (b, c):
        world.stage("linear", [unneeded, other])
    world.saved(world.stage("slerp", [b, a]), "BF16")
    fused = fuse(world.graph)
    assert len(fused.node_sources) == 1
    assert [fused.reads[value] for value in fused.node_sources[0]] == [world.graph.reads[b], world.graph.reads[a]]


def chain(length: int, back: int) -> MergeGraph:
    """Stages of ties, each of which uses the two that are 1 and `back` before it."""
    world = Stages()
    values = [world.source((8, 4)) for _ in range(3)]
    kernel = merge_methods()["ties"].kernel(InputSpec(3, 0, (8, 4)), {"weight": (1, 1, 1), "density": (0.5, 0.5, 0.5)})
    for _ in range(length):
        operation = Operation(Kind.MERGE, "ties", base=0, positions=(0, 1, 2), kernel=kernel)
        sources = (values[0], values[-1], values[-back])
        values.append(~world.graph.append_node(operation, sources, DTYPES["F32"], 0, (8, 4)))
    world.graph.add_output("last", ~values[-1], 0)
    return world.graph


def parts_of(graph: MergeGraph) -> int:
    """The number of kernels in all compositions of a graph."""
    kernels = [graph.operation(node).kernel for node in graph.tasks()]
    return sum(len(kernel.parts) if isinstance(kernel, Composition) else 1 for kernel in kernels)


def test_each_stage_is_computed_once_where_several_use_it() -> None:
    #  each of 25 stages uses the two before it: computed again for every use they would be 2^25
    graph = chain(25, 2)
    assert parts_of(fuse(graph)) == 25
    assert parts_of(fuse(graph, inline=True)) == 25
    fused = fuse(graph)
    assert len(fused.node_sources) == 24  # only the last but one is used once


@pytest.mark.parametrize("inline", [False, True])
def test_a_long_chain_is_fused_without_recursion(inline: bool) -> None:
    world = Stages()
    a = world.source((4,))
    value, kernel = a, merge_methods()["linear"].kernel(InputSpec(2, None, (4,)), {"weight": (0.5, 0.5)})
    for _ in range(300):
        operation = Operation(Kind.MERGE, "linear", positions=(0, 1), kernel=kernel)
        value = ~world.graph.append_node(operation, (value, a), DTYPES["F32"], 0, (4,))
    world.graph.add_output("last", ~value, 0)
    fused = fuse(world.graph, inline=inline)
    assert len(fused.node_sources) == 1
    assert parts_of(fused) == 300


def test_a_graph_without_tasks_that_use_tasks_is_unchanged() -> None:
    world = Stages()
    world.saved(world.stage("linear", [world.normal("F32"), world.normal("F32")]), "F32")
    assert fuse(world.graph) is world.graph
