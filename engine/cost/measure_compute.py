"""Measures the throughput of the recipe's methods, on the first elements of the input tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import MergeloomError
from ...io.tensors.assembled import read_tensor
from ...io.tensors.dtypes import DType
from ...io.units import plural
from ..graph.graph import Kind, MergeGraph
from .estimate import EXTRAPOLATED, MEASURED, Rate, Rates
from .machine import usable_cores
from .scaling import COPY_TRAFFIC, computing_threads, effective_threads, serial_share
from .workload import Workload

if TYPE_CHECKING:
    from ...methods.kernel.kernel import Kernel

SECONDS = 0.25
"""Approximate time of each measurement; the warm-up takes as long again."""
_GROUPS = 4  # number of kinds of nodes that are measured
_ELEMENTS, _GPU_ELEMENTS = 1 << 22, 1 << 24
_COPIES, _LEAST_COPY = 128 << 20, 8 << 20  # bytes that all threads, and each one at least, copy at a time


def with_computing(rates: Rates, work: Workload, given: Mapping[str, float]) -> tuple[Rates, list[str]]:
    """Measure the rates of computing and of copies to a GPU.

    Args:
        rates: rates so far.
        work: work of the merge.
        given: rates that the user gave, which are not measured.

    Returns:
        The rates with the measured ones replaced, and remarks for the user.
    """
    devices = work.schedule.budget.devices
    gpus = [device for device in devices if device.vram is not None]
    notes: list[str] = []
    if gpus:
        missing = [name for name in ("h2d", "d2h", "compute") if name not in given]
        if not missing:
            return rates, []
        from .measure_gpu import has_cuda, measure_copies

        if work.machine is not None or not has_cuda():
            return rates, [
                f"the GPU is not on this machine and cannot be measured: give {', '.join(missing)} with --rates"
            ]
        if not {"h2d", "d2h"} <= given.keys():
            up, down = measure_copies(gpus[0].name)
            rates = replace(rates, h2d=Rate(up, MEASURED), d2h=Rate(down, MEASURED))
    if not gpus and "bandwidth" not in given and work.cores <= usable_cores():
        rates = replace(rates, bandwidth=Rate(measure_bandwidth(usable_cores()), MEASURED))
    if "compute" in given:
        return rates, notes
    if gpus:
        measured, notes = _measure_methods(work, gpus[0].name, 1)
        return replace(rates, compute=Rate(len(gpus) * measured, MEASURED)) if measured else rates, notes
    return _with_threads(rates, work)


def _with_threads(rates: Rates, work: Workload) -> tuple[Rates, list[str]]:
    """Measure computing on the CPU with the threads that this machine has cores for.

    More threads, on another machine, are not proportionally faster: the throughput is extrapolated from that of all
    threads and of one.
    """
    wanted = computing_threads(work)
    threads = min(wanted, usable_cores())
    measured, notes = _measure_methods(work, "cpu", threads)
    if not measured:
        return rates, notes
    if threads == wanted:
        return replace(rates, compute=Rate(measured, MEASURED)), notes
    serial = rates.serial
    alone = _measure_methods(work, "cpu", 1)[0] if threads > 1 else 0.0
    if alone:
        serial = serial_share(threads, measured / alone)
    scale = effective_threads(wanted, serial) / effective_threads(threads, serial)
    notes.append(f"computing was measured with {plural(threads, 'thread')} and extrapolated to {wanted}")
    return replace(rates, compute=Rate(scale * measured, EXTRAPOLATED), serial=serial), notes


def _measure_methods(work: Workload, device: str, threads: int) -> tuple[float, list[str]]:
    """Measure the recipe's methods; return input bytes per second, 0 if unknown, and a remark about each method."""
    seconds = nbytes = 0.0
    notes = []
    for group in node_groups(work)[:_GROUPS]:
        try:
            per_second = measure_node(work, group.node, device, threads)
        except (MergeloomError, OSError):
            continue
        if per_second:
            seconds += group.nbytes / per_second
            nbytes += group.nbytes
            elements = per_second / (group.nbytes / group.elements)
            notes.append(f"{group.method}: {1e9 * threads / elements:.2g} ns per element and thread, for all passes")
    return (nbytes / seconds if seconds else 0.0), notes


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes with the same method, passes, and dtypes of inputs and output.

    Args:
        method: name of the method.
        node: number of the largest node.
        nbytes: input bytes that are computed on, each pass counted.
        elements: number of elements of all outputs.
    """

    method: str
    node: int
    nbytes: int
    elements: int


def node_groups(work: Workload) -> list[Group]:
    """Return the groups of nodes that compute, those with the most input bytes first."""
    graph = work.graph
    groups: dict[tuple[Any, ...], Group] = {}
    for node in graph:
        operation = graph.operation(node)
        if operation.kind is not Kind.MERGE or not graph.elements(node):
            continue
        sources = graph.node_sources[node]
        dtypes = tuple(graph.value_dtype(value).name for value in sources)
        key = (operation.method, operation.passes, dtypes, graph.node_dtype[node].name)
        nbytes = operation.passes * sum(map(graph.value_nbytes, sources))
        known = groups.get(key, Group(operation.method, node, 0, 0))
        largest = max(known.node, node, key=lambda n: graph.elements(n))
        groups[key] = Group(operation.method, largest, known.nbytes + nbytes, known.elements + graph.elements(node))
    return sorted(groups.values(), key=lambda group: -group.nbytes)


def measure_node(work: Workload, node: int, device: str, threads: int) -> float:
    """Measure a node's throughput on the first rows of its tensors.

    Args:
        work: work of the merge.
        node: number of the node.
        device: name of the device.
        threads: number of threads.

    Returns:
        Input bytes per second, each pass counted, of all threads together; 0 if it cannot be measured.
    """
    kernel = small_kernel(work, node, _ELEMENTS if device == "cpu" else _GPU_ELEMENTS)
    if kernel is None:
        return 0.0
    inputs = _first_elements(work, node, kernel)
    if device == "cpu":
        run = _cpu_passes(work.graph, node, kernel, inputs, threads)
    else:
        from .measure_gpu import gpu_passes

        run = gpu_passes(work, node, kernel, inputs, device)
    runs, seconds = _repeat(run, threads)
    return runs * (kernel.reductions + 1) * sum(map(len, inputs)) / seconds


def _first_elements(work: Workload, node: int, kernel: Kernel) -> list[bytearray]:
    """Read as many elements of each of a node's sources, from its first one on, as are staged for all of a kernel."""
    from ...io.reading import Reader

    reader = Reader()
    inputs = []
    try:
        for place, value in enumerate(work.graph.node_sources[node]):
            elements = kernel.inputs.staged(place, 0, kernel.inputs.rows * kernel.inputs.columns)
            if value < 0:
                inputs.append(_normal(work.graph.value_dtype(value), elements))
                continue
            ref = work.graph.reads[value]
            data = bytearray(ref.dtype.nbytes(elements))
            read_tensor(reader.read, ref, 0, memoryview(data))
            inputs.append(data)
    finally:
        reader.close()
    return inputs


