"""What keeps more cores from helping: serial work, the memory bus, and fewer cores than threads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mergeloom.engine.cost.estimate import GIVEN, MEASURED, RATES, Estimate, Rate, Rates, assumed_rates, estimate
from mergeloom.engine.cost.machine import Machine
from mergeloom.engine.cost.scaling import computing_threads, effective_threads, memory_traffic, serial_share
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from mergeloom.report.sections import plain
from mergeloom.report.time import time_section
from tests.support.plans import linear, stacked, task_vectors

FAST = Rates(**{name: Rate(1e15, GIVEN) for name in RATES})  # type: ignore[arg-type]


def on_cores(cores: int, llamas: dict[str, Path], threads: int | None = None) -> Plan:
    """A plan for the mean of two models on a machine with so many cores."""
    machine = Machine(ram=64 << 30, cores=cores)
    return plan(linear(llamas["a"], llamas["b"]), Options(device="cpu", threads=threads, machine=machine))


def lane(found: Estimate, name: str) -> float:
    """The seconds of a lane."""
    return next(lane.seconds for lane in found.lanes if lane.name == name)


def test_serial_work_limits_the_speedup() -> None:
    assert effective_threads(1) == 1
    assert [effective_threads(n, 0.0) for n in (1, 2, 64)] == [1, 2, 64]
    assert [effective_threads(n, 1.0) for n in (1, 2, 64)] == [1, 1, 1]
    assert effective_threads(2, 0.2) == pytest.approx(2 / 1.2)
    assert effective_threads(16, 0.2) == pytest.approx(4)
    assert effective_threads(10_000, 0.2) < 5


@pytest.mark.parametrize("serial", [0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("threads", [2, 3, 64])
def test_the_serial_share_follows_from_the_speedup(threads: int, serial: float) -> None:
    assert serial_share(threads, effective_threads(threads, serial)) == pytest.approx(serial)


def test_a_measured_speedup_is_never_perfect_nor_below_one() -> None:
    assert serial_share(2, 2.0) == serial_share(2, 2.5) == 0.02
    assert serial_share(2, 0.8) == 1.0


def test_threads_without_a_core_do_not_count(llamas: dict[str, Path]) -> None:
    assert computing_threads(on_cores(4, llamas, threads=16).workload) == 4
    assert computing_threads(on_cores(16, llamas, threads=4).workload) == 4
    gpu = plan(linear(llamas["a"], llamas["b"]), Options(machine=Machine(ram=64 << 30, vram=1 << 30, cores=8)))
    assert computing_threads(gpu.workload) == 0
    more = on_cores(4, llamas, threads=16).workload
    assert assumed_rates(more).compute == assumed_rates(on_cores(4, llamas).workload).compute


def test_copies_cross_the_memory_bus_twice_and_passes_once(llamas: dict[str, Path]) -> None:
    mean = on_cores(2, llamas)
    total = mean.schedule.bytes_written
    assert memory_traffic(mean.workload) == 2 * (2 * total + total) + 2 * total + total
    ties = plan(task_vectors("ties", llamas["base"], llamas["a"]), Options(device="cpu", machine=Machine(cores=2)))
    passes = {operation.passes for operation in ties.built.graph.operations}
    assert passes == {6}
    read = ties.schedule.bytes_read
    assert memory_traffic(ties.workload) == 2 * (read + total) + 6 * 2 * total + total
    copied = plan(stacked((llamas["a"], (0, 4))))
    assert memory_traffic(copied.workload) == 2 * 2 * total


def test_a_gpu_moves_its_copies_over_the_memory_bus(llamas: dict[str, Path]) -> None:
    gpu = plan(linear(llamas["a"], llamas["b"]), Options(machine=Machine(ram=64 << 30, vram=1 << 30)))
    total = gpu.schedule.bytes_written
    assert memory_traffic(gpu.workload) == 2 * 3 * total + 2 * total + total


def test_the_bandwidth_limits_what_more_cores_bring(llamas: dict[str, Path]) -> None:
    rates = replace(FAST, bandwidth=Rate(1e6, GIVEN), compute=Rate(1e9, MEASURED))
    few, many = (estimate(on_cores(cores, llamas).workload, rates) for cores in (2, 64))
    assert few.bottleneck.name == many.bottleneck.name == "bandwidth"
    assert lane(few, "bandwidth") == pytest.approx(memory_traffic(on_cores(2, llamas).workload) / 1e6)
    assert many.seconds == pytest.approx(few.seconds, rel=0.01)
    assert "more cores would not" in dict(time_section(many).fields)["bottleneck"]


def test_assumed_computing_is_slower_than_proportional(llamas: dict[str, Path]) -> None:
    one, two, many = (assumed_rates(on_cores(cores, llamas).workload).compute.per_second for cores in (1, 2, 16))
    assert one == 2e9
    assert two == pytest.approx(2e9 * 2 / 1.2)
    assert many == pytest.approx(2e9 * 4)


def test_the_assumptions_are_stated(llamas: dict[str, Path]) -> None:
    work = on_cores(16, llamas).workload
    text = plain([time_section(estimate(work, assumed_rates(work)))])
    assert (
        "Assumed rates: disk_read=2GB/s, disk_write=1GB/s, memory=4GB/s, compute=8GB/s, bandwidth=40GB/s; set" in text
    )
    assert "or measure them with --time." in text
    assert "16 threads compute 4 times as fast as one: 20% of the computing holds Python's interpreter lock." in text
    assert "All lanes share the memory bandwidth: 706KB of traffic" in text
    known = estimate(work, FAST)
    assert len(known.assumptions) == 1
    assert "share the memory bandwidth" in known.assumptions[0]
    assert known.to_dict()["assumptions"] == list(known.assumptions)


def test_a_rate_that_is_not_used_is_not_an_assumption(llamas: dict[str, Path]) -> None:
    work = on_cores(2, llamas).workload
    cached = estimate(work, replace(assumed_rates(work), cached=1.0, memory=Rate(1e9, MEASURED)))
    assert cached.assumptions[0] == (
        f"assumed rates: disk_write=1GB/s, compute={Rate(2e9 * 2 / 1.2).text}, bandwidth=40GB/s; set them with --rates"
    )
