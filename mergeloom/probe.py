"""What the real disks, the memory and the real methods do in a second: measured, each in about half a second.

Inputs are read where the page cache doesn't have them, through the calls that a merge makes; what is written goes to an
unnamed file in OUT's file system, which is gone afterwards. The methods run on the first elements of the real tensors.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine.graph import Kind
from .errors import MergeloomError
from .estimate import MEASURED, Rate, Rates, assumed_rates, with_given
from .io.platform import cached_share, read_at, write_at

if TYPE_CHECKING:
    from torch import Tensor

    from .engine.compute import Piece
    from .methods.contract import Kernel
    from .methods.tile import Workspace
    from .planning import Plan

SECONDS = 0.5
"""How long each measurement takes, about."""
_PLACES = 64  # in the inputs, at which the page cache is asked, and from which is read
_WINDOW = 8 << 20
_BLOCK = 1 << 20
_THREADS = 2
_FIRST_WRITE, _MOST_WRITTEN = 8 << 20, 1 << 30
_FREE_SHARE = 8  # of the free space, one in so many bytes may be written
_GROUPS = 4  # kinds of nodes that are measured
_ELEMENTS, _GPU_ELEMENTS = 1 << 20, 1 << 23
_COPY = 64 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """A range of an input that a merge reads.

    Args:
        file: of it.
        offset: a multiple of the page's size.
        nbytes: of the range.
        cached: the share of it in the page cache.
    """

    file: Path
    offset: int
    nbytes: int
    cached: float


@dataclass(slots=True)
class _Moved:
    """What was moved in how many seconds, of the clock and of a core."""

    nbytes: int = 0
    seconds: float = 0.0
    core: float = 0.0

    def add(self, other: _Moved) -> None:
        self.nbytes += other.nbytes
        self.seconds += other.seconds
        self.core += other.core


def measured_rates(plan: Plan, out: Path | None, given: Mapping[str, float]) -> Rates:
    """The rates for a plan on this machine.

    Args:
        plan: says which inputs, methods and devices.
        out: where the merge would write; its disk isn't touched where None, and its rate is assumed.
        given: rates that needn't be measured.
    """
    rates = assumed_rates(plan)
    notes = []
    core = _Moved()
    if "disk_read" not in given:
        rates, note = _with_reading(rates, plan, core)
        notes += note
    if "disk_write" not in given and out is not None:
        written = measure_writing(next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir()))
        core.add(written)
        if written.seconds:
            rates = replace(rates, disk_write=Rate(written.nbytes / written.seconds, MEASURED))
    if core.core > 0:
        rates = replace(rates, memory=Rate(core.nbytes / core.core, MEASURED))
    if plan.computes:
        rates, note = _with_computing(rates, plan, given)
        notes += note
    if out is None and "disk_write" not in given:
        notes.append("give OUT as well, and writing to its disk is measured too")
    return with_given(replace(rates, notes=tuple(notes)), given)


# ------------------------------------------------------------------------------------------------ disks


def _with_reading(rates: Rates, plan: Plan, core: _Moved) -> tuple[Rates, list[str]]:
    places = input_places(plan)
    if not places:
        return rates, []
    cached = sum(place.cached for place in places) / len(places)
    fresh = [place for place in places if place.cached < 0.5]
    disk = measure_reading(fresh, SECONDS) if fresh else _Moved()
    again = measure_reading(fresh or places, SECONDS / 4)  # they are in the page cache now
    core.add(disk)
    core.add(again)
    if disk.seconds:
        rates = replace(rates, disk_read=Rate(disk.nbytes / disk.seconds, MEASURED))
    notes = [f"{cached:.0%} of the inputs are in the page cache now"] if cached >= 0.005 else []
    if not fresh:
        notes.append("so the disk of the inputs was not measured")
    return replace(rates, cached=cached), notes


def input_places(plan: Plan, places: int = _PLACES) -> list[Place]:
    """Ranges of the inputs, evenly spaced over all bytes that are read, of the files that are here."""
    graph = plan.built.graph
    total = sum(ref.nbytes for ref in graph.reads)
    page = os.sysconf("SC_PAGESIZE")
    found = []
    past = wanted = 0
    for ref in graph.reads:
        while wanted < places and wanted * total < (past + ref.nbytes) * places:
            inside = wanted * total // places - past
            offset = (ref.offset + inside) // page * page
            nbytes = min(_WINDOW, ref.offset + ref.nbytes - offset)
            wanted += 1
            share = _cached_share(ref.file, offset, nbytes)
            if share is not None:
                found.append(Place(ref.file, offset, nbytes, share))
        past += ref.nbytes
    return found


def _cached_share(file: Path, offset: int, nbytes: int) -> float | None:
    """See `cached_share`; None for a file that can't be opened here, and 0 where the system doesn't tell."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return cached_share(descriptor, offset, nbytes) or 0.0
    finally:
        os.close(descriptor)


