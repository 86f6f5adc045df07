"""The time model: rates as people give them, lanes by arithmetic, and what more of a thing does to the estimate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeloom.engine.cost import machine
from mergeloom.engine.cost.estimate import (
    ASSUMED,
    GIVEN,
    MEASURED,
    RATES,
    Estimate,
    Rate,
    Rates,
    assumed_rates,
    cached_again,
    estimate,
    parse_rates,
    with_given,
)
from mergeloom.engine.cost.machine import Machine, parse_machine
from mergeloom.engine.cost.measure_disk import measured_rates
from mergeloom.engine.cost.scaling import computed_bytes
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from mergeloom.engine.schedule.schedule import make_schedule
from mergeloom.errors import UsageError
from mergeloom.report.html.page import make_page
from mergeloom.report.sections import plain
from mergeloom.report.time import time_section
from tests.conftest import MakeModel
from tests.examples import examples
from tests.support.plans import linear, slerp, stacked

FAST = Rates(**{name: Rate(1e15, GIVEN) for name in RATES})  # type: ignore[arg-type]
SHARED = ["cores", "bandwidth"]
GPU = Options(machine=Machine(ram=64 << 30, vram=1 << 30, cores=8))


@pytest.fixture(scope="module")
def mean(llamas: dict[str, Path]) -> Plan:
    """A plan for the mean of two models on this machine's CPU."""
    return plan(linear(llamas["a"], llamas["b"]), Options(device="cpu", threads=2, machine=Machine(cores=2)))


def lane(found: Estimate, name: str) -> float:
    """The seconds of a lane."""
    return next(lane.seconds for lane in found.lanes if lane.name == name)


# ------------------------------------------------------------------------------------------------ what is given


