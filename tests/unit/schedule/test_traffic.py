"""Where the bytes go: compared with what the executor then does, over random graphs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mergeloom
from mergeloom.engine.execute.devices.cpu import CpuDevice
from mergeloom.engine.execute.executor import Executor
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.schedule import make_schedule
from mergeloom.engine.schedule.timeline import sparkline, timeline
from mergeloom.engine.schedule.traffic import bytes_of_reads, downloaded, fixed_ram, peak_of
from mergeloom.report.plan import plan_text, reread_lines
from tests.conftest import MakeModel
from tests.examples import examples
from tests.support.blueprints import ELEMENTS, SLOT, Blueprint, blueprints, build, with_slots
from tests.support.devices import CountingDevice
from tests.support.graphs import World
from tests.support.plans import linear, slerp


def read_by_tensor(world: World) -> list[int]:
    """The bytes that were read of each source tensor."""
    found: Counter[int] = Counter()
    for file, offset, nbytes in world.reads:
        for number, ref in enumerate(world.graph.reads):
            if ref.file == file and ref.offset <= offset < ref.offset + ref.nbytes:
                found[number] += nbytes
    return [found[number] for number in range(len(world.graph.reads))]


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(blueprints(), st.sampled_from([0, 1, 3, 20]))
def test_each_tensor_is_read_as_often_as_planned(blueprint: Blueprint, extra: int) -> None:
    world = build(blueprint)
    schedule = with_slots(world, extra)
    planned = list(bytes_of_reads(world.graph, schedule))
    assert sum(planned) == schedule.bytes_read
    Executor(world.graph, schedule, [CpuDevice(1)], world, world).run()
    assert read_by_tensor(world) == planned


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(blueprints(), st.sampled_from([0, 3, 20]), st.sampled_from([0, 3, 20]))
def test_what_a_device_sends_back_is_planned(blueprint: Blueprint, ram: int, vram: int) -> None:
    world = build(blueprint)
    large = (DeviceBudget("test:0", 1 << 40, 1),)
    least = make_schedule(world.graph, Budget(1 << 40, 0, large), slot_bytes=SLOT)
    budget = DeviceBudget("test:0", least.minimum_vram + vram * SLOT, 1)
    schedule = make_schedule(world.graph, Budget(least.minimum_ram + ram * SLOT, 0, (budget,)), slot_bytes=SLOT)
    device = CountingDevice("test:0", budget.vram or 0)
    Executor(world.graph, schedule, [device], world, world).run()
    assert device.downloaded == downloaded(world.graph, schedule)
    assert read_by_tensor(world) == list(bytes_of_reads(world.graph, schedule))


@settings(max_examples=examples(60), deadline=None)
@given(blueprints(), st.sampled_from([0, 1, 3, 20]), st.integers(1, 50))
def test_the_timeline_and_the_peak_are_of_one_schedule(blueprint: Blueprint, extra: int, points: int) -> None:
    world = build(blueprint)
    schedule = with_slots(world, extra)
    moments = timeline(world.graph, schedule, points)
    peak = peak_of(world.graph, schedule)
    if not schedule.serial_ram:
        assert peak is None
        return
    assert peak is not None
    assert peak.nbytes == schedule.serial_ram
    assert schedule.steps[peak.step - 1].ram * schedule.slot_bytes == peak.nbytes
    assert len(moments) == points
    held = [moment.ram - fixed_ram(schedule) for moment in moments]
    assert max(held) == schedule.serial_ram
    assert max(moment.ram for moment in moments) <= schedule.peak_ram
    numbers = [number for moment in moments for number in (moment.first, moment.last)]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) <= (len(schedule.steps), len(schedule.steps))


def test_a_long_step_fills_many_moments_and_short_ones_share_one() -> None:
    world = World()
    world.node("sum", [world.source(90 * ELEMENTS)])
    for _ in range(10):
        world.node("sum", [world.source(ELEMENTS // 4)])
    moments = timeline(world.graph, with_slots(world, 20), 12)
    assert sum(moment.first == moment.last for moment in moments) >= 10
    assert max(moment.last - moment.first for moment in moments) >= 4


def test_a_line_of_blocks() -> None:
    assert sparkline([0, 50, 100], 100) == "▁▅█"
    assert sparkline([0, 0], 0) == "▁▁"
    assert sparkline([], 100) == ""


def test_what_is_read_again_and_why(make_model: MakeModel) -> None:
    tensors = {f"model.layers.{i}.w.weight": (2048, 2048) for i in range(3)}
    a, b = (make_model(name, tensors, dtype="F32", fill=None) for name in "ab")
    least = mergeloom.plan(slerp(a, b)).schedule.minimum_ram
    plan = mergeloom.plan(slerp(a, b), max_ram=least + (4 << 20), device="cpu")
    found = plan.to_dict()
    (group,) = found["read_again"]
    assert group["pattern"] == "model.layers.*.w.weight"
    assert group["tensors"] == 6
    assert group["nbytes"] == 6 * 2048 * 2048 * 4
    assert group["read"] - group["nbytes"] == found["bytes_reread"] > 0
    assert "goes through them twice" in group["reason"]
    assert group["limited_by_budget"]
    assert "`mergeloom plan --what-if` shows" in plan_text(plan)
    assert sum(model["read"] for model in found["bytes_by_model"]) == found["bytes_read"]
    assert sum(model["used"] for model in found["bytes_by_model"]) == found["bytes_read"] - found["bytes_reread"]
    assert "model.layers.*.w.weight (6 tensors, 101MB): " in plan_text(plan)


def test_nothing_is_read_again_where_there_is_room(llamas: dict[str, Path]) -> None:
    found = mergeloom.plan(linear(llamas["a"], llamas["b"])).to_dict()
    assert found["read_again"] == []
    assert all(model["read"] == model["used"] for model in found["bytes_by_model"])
    assert found["peak_ram_at"]["tensor"]
    assert found["peak_vram_at"] is None
    assert found["bytes_downloaded"] == 0


def test_many_kinds_are_summed_up() -> None:
    from mergeloom.engine.schedule.traffic import ReadAgain

    groups = [ReadAgain(f"w{i}", 2, 100, 300, "it has to be", True) for i in range(7)]
    lines = reread_lines(groups)
    assert len(lines) == 5
    assert lines[0] == "w0 (2 tensors, 100B): read 3 times: it has to be"
    assert lines[-1] == "and 6 other tensors, with 600B of re-reads"
    (line,) = reread_lines([ReadAgain("w", 1, 100_000, 100_256, "rows are shared", False)])
    assert line == "w (1 tensor, 100KB): read once, and 256B again: rows are shared"


@pytest.mark.parametrize("budget", ["ram=64GiB,vram=1GiB", "ram=64GiB,vram=24GiB,gpus=2"])
def test_a_gpu_that_is_not_here(budget: str, llamas: dict[str, Path]) -> None:
    from mergeloom.engine.cost.machine import parse_machine
    from mergeloom.engine.run.plan import Options
    from mergeloom.engine.run.planning import plan

    planned = plan(linear(llamas["a"], llamas["b"]), Options(machine=parse_machine(budget)))
    found = planned.to_dict()
    assert found["device"] == ",".join(f"cuda:{number}" for number in range(2 if "gpus" in budget else 1))
    assert found["bytes_uploaded"] == found["bytes_read"]
    assert found["bytes_downloaded"] == found["output"]["bytes"]
    assert found["peak_vram_at"]["tensor"]
    assert "uploads" in plan_text(planned)