def measure_reading(places: Sequence[Place], seconds: float) -> _Moved:
    """Read the places, with as many threads as a merge does, for so long or until all are read."""
    start = time.perf_counter()
    deadline = start + seconds

    def read(part: Sequence[Place]) -> _Moved:
        moved = _Moved()
        begun = time.thread_time()
        buffer = memoryview(bytearray(_BLOCK))
        for place in part:
            descriptor = os.open(place.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = 0
                while done < place.nbytes and time.perf_counter() < deadline:
                    count = read_at(descriptor, buffer[: place.nbytes - done], place.offset + done)
                    if count == 0:
                        break
                    done += count
                moved.nbytes += done
            finally:
                os.close(descriptor)
        moved.core = time.thread_time() - begun
        return moved

    total = _Moved()
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            for moved in pool.map(read, (places[number::_THREADS] for number in range(_THREADS))):
                total.add(moved)
    except OSError:
        return _Moved()
    total.seconds = time.perf_counter() - start
    return total


def measure_writing(directory: Path) -> _Moved:
    """Write more and more to an unnamed file in a directory, synced each time, until the time is up."""
    moved = _Moved()
    data = os.urandom(_BLOCK)  # a file system that compresses must not be faster for it
    try:
        stats = os.statvfs(directory)
        most = min(_MOST_WRITTEN, stats.f_bavail * stats.f_frsize // _FREE_SHARE)
        start, size = time.perf_counter(), _FIRST_WRITE
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            descriptor = file.fileno()
            while moved.nbytes + size <= most:
                begun, core = time.perf_counter(), time.thread_time()
                for offset in range(0, size, _BLOCK):
                    write_at(descriptor, data, moved.nbytes + offset)
                busy = time.thread_time() - core
                os.fsync(descriptor)
                moved.add(_Moved(size, time.perf_counter() - begun, busy))
                if time.perf_counter() - start + 2 * (time.perf_counter() - begun) > SECONDS:
                    break
                size *= 2
    except OSError:
        return _Moved()  # whether OUT can be written at all, the plan says elsewhere
    return moved


# ------------------------------------------------------------------------------------------------ computing


def _with_computing(rates: Rates, plan: Plan, given: Mapping[str, float]) -> tuple[Rates, list[str]]:
    """Rates of the arithmetic, and of the copies to a GPU."""
    devices = plan.schedule.budget.devices
    gpus = [device for device in devices if device.vram is not None]
    notes: list[str] = []
    if gpus:
        if plan.options.machine is not None or not _has_cuda():
            return rates, ["the GPU's rates are assumed: give them with --rates"]
        if not {"h2d", "d2h"} <= given.keys():
            up, down = measure_copies(gpus[0].name)
            rates = replace(rates, h2d=Rate(up, MEASURED), d2h=Rate(down, MEASURED))
    if "compute" in given:
        return rates, notes
    threads = 1 if gpus else max(1, min(devices[0].threads, len(os.sched_getaffinity(0))))
    seconds = nbytes = 0.0
    for group in node_groups(plan)[:_GROUPS]:
        try:
            per_second = measure_node(plan, group.node, "cuda" if gpus else "cpu", threads)
        except (MergeloomError, OSError):
            continue
        if per_second:
            seconds += group.nbytes / per_second
            nbytes += group.nbytes
            elements = per_second / (group.nbytes / group.elements)
            notes.append(f"{group.method}: {1e9 * threads / elements:.2g} ns an element and thread, for all passes")
    if seconds:
        scale = len(gpus) if gpus else devices[0].threads / threads
        rates = replace(rates, compute=Rate(scale * nbytes / seconds, MEASURED))
    return rates, notes


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that do the same to the same number of inputs of the same types.

    Args:
        method: its name.
        node: the largest of them.
        nbytes: bytes of inputs that the arithmetic goes through, each pass counted.
        elements: of their outputs.
    """

    method: str
    node: int
    nbytes: int
    elements: int


def node_groups(plan: Plan) -> list[Group]:
    """The kinds of nodes that compute, those with the most to do first."""
    graph = plan.built.graph
    found: dict[tuple[Any, ...], Group] = {}
    for node in graph:
        operation = graph.operation(node)
        if operation.kind is not Kind.MERGE or not graph.elements(node):
            continue
        sources = graph.node_sources[node]
        dtypes = tuple(graph.reads[read].dtype.name for read in sources)
        key = (operation.method, operation.passes, dtypes, graph.node_dtype[node].name)
        nbytes = operation.passes * sum(graph.reads[read].nbytes for read in sources)
        known = found.get(key, Group(operation.method, node, 0, 0))
        largest = max(known.node, node, key=lambda n: graph.elements(n))
        found[key] = Group(operation.method, largest, known.nbytes + nbytes, known.elements + graph.elements(node))
    return sorted(found.values(), key=lambda group: -group.nbytes)


def measure_node(plan: Plan, node: int, device: str, threads: int) -> float:
    """Bytes of inputs that a node's passes go through in a second, by all threads together; 0 where it can't be told.

    The node's method is bound to the first rows of its tensors, which are read from their files.
    """
    import torch

    from .engine.compute import Piece, torch_dtype
    from .engine.tiling import work_bytes
    from .io.reading import Reader
    from .methods.tile import Workspace

    graph = plan.built.graph
    refs = [graph.reads[read] for read in graph.node_sources[node]]
    kernel = small_kernel(plan, node, _ELEMENTS if device == "cpu" else _GPU_ELEMENTS)
    if kernel is None:
        return 0.0
    elements = kernel.inputs.rows * kernel.inputs.columns
    reader = Reader()
    inputs: list[Tensor] = []
    try:
        for ref in refs:
            data = bytearray(ref.dtype.nbytes(elements))
            reader.read(ref.file, ref.offset, memoryview(data))
            inputs.append(torch.frombuffer(data, dtype=torch_dtype(ref.dtype)).to(device))
    finally:
        reader.close()
    tile = max(1, plan.schedule.tile_elements[0] // kernel.granule) * kernel.granule
    nbytes = kernel.workspace(min(tile, elements), work_bytes(graph, node))
    spaces = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(threads)]
    outs = [torch.empty(elements, dtype=torch_dtype(graph.node_dtype[node]), device=device) for _ in range(threads)]
    positions = graph.operation(node).positions or tuple(range(len(inputs)))
    piece = Piece(kernel, inputs, 0, graph.node_key[node], positions, tile)

    def work(thread: int) -> None:
        _run(piece, Workspace(spaces[thread], torch.float32), outs[thread])
        if device != "cpu":
            torch.cuda.synchronize()

    runs, seconds = _repeat(work, threads)
    passes = kernel.reductions + 1
    return runs * passes * sum(tensor.nbytes for tensor in inputs) / seconds


def small_kernel(plan: Plan, node: int, elements: int) -> Kernel | None:
    """A node's method bound to the first rows of its tensors; None where it can't be bound to fewer."""
    from .methods import merge_methods
    from .methods.contract import Inputs, MethodError

    graph = plan.built.graph
    operation = graph.operation(node)
    kernel = operation.kernel
    method = merge_methods().get(operation.method)
    if kernel is None or graph.elements(node) <= elements:
        return kernel
    inputs = kernel.inputs
    shape = (max(1, elements // inputs.columns), inputs.columns) if inputs.rows > 1 else (elements,)
    small = Inputs(inputs.count, inputs.base, shape)
    try:
        return None if method is None else method.kernel(small, dict(operation.parameters))
    except MethodError:
        return None


def _run(piece: Piece, workspace: Workspace, out: Tensor) -> None:
    """All passes of a kernel over the piece, as the engine does them."""
    from .engine.compute import check_inputs, combine_chunk, reduce_chunk

    kernel, state = piece.kernel, None
    if not kernel.transparent:
        check_inputs(piece, workspace)
    for index in range(kernel.reductions):
        if kernel.needed(index, state):
            state = kernel.finish(index, reduce_chunk(piece, index, state, workspace), state)
    combine_chunk(piece, state, workspace, out)


def _repeat(work: Callable[[int], None], threads: int) -> tuple[int, float]:
    """How often the threads together do the work in about half a second, after once to warm up; and the seconds."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
            start = time.perf_counter()

            def repeat(thread: int) -> int:
                runs = 0
                while runs == 0 or time.perf_counter() - start < SECONDS / 2:
                    work(thread)
                    runs += 1
                return runs

            runs = sum(pool.map(repeat, range(threads)))
            return runs, time.perf_counter() - start
    finally:
        torch.set_num_threads(before)


def measure_copies(name: str) -> tuple[float, float]:
    """Bytes a second to a GPU and back, from and to memory that is registered with it."""
    import torch

    host = torch.empty(_COPY, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(_COPY, dtype=torch.uint8, device=name)
    found = []
    for target, source in ((device, host), (host, device)):
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(name)
        start = time.perf_counter()
        for _ in range(8):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(name)
        found.append(8 * _COPY / (time.perf_counter() - start))
    return found[0], found[1]
