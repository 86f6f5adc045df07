"""What kernels allocate is measured: every method keeps within it, and a kernel's own declaration is not trusted."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from mergeloom.engine.cost import measure_torch_memory as module
from mergeloom.engine.cost.measure_memory import measure_footprints
from mergeloom.engine.cost.measure_torch_memory import allocations, footprint
from mergeloom.engine.execute.compute.torch_computer import Piece, check_inputs, combine_chunk, reduce_chunk
from mergeloom.engine.graph.footprint import Footprint, Line
from mergeloom.engine.graph.graph import Kind, MergeGraph, Operation
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.requirements import PAGE
from mergeloom.engine.schedule.schedule import make_schedule
from mergeloom.engine.schedule.tiling import tile_length
from mergeloom.errors import UsageError
from mergeloom.io.tensors.dtypes import BF16, F32, F64, DType
from mergeloom.methods import Array, Inputs, add, host, merge_methods
from mergeloom.methods.kernel.composition import Composition, Part
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.method import Method
from mergeloom.methods.kernel.spec import InputSpec
from mergeloom.methods.kernel.torch_backend import program_run
from mergeloom.methods.kernel.torch_backend.operations import OPERATIONS
from mergeloom.methods.kernel.torch_backend.tile import Workspace
from tests.support.graphs import World
from tests.support.methods.cases import CASES, Case
from tests.support.methods.kernels import kernel_of, method_of

MIB = 1 << 20


def bound(case: Case, shape: tuple[int, ...]) -> Kernel:
    """The kernel of a case for tensors of a shape."""
    return merge_methods()[case.method].kernel(InputSpec(case.models, case.base, shape), case.parameters)


def halves(shape: tuple[int, ...]) -> Kernel:
    """The kernel of the mean of two inputs."""
    return merge_methods()["linear"].kernel(InputSpec(2, None, shape), {"weight": (0.5, 0.5)})


def fine_tunes(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Flat inputs, other than those that are measured with."""
    start, *steps = normal_numbers(shape)
    scales = [0.0007 if i != case.base else 0 for i in range(case.models)]
    tunes = [start * 0.02 + step * scale for step, scale in zip(steps, scales, strict=False)]
    assert len(tunes) == case.models
    return [torch.from_numpy(tune).to(dtype).view(-1) for tune in tunes]


@cache
def normal_numbers(shape: tuple[int, ...]) -> list[numpy.ndarray[Any, Any]]:
    """The random numbers of a base model and of at most four fine-tunes."""
    generator = numpy.random.default_rng(7)
    return [generator.standard_normal(shape, dtype=numpy.float32) for _ in range(5)]


@pytest.mark.parametrize("case", CASES, ids=map(str, CASES))
def test_a_tile_of_any_method_takes_what_was_planned(case: Case) -> None:
    check_a_tile(case, BF16, torch.bfloat16)


@pytest.mark.parametrize(("dtype", "name"), [(F32, torch.float32), (F64, torch.float64)], ids=["F32", "F64"])
@pytest.mark.parametrize("case", CASES, ids=map(str, CASES))
def test_a_tile_of_any_method_and_dtype_takes_what_was_planned(case: Case, dtype: DType, name: torch.dtype) -> None:
    check_a_tile(case, dtype, name)


def check_a_tile(case: Case, dtype: DType, name: torch.dtype) -> None:
    """Compare the memory that a kernel takes for a tile with what was planned."""
    shape = (1024, 512)
    kernel = bound(case, shape)
    elements, width = 1024 * 512, 8 if dtype is F64 else 4
    found = footprint(Operation(Kind.MERGE, case.method, kernel=kernel), (dtype,) * case.models, (BF16,))
    assert found.workspace.at(elements) <= kernel.workspace(elements, width)  # the declaration holds
    piece = Piece(kernel, fine_tunes(case, shape, name), 0, 5, tuple(range(case.models)), elements, elements)
    space = Workspace(torch.empty(kernel.workspace(elements, width), dtype=torch.uint8), torch.float32)
    out = torch.empty(elements, dtype=torch.bfloat16)
    allowed = found.allocated.at(elements) + MIB
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with allocations() as checking:
            check_inputs(piece, space)
        assert checking.peak <= allowed
        state: Any = None
        for index in range(kernel.reductions):
            if kernel.needed(index, state):
                with allocations() as reducing:
                    partial = reduce_chunk(piece, index, state, space)
                assert reducing.peak <= allowed, index
                state = kernel.finish(index, partial, state)
        with allocations() as combining:
            combine_chunk(piece, state, space, [out])
        assert combining.peak <= allowed
    finally:
        torch.set_num_threads(threads)
    assert space.peak <= max(found.workspace.at(elements), kernel.workspace(elements, width))


