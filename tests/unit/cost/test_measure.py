"""What is measured: bounded in time, true to the page cache, without a trace, for every method."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.cost import measure_compute as computing_probe
from mergeloom.engine.cost import measure_disk as probe
from mergeloom.engine.cost.estimate import ASSUMED, EXTRAPOLATED, GIVEN, MEASURED, Rate
from mergeloom.engine.cost.machine import Machine
from mergeloom.engine.cost.measure_compute import measure_node, node_groups, small_kernel
from mergeloom.engine.cost.measure_disk import input_ranges, measure_reading, measure_writing, measured_rates
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from mergeloom.io.platform import DISABLED, cached_share, forget_cached
from mergeloom.methods import merge_methods
from mergeloom.methods.kernel.spec import Base
from tests.conftest import MakeModel
from tests.support.plans import linear, stacked

CPU = Options(device="cpu", threads=2)
SHAPE = (64, 1024)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is measured for a moment only."""
    monkeypatch.setattr(probe, "SECONDS", 0.05)
    monkeypatch.setattr(computing_probe, "SECONDS", 0.02)
    monkeypatch.setattr(computing_probe, "_COPIES", 16 << 20)


@pytest.fixture
def large(make_model: MakeModel) -> Path:
    """A model of 64 MB whose bytes are on the disk."""
    path = make_model("large", {f"model.layers.{i}.w.weight": (4096, 1024) for i in range(8)}, fill=0)
    os.sync()
    return path


def forget(path: Path) -> bool:
    """Drop a model from the page cache; return whether the file system did."""
    descriptor = os.open(path / "model.safetensors", os.O_RDONLY)
    try:
        forget_cached(descriptor, 0, 0)
        return cached_share(descriptor, 0, 64 << 20) == 0
    finally:
        os.close(descriptor)


def planned(path: Path) -> Plan:
    """A plan that only copies."""
    return plan(stacked((path, (0, 8))))


# ------------------------------------------------------------------------------------------------ reading


def test_ranges_are_spread_over_all_that_is_read(large: Path) -> None:
    ranges = input_ranges(planned(large).workload, 16)
    assert len(ranges) == 16
    size = (large / "model.safetensors").stat().st_size
    offsets = sorted(each.offset for each in ranges)
    assert all(offset % os.sysconf("SC_PAGESIZE") == 0 for offset in offsets)
    assert max(b - a for a, b in pairwise(offsets)) < size / 8
    assert all(each.nbytes > 0 and each.offset + each.nbytes <= size for each in ranges)


def test_the_page_cache_is_known_and_looking_leaves_it_as_it_is(large: Path) -> None:
    found = planned(large)  # reads the header, which is then cached
    if not forget(large):
        pytest.skip("this file system keeps its pages")
    for _ in range(2):
        assert {each.cached for each in input_ranges(found.workload)} == {0.0}
    (large / "model.safetensors").read_bytes()
    assert min(each.cached for each in input_ranges(found.workload, 16)) > 0.9  # the kernel may take single pages back


def test_a_system_that_does_not_tell_what_is_cached(large: Path) -> None:
    DISABLED.add("mincore")
    try:
        assert {each.cached for each in input_ranges(planned(large).workload, 4)} == {0.0}
    finally:
        DISABLED.discard("mincore")


def test_reading_is_timed_and_bounded(large: Path) -> None:
    ranges = input_ranges(planned(large).workload, 16)
    everything = measure_reading(ranges, 60)
    assert everything.nbytes == sum(each.nbytes for each in ranges)
    assert 0 < everything.core <= 2.1 * everything.seconds
    assert everything.rate.per_second == everything.nbytes / everything.seconds
    part = measure_reading(ranges * 1000, 0.05)
    assert part.nbytes < everything.nbytes * 1000


def test_something_is_read_even_if_the_time_is_up(large: Path) -> None:
    ranges = input_ranges(planned(large).workload, 16)
    moved = measure_reading(ranges, 0)
    assert 0 < moved.nbytes < sum(each.nbytes for each in ranges)
    assert moved.rate.per_second > 0