def _normal(dtype: DType, elements: int) -> bytearray:
    """Return normal numbers as the elements of an intermediate tensor, which no file holds."""
    import numpy as np

    numbers = np.random.default_rng(0).normal(0, 0.02, elements)
    if dtype.name in ("F64", "F16"):
        return bytearray(numbers.astype(np.float64 if dtype.name == "F64" else np.float16))
    single = numbers.astype(np.float32)  # the upper half of a float32 is a bfloat16
    return bytearray(single if dtype.name == "F32" else single.view(np.uint16)[1::2])[: dtype.nbytes(elements)]


def _cpu_passes(
    graph: MergeGraph, node: int, kernel: Kernel, inputs: Sequence[bytearray], threads: int
) -> Callable[[int], None]:
    """Return a function that runs all passes of a kernel over one chunk, as the engine does, in a thread."""
    from ...methods.kernel.fused.compiled import Compiled
    from ...methods.kernel.fused.finite import finite
    from ...methods.kernel.fused.passes import FusedPass
    from ...methods.kernel.fused.run import Chunk
    from ..execute.arena import take_memory

    dtypes = [graph.value_dtype(value).name for value in graph.node_sources[node]]
    results = graph.result_dtypes(node)
    compiled = Compiled(kernel, dtypes, *(result.name for result in results))
    elements = kernel.inputs.rows * kernel.inputs.columns
    scratch = [memoryview(take_memory(compiled.scratch)) for _ in range(threads)]
    outs = [[memoryview(bytearray(out.nbytes(elements))) for out in results] for _ in range(threads)]
    positions = graph.operation(node).positions or tuple(range(len(inputs)))
    chunk = Chunk([memoryview(data) for data in inputs], 0, elements, graph.node_key[node], positions)

    def run(thread: int) -> None:
        state = None
        if not kernel.propagates_nonfinite:
            for data, dtype in zip(chunk.inputs, dtypes, strict=True):
                finite(data, dtype)
        for index in range(kernel.reductions):
            if kernel.needed(index, state):
                partial = FusedPass(compiled, index, state, scratch[thread]).reduce(chunk)
                state = kernel.finish(index, partial, state)
        FusedPass(compiled, None, state, scratch[thread]).combine(chunk, *outs[thread])

    return run


def small_kernel(work: Workload, node: int, elements: int) -> Kernel | None:
    """Return a node's kernel for the first rows of its tensors; None if its method does not support fewer rows."""
    from ...methods.kernel.spec import MethodError

    kernel = work.graph.operation(node).kernel
    if kernel is None or work.graph.elements(node) <= elements:
        return kernel
    inputs = kernel.inputs
    shape = (max(1, elements // inputs.columns), inputs.columns) if inputs.rows > 1 else (elements,)
    try:
        return kernel.resized(shape)
    except MethodError:
        return None


def _repeat(work: Callable[[int], None], threads: int) -> tuple[int, float]:
    """Repeat the work on several threads, after a warm-up; return the number of runs of all, and the seconds."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
        start = time.perf_counter()

        def repeat(thread: int) -> int:
            runs = 0
            while runs == 0 or time.perf_counter() - start < SECONDS:
                work(thread)
                runs += 1
            return runs

        runs = sum(pool.map(repeat, range(threads)))
        return runs, time.perf_counter() - start


def measure_bandwidth(threads: int) -> float:
    """Measure the bytes per second that threads read and write together, by copies that are larger than the caches."""
    import numpy as np

    size = max(_LEAST_COPY, _COPIES // threads)
    sources, targets = ([np.ones(size, np.uint8) for _ in range(threads)] for _ in range(2))

    def copy(thread: int) -> None:
        np.copyto(targets[thread], sources[thread])  # releases the interpreter lock

    runs, seconds = _repeat(copy, threads)
    return COPY_TRAFFIC * size * runs / seconds