def test_rates_as_they_are_written() -> None:
    assert parse_rates("disk_read=6GB/s, h2d=25GiB/s,compute=800MB") == {
        "disk_read": 6e9,
        "h2d": 25 * 2**30,
        "compute": 800e6,
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("disk=6GB/s", "unknown rate 'disk'; use disk_read, disk_write"),
        ("disk_read", "disk_read: .* size"),
        ("disk_read=fast", " size"),
        ("disk_read=1GB,disk_read=2GB", "given more than once"),
        ("disk_read=0B/s", "more than 0"),
        ("", "unknown rate"),
    ],
)
def test_invalid_rates(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_rates(text)


def test_machines_as_they_are_written() -> None:
    assert parse_machine("vram=24GiB,ram=64GiB") == Machine(64 << 30, 24 << 30)
    assert parse_machine(" ram = 64GiB , cores = 16, vram=80GiB,gpus=8") == Machine(64 << 30, 80 << 30, 8, 16)
    assert parse_machine("ram=8GiB").memory_of_gpus == {}
    assert parse_machine("vram=1GiB,gpus=2").memory_of_gpus == {0: 1 << 30, 1: 1 << 30}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("24GiB", "unknown key"),
        ("disk=1TB", "unknown key"),
        ("ram=lots", " size"),
        ("cores=0", "above 0"),
        ("cores=many", "above 0"),
        ("gpus=2", "the memory of each GPU"),
        ("ram=1GiB,ram=2GiB", "given more than once"),
    ],
)
def test_invalid_machines(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_machine(text)


def test_what_is_given_stands_beside_what_is_assumed(mean: Plan) -> None:
    rates = with_given(replace(assumed_rates(mean.workload), cached=0.7), {"disk_read": 6e9})
    assert rates.disk_read == Rate(6e9, GIVEN)
    assert rates.disk_write.origin == ASSUMED
    assert rates.cached == 0.0  # a disk whose rate is given is read, whatever lies in the page cache
    assert rates.option == "--rates disk_read=6GB/s"
    assert parse_rates(rates.option.removeprefix("--rates ")) == {"disk_read": 6e9}
    assert assumed_rates(mean.workload).option == ""


# ------------------------------------------------------------------------------------------------ arithmetic


def test_each_lane_is_its_bytes_at_its_rate(mean: Plan) -> None:
    total = mean.schedule.bytes_written
    found = estimate(mean.workload, replace(FAST, disk_read=Rate(1e6, GIVEN), start=3.0))
    assert lane(found, "read") == pytest.approx(2 * total / 1e6)
    assert found.bottleneck.name == "read"
    assert found.seconds == pytest.approx(3 + 2 * total / 1e6, rel=0.02)
    assert lane(estimate(mean.workload, replace(FAST, disk_write=Rate(1e6, GIVEN))), "write") == pytest.approx(
        total / 1e6
    )
    assert computed_bytes(mean.workload) == 2 * total
    found = estimate(mean.workload, replace(FAST, compute=Rate(1e6, GIVEN)))
    assert lane(found, "compute") == pytest.approx(2 * total / 1e6)
    assert lane(found, "cores") == pytest.approx(2 * total / 1e6)  # two threads that compute, on two cores
    copying = estimate(mean.workload, replace(FAST, memory=Rate(1e6, GIVEN)))
    assert lane(copying, "cores") == pytest.approx(2 * 3 * total / 1e6 / 2)  # memory is zeroed, and then filled


def test_what_lies_in_the_page_cache_is_not_read_from_the_disk(mean: Plan) -> None:
    rates = replace(FAST, disk_read=Rate(1e6, GIVEN))
    whole = lane(estimate(mean.workload, rates), "read")
    assert lane(estimate(mean.workload, replace(rates, cached=0.75)), "read") == pytest.approx(whole / 4)


def test_a_gpu_has_a_bus(llamas: dict[str, Path]) -> None:
    planned = plan(linear(llamas["a"], llamas["b"]), GPU)
    total = planned.schedule.bytes_written
    found = estimate(planned.workload, replace(FAST, h2d=Rate(1e6, GIVEN), d2h=Rate(1e6, GIVEN)))
    assert [one.name for one in found.lanes] == ["read", "write", "upload", "compute", "download", *SHARED]
    assert lane(found, "upload") == pytest.approx(2 * total / 1e6)
    assert lane(found, "download") == pytest.approx(total / 1e6)
    assert found.bottleneck.name == "upload"
    two = plan(linear(llamas["a"], llamas["b"]), Options(machine=Machine(ram=64 << 30, vram=1 << 30, gpus=2)))
    assert lane(estimate(two.workload, replace(FAST, h2d=Rate(1e6, GIVEN))), "upload") == pytest.approx(total / 1e6)


def test_a_stack_computes_nothing(llamas: dict[str, Path]) -> None:
    planned = plan(stacked((llamas["a"], (0, 2)), (llamas["a"], (1, 4))))
    found = estimate(planned.workload, assumed_rates(planned.workload))
    assert [one.name for one in found.lanes] == ["read", "write", *SHARED]


def test_what_is_read_again_comes_from_the_page_cache_where_it_has_room(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the process of many tests grows between two plans
    monkeypatch.setattr(machine, "process_memory", lambda: machine.ProcessMemory(1 << 27, 1 << 27))
    tensors = {f"model.layers.{i}.w.weight": (2048, 2048) for i in range(3)}
    a, b = (make_model(name, tensors, dtype="F32", fill=None) for name in "ab")
    there = Options(device="cpu", machine=Machine(ram=64 << 30))
    least = plan(slerp(a, b), there).schedule.minimum_ram + (4 << 20)
    roomy = plan(slerp(a, b), replace(there, max_ram=least))
    assert roomy.schedule.bytes_reread > 0
    assert cached_again(roomy.workload) == roomy.schedule.bytes_reread
    tight = plan(slerp(a, b), Options(device="cpu", max_ram=least, machine=Machine(ram=150 << 20)))  # inputs: 101 MB
    assert cached_again(tight.workload) == 0
    slow = replace(FAST, disk_read=Rate(1e6, GIVEN))
    assert lane(estimate(roomy.workload, slow), "read") < lane(estimate(tight.workload, slow), "read")


rates_of = st.builds(Rate, st.floats(1e6, 1e12), st.sampled_from([GIVEN, MEASURED, ASSUMED]))


@settings(max_examples=examples(100), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.builds(Rates, *(7 * [rates_of]), st.floats(0, 1)), st.sampled_from(sorted(RATES)))
def test_laws(mean: Plan, rates: Rates, name: str) -> None:
    found = estimate(mean.workload, rates)
    assert 0 < found.low <= found.seconds <= found.high
    assert found.low <= found.bottleneck.seconds <= found.seconds
    faster = replace(rates, **{name: replace(getattr(rates, name), per_second=2 * getattr(rates, name).per_second)})
    assert estimate(mean.workload, faster).seconds <= found.seconds * (1 + 1e-9)
    known = replace(rates, **{name: replace(getattr(rates, name), origin=GIVEN) for name in RATES})
    assert estimate(mean.workload, known).high - estimate(mean.workload, known).low <= found.high - found.low + 1e-9


def test_where_all_is_shared_it_takes_no_time(llamas: dict[str, Path]) -> None:
    planned = plan(stacked((llamas["a"], (0, 4))))
    graph = planned.built.graph
    done = {node: graph.nbytes(node) for node in graph}
    nothing = replace(planned, schedule=make_schedule(graph, planned.schedule.budget, done=done))
    found = estimate(nothing.workload, assumed_rates(nothing.workload))
    assert (found.low, found.seconds, found.high) == (0, 0, 0)
    assert "no time" in plain([time_section(found)])
    assert measured_rates(nothing.workload, None, {}).disk_read.origin == ASSUMED
    assert "Layer map" in make_page(nothing, time=found)


# ------------------------------------------------------------------------------------------------ in words


def test_it_is_said_how_each_rate_is_known(mean: Plan) -> None:
    rates = with_given(
        replace(assumed_rates(mean.workload), compute=Rate(3e9, MEASURED), notes=("it was late",)), {"memory": 5e9}
    )
    section = time_section(estimate(mean.workload, rates))
    assert section.grid is not None
    known = {row[0]: row[3] for row in section.grid.rows}
    assert known == {
        **dict.fromkeys(("read", "write", "bandwidth"), "assumed"),
        "compute": "measured",
        "cores": "measured",
    }
    assert "It was late." in section.lines
    assert "To reuse these rates: --rates memory=5GB/s,compute=3GB/s" in section.lines
    assert dict(section.fields)["about"].count("s") >= 3


def test_as_json(mean: Plan) -> None:
    found = estimate(mean.workload, with_given(assumed_rates(mean.workload), {"disk_write": 2e6})).to_dict()
    assert found["low"] <= found["seconds"] <= found["high"]
    assert found["bottleneck"] == "write"
    assert found["rates"]["disk_write"] == {"bytes_per_second": 2e6, "known": "given"}
    assert set(found["rates"]) == set(RATES)
    assert found["lanes"]["write"]["bytes"] == mean.schedule.bytes_written