def test_cached_inputs_are_no_measure_of_the_disk(large: Path) -> None:
    found = planned(large)
    if not forget(large):
        pytest.skip("this file system keeps its pages")
    fresh = measured_rates(found.workload, None, {})
    assert fresh.disk_read.origin == MEASURED
    assert fresh.cached == 0.0
    (large / "model.safetensors").read_bytes()
    known = measured_rates(found.workload, None, {})
    assert known.disk_read.origin == ASSUMED
    assert known.cached > 0.9
    assert known.memory.origin == MEASURED
    assert any(re.search(r"(9\d|100)% of the inputs are in the page cache", note) for note in known.notes)


def test_files_that_are_not_here_are_left_out(large: Path) -> None:
    found = planned(large)
    (large / "model.safetensors").unlink()
    assert input_ranges(found.workload) == []
    assert measured_rates(found.workload, None, {}).disk_read.origin == ASSUMED


# ------------------------------------------------------------------------------------------------ writing


def test_writing_leaves_no_trace(tmp_path: Path) -> None:
    found = measure_writing(tmp_path)
    assert found.nbytes >= 8 << 20
    assert found.seconds > 0
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_to_is_not_measured(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert measure_writing(file).nbytes == 0


def test_a_nearly_full_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    values = list(real)
    values[4] = 100  # free blocks
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(values))
    assert measure_writing(tmp_path).nbytes == 0