def test_ramplus_counts_without_copies_of_the_tile() -> None:
    """torch.sum(dtype=) converts a copy: eight bytes for each element, freed and taken again for every tile."""
    case = next(case for case in CASES if case.method == "ramplus_tl")
    shape, elements = (1024, 512), 1024 * 512
    kernel = bound(case, shape)
    piece = Piece(kernel, fine_tunes(case, shape, torch.bfloat16), 0, 5, tuple(range(case.models)), elements, elements)
    space = Workspace(torch.empty(kernel.workspace(elements, 4), dtype=torch.uint8), torch.float32)
    reduce_chunk(piece, 0, None, space)
    with allocations() as counting:
        reduce_chunk(piece, 0, None, space)
    assert counting.peak < elements


def test_allocations_of_torch_and_numpy_are_counted() -> None:
    values = torch.rand(MIB)
    with allocations() as summing:
        values.sum(dtype=torch.float64)  # converts a copy
    assert 8 * MIB <= summing.peak < 9 * MIB
    with allocations() as adding:
        values.add_(1)
    assert adding.peak < MIB // 16
    array = numpy.ones(MIB, dtype=numpy.float32)
    with allocations() as sorting:
        numpy.sort(array)
    assert 4 * MIB <= sorting.peak < 5 * MIB


def test_without_torchs_counts_as_much_as_the_workspace_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = Operation(Kind.MERGE, "linear", kernel=halves((64, 1024)))
    monkeypatch.setattr(module, "_measured", {})
    monkeypatch.setattr(torch.autograd, "ProfilerConfig", None)
    found = footprint(operation, (BF16, BF16), (BF16,))
    assert found.allocated.at(1 << 16) >= found.workspace.at(1 << 16) == 2 * 4 * 64 * 1024


def test_a_program_that_profiles_itself_goes_on_doing_so() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with allocations() as found:
            torch.rand(MIB).add_(1)
        torch.rand(7).mul_(2)
    assert not found.complete
    assert any(event.key == "aten::mul_" for event in profile.key_averages())


def test_a_line_through_two_points() -> None:
    assert Line.through((10, 120), (20, 220)).at(100) == 1020
    assert Line.through((10, 120), (20, 120)).at(100) == 120
    assert Line.through((10, 120), None).at(100) == 120
    assert Line.through((10, 50), (20, 150)).at(100) == 1000  # a constant is not below 0