def test_nothing_is_written_without_out(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def note(directory: Path) -> probe.TransferSample:
        written.append(directory)
        return probe.TransferSample(10**9, 1.0, 0.5)

    monkeypatch.setattr(probe, "measure_writing", note)
    rates = measured_rates(planned(large).workload, None, {})
    assert written == []
    assert rates.disk_write.origin == ASSUMED
    assert any("pass OUT" in note for note in rates.notes)
    rates = measured_rates(planned(large).workload, tmp_path / "new" / "out", {})
    assert written == [tmp_path]
    assert (rates.disk_write.per_second, rates.disk_write.origin) == (1e9, MEASURED)
    assert not (tmp_path / "new").exists()


def test_what_is_given_is_not_measured(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **options: object) -> Any:
        raise AssertionError("measured what was given")

    for name in ("measure_reading", "measure_writing"):
        monkeypatch.setattr(probe, name, never)
    monkeypatch.setattr(computing_probe, "measure_node", never)
    given = {"disk_read": 1e9, "disk_write": 1e9, "compute": 1e9}
    rates = measured_rates(plan(linear(large, large), CPU).workload, tmp_path, given)
    assert {rates.disk_read.origin, rates.disk_write.origin, rates.compute.origin} == {GIVEN}


# ------------------------------------------------------------------------------------------------ computing


def recipe_of(method: str, paths: list[Path]) -> dict[str, Any]:
    """A recipe for a method, with something for every parameter that it needs."""
    known = merge_methods()[method]
    needs = {parameter.name: 0.5 for parameter in known.parameters if parameter.required}
    if "density" in {parameter.name for parameter in known.parameters}:
        needs["density"] = 0.5
    count = min(known.maximum or 2, 2)
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": str(p)} for p in paths[:count]]}
    if known.base is Base.REQUIRED:
        recipe["base_model"] = str(paths[2])
    if method == "passthrough":
        needs = {"scale": 0.5}
    return {**recipe, "parameters": needs}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model and two like it."""
    from tests.support import models

    root = tmp_path_factory.mktemp("three")
    base = models.Random(0)
    fills = [models.FineTune(base, 1), models.FineTune(base, 2), base]
    tensors = {"model.layers.0.w.weight": SHAPE, "model.layers.1.w.weight": SHAPE, "model.norm.weight": (1024,)}
    return [models.write_checkpoint(root / f"m{n}", tensors, fill=fill) for n, fill in enumerate(fills)]


@pytest.mark.parametrize("method", sorted(merge_methods()))
def test_every_method_can_be_measured(method: str, three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computing_probe, "_ELEMENTS", SHAPE[0] * SHAPE[1] // 4)
    found = plan(recipe_of(method, three), CPU)
    groups = node_groups(found.workload)
    assert sum(group.elements for group in groups) == found.output_dict()["parameters"]
    kernel = small_kernel(found.workload, groups[0].node, computing_probe._ELEMENTS)
    assert kernel is not None
    assert 0 < kernel.inputs.rows * kernel.inputs.columns <= computing_probe._ELEMENTS
    assert measure_node(found.workload, groups[0].node, "cpu", 2) > 0
    rates = measured_rates(found.workload, None, {})
    assert rates.compute.origin == MEASURED
    assert any(note.startswith(f"{method}: ") and "ns per element" in note for note in rates.notes)


@pytest.mark.parametrize(("two", "serial"), [(2e9, 0.02), (1.5e9, 1 / 3), (1e9, 1.0), (0.9e9, 1.0)])
def test_more_threads_than_here_are_not_proportionally_faster(
    two: float, serial: float, three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates_of_threads = {1: 1e9, 2: two}
    monkeypatch.setattr(computing_probe, "measure_node", lambda plan, node, device, threads: rates_of_threads[threads])
    monkeypatch.setattr(computing_probe, "usable_cores", lambda: 2)
    found = plan(linear(*three), Options(device="cpu", machine=Machine(cores=16)))
    rates = measured_rates(found.workload, None, {})
    assert rates.serial == pytest.approx(serial)
    assert rates.compute.origin == EXTRAPOLATED
    assert rates.compute.per_second == pytest.approx(two * (16 / (1 + 15 * serial)) / (2 / (1 + serial)))
    assert rates.bandwidth.origin == ASSUMED  # that of the machine with 16 cores
    assert "computing was measured with 2 threads and extrapolated to 16" in rates.notes


def test_the_memory_bandwidth_is_measured_unless_given(three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    monkeypatch.setattr(computing_probe, "measure_bandwidth", lambda number: threads.append(number) or 30e9)
    monkeypatch.setattr(computing_probe, "usable_cores", lambda: 2)
    work = plan(linear(*three), CPU).workload
    assert measured_rates(work, None, {}).bandwidth == Rate(30e9, MEASURED)
    assert measured_rates(work, None, {"compute": 1e9}).bandwidth == Rate(30e9, MEASURED)
    assert threads == [2, 2]
    assert measured_rates(work, None, {"bandwidth": 8e9}).bandwidth == Rate(8e9, GIVEN)
    assert threads == [2, 2]


def test_the_bandwidth_counts_bytes_that_are_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computing_probe, "_COPIES", 4 << 20)
    monkeypatch.setattr(computing_probe, "_LEAST_COPY", 1 << 20)

    def repeat(work: Callable[[int], None], threads: int) -> tuple[int, float]:
        for thread in range(threads):
            work(thread)
        return 6, 0.5

    monkeypatch.setattr(computing_probe, "_repeat", repeat)
    assert computing_probe.measure_bandwidth(2) == 2 * (2 << 20) * 6 / 0.5
    assert computing_probe.measure_bandwidth(8) == 2 * (1 << 20) * 6 / 0.5


def test_a_gpu_that_is_not_here_is_assumed(three: list[Path]) -> None:
    found = plan(linear(*three), Options(machine=Machine(ram=64 << 30, vram=1 << 30)))
    rates = measured_rates(found.workload, None, {"h2d": 25e9})
    assert (rates.compute.origin, rates.d2h.origin, rates.h2d.origin) == (ASSUMED, ASSUMED, GIVEN)
    assert any("give d2h, compute with --rates" in note for note in rates.notes)
    all_given = measured_rates(found.workload, None, {"h2d": 25e9, "d2h": 25e9, "compute": 1e12})
    assert not any("with --rates" in note for note in all_given.notes)


def test_measuring_a_stack_needs_no_torch(large: Path, tmp_path: Path) -> None:
    import yaml

    recipe = tmp_path / "stack.yml"
    recipe.write_text(yaml.safe_dump(stacked((large, (0, 4)))))
    code = "import sys; from mergeloom.__main__ import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    arguments = [sys.executable, "-c", code, "plan", str(recipe), str(tmp_path / "out"), "--time"]
    ended = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert "--rates disk_" in ended.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "stack.yml"]