def greedy_sum(t: Inputs) -> Array:
    """The sum of the models."""
    return add(t.models)


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> Method:
    """A method that takes more of the workspace than it declares, with an addition that allocates."""

    def add_in_float64(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return out.copy_(torch.stack([a, b]).double().sum(0))  # 32 bytes for each element

    monkeypatch.setattr(Kernel, "workspace", lambda kernel, elements, itemsize: itemsize * elements)
    monkeypatch.setattr(program_run, "OPERATIONS", OPERATIONS | {"add": add_in_float64})
    monkeypatch.setattr(module, "_measured", {})
    return method_of(greedy_sum)


def test_what_a_kernel_declares_is_not_trusted(greedy: Method) -> None:
    kernel = greedy.kernel(InputSpec(3, None, (4096, 4096)), {})
    found = footprint(Operation(Kind.MERGE, "greedy", kernel=kernel), (BF16,) * 3, (BF16,))
    elements = 1 << 19
    assert found.workspace.at(elements) == 2 * 4 * elements  # the sum and a term
    assert found.allocated.at(elements) >= 24 * elements
    assert kernel.workspace(elements, 4) < 2 * 4 * elements


def test_a_schedule_reserves_what_was_measured(greedy: Method) -> None:
    world = World()
    sources = tuple(world.source(4096 * 64) for _ in range(3))
    operation = Operation(Kind.MERGE, "greedy", kernel=greedy.kernel(InputSpec(3, None, (4096 * 64,)), {}))
    world.graph.add_output("out", world.graph.add_node(operation, sources, F32), 0)
    budget = Budget(1 << 40, 0, (DeviceBudget("test", 1 << 40, 2),))
    declared = make_schedule(world.graph, budget)
    measure_footprints(world.graph, separate=True)
    measured = make_schedule(world.graph, budget)
    found = world.graph.footprints[0]
    tile = min(tile_length(world.graph, 0, measured.tile_elements[0]), world.graph.elements(0))
    assert measured.workspace[0] == -(-found.workspace.at(tile) // PAGE) * PAGE > declared.workspace[0]
    assert measured.minimum_vram - declared.minimum_vram == 2 * (measured.workspace[0] - declared.workspace[0])


def test_the_cpu_reserves_what_compiled_loops_take() -> None:
    world = World()
    sources = tuple(world.source(4096 * 64) for _ in range(3))
    operation = Operation(Kind.MERGE, "sum", kernel=kernel_of(greedy_sum, 3, None, (4096 * 64,)))
    world.graph.add_output("out", world.graph.add_node(operation, sources, F32), 0)
    measure_footprints(world.graph, separate=False)
    loops = Compiled(kernel_of(greedy_sum, 3, None, (4096 * 64,)), ("F32",) * 3, "F32")
    assert world.graph.footprints[0] == Footprint(Line(loops.scratch), Line(loops.allocated))
    budgets = (DeviceBudget("cpu", None, 2), DeviceBudget("cpu", None, 3))
    two, three = (make_schedule(world.graph, Budget(1 << 40, 0, (budget,))) for budget in budgets)
    assert two.workspace[0] == -(-loops.scratch // PAGE) * PAGE
    grown = two.workspace[0] + -(-loops.allocated // PAGE) * PAGE  # no partial results: there is one pass
    assert three.minimum_ram - two.minimum_ram == grown


def test_planning_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(loops: Compiled) -> None:
        raise AssertionError("compiled while planning")

    monkeypatch.setattr(Compiled, "prepare", refuse)
    world = World()
    world.node("above", [world.source(4096 * 64)])
    world.graph.footprints.clear()
    measure_footprints(world.graph, separate=False)
    assert list(world.graph.footprints) == [0]


def test_stages_are_measured_together() -> None:
    shape = (512, 1024)
    pair = InputSpec(2, None, shape)
    parts = [
        Part(merge_methods()["linear"].kernel(pair, {"weight": (0.5, 0.5)}), (0, 1)),
        Part(merge_methods()["linear"].kernel(pair, {"weight": (0.5, 0.5)}), (~0, 2)),
    ]
    kernel = Composition(InputSpec(3, None, shape), parts)
    assert kernel.resized((64, 1024)).parts[1].kernel.inputs.shape == (64, 1024)
    found = footprint(Operation(Kind.MERGE, "linear of linear", kernel=kernel), (BF16,) * 3, (BF16,))
    assert 0 < found.workspace.at(1 << 19) <= kernel.workspace(1 << 19, 4)


def test_a_small_kernel_is_measured_on_its_own_shape() -> None:
    kernel = halves((64, 1024))
    found = footprint(Operation(Kind.MERGE, "linear", kernel=kernel), (BF16, BF16), (BF16,))
    assert found.workspace == Line(2 * 4 * 64 * 1024)
    assert module.small_shapes(kernel, (BF16, BF16)) == ((64, 1024),)


def test_parameters_that_change_the_work_are_measured_apart() -> None:
    def measured(density: float) -> Footprint:
        parameters = {"weight": (0.0, 1.0, 1.0), "density": (0.0, density, density)}
        kernel = merge_methods()["dare_linear"].kernel(InputSpec(3, 0, (4096, 4096)), parameters)
        return footprint(Operation(Kind.MERGE, "dare_linear", kernel=kernel), (BF16,) * 3, (BF16,))

    assert measured(0.3) is measured(0.7)
    assert measured(0.3).workspace.at(1 << 19) > measured(1.0).workspace.at(1 << 19)


def test_a_method_that_fails_on_test_values_is_an_error_of_the_user() -> None:
    kernel = kernel_of(lambda t: t.other * host(lambda total: 1 / 0, t.sum(t.other)), 1, None, (8, 8))
    operation = Operation(Kind.MERGE, "failing", kernel=kernel)
    says = r"merge method failing fails on a test tensor .*ZeroDivisionError: division by zero"
    with pytest.raises(UsageError, match=says):
        footprint(operation, (BF16,), (BF16,))


def test_many_wide_inputs_are_measured_on_small_tiles() -> None:
    kernel = merge_methods()["linear"].kernel(InputSpec(64, None, (4096, 4096)), {"weight": (1.0,) * 64})
    (small, _), (large, _) = module.small_shapes(kernel, (F32,) * 64)
    assert small * 4096 == module._LEAST_TILE
    assert large == 2 * small


def test_graphs_without_arithmetic_need_nothing() -> None:
    graph = MergeGraph(())
    for separate in (False, True):
        measure_footprints(graph, separate=separate)
        assert graph.footprints == {}


def test_buffers_at_one_offset_of_the_counting_workspace_share_memory() -> None:
    """A kernel can read a buffer in another dtype than it wrote: other memory would give it arbitrary values."""
    workspace = module._Counting()
    mark = workspace.mark()
    words = workspace.take(4, torch.int32)
    workspace.release(mark)
    assert workspace.take(16, torch.int8).data_ptr() == words.data_ptr()
    assert workspace.peak == 64
