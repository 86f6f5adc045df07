"""Other budgets: each row is what planning with that budget says, and more memory never reads more."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mergeloom import __main__
from mergeloom.engine.cost.estimate import assumed_rates
from mergeloom.engine.cost.machine import Machine
from mergeloom.engine.run.alternatives import alternatives
from mergeloom.engine.run.placement import with_reflinks
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from mergeloom.engine.schedule.schedule import make_schedule
from mergeloom.report.alternatives import alternatives_section
from tests.conftest import MakeModel
from tests.support.plans import linear, stacked, task_vectors

TENSORS = {f"model.layers.{i}.w.weight": (4096, 4096) for i in range(3)}


@pytest.fixture
def ties(make_model: MakeModel) -> dict[str, object]:
    """A recipe that goes through its inputs several times."""
    base, a, b = (make_model(name, TENSORS, fill=None) for name in ("base", "a", "b"))
    return task_vectors("ties", base, a, b)


def tight(recipe: dict[str, object]) -> Plan:
    """A plan within little more than the least; what that is depends on what this process has loaded."""
    least = plan(recipe, Options(device="cpu", max_ram=8 << 30)).schedule.minimum_ram
    return plan(recipe, Options(device="cpu", max_ram=least + (40 << 20)))


def test_each_row_is_a_plan(ties: dict[str, object]) -> None:
    planned = tight(ties)
    found = alternatives(planned, assumed_rates(planned.workload))
    assert sum(one.planned for one in found) == 1
    for one in found:
        other = make_schedule(planned.built.graph, replace(planned.schedule.budget, ram=one.ram))
        assert (one.peak_ram, one.bytes_read, one.bytes_reread) == (
            other.peak_ram,
            other.bytes_read,
            other.bytes_reread,
        )
        assert one.peak_ram <= one.ram
        assert one.time is not None


def test_from_the_least_that_works_to_where_more_saves_nothing(ties: dict[str, object]) -> None:
    planned = tight(ties)
    found = alternatives(planned)
    assert found == sorted(found, key=lambda one: one.ram)
    assert planned.schedule.minimum_ram <= found[0].ram < planned.schedule.minimum_ram * 1.01 + (1 << 20)
    assert found[-1].bytes_reread == 0
    assert all(one.bytes_reread > 0 for one in found[:-1] if not one.planned)
    assert len(found) <= 10
    assert all(one.time is None for one in found)
    unique = planned.schedule.bytes_read - planned.schedule.bytes_reread
    assert all(one.bytes_read - one.bytes_reread == unique for one in found)


def test_where_nothing_is_read_twice_the_least_is_enough(llamas: dict[str, Path]) -> None:
    planned = plan(linear(llamas["a"], llamas["b"]), Options(device="cpu", max_ram=8 << 30))  # more than this process
    found = alternatives(planned)
    assert len(found) == 2
    lines = alternatives_section(found).lines
    assert lines[0].startswith("More RAM than ")
    assert lines[0].endswith(" saves no reading.")


def test_vram_beside_ram(ties: dict[str, object]) -> None:
    planned = plan(ties, Options(machine=Machine(ram=8 << 30, vram=256 << 20)))
    found = alternatives(planned, assumed_rates(planned.workload))
    own = next(one for one in found if one.planned)
    others = [one for one in found if one.vram != own.vram]
    assert others == sorted(others, key=lambda one: one.vram)
    assert others[0].vram >= planned.schedule.minimum_vram
    assert others[-1].bytes_uploaded <= own.bytes_uploaded
    assert others[-1].bytes_uploaded == planned.schedule.bytes_read - planned.schedule.bytes_reread
    assert all(one.peak_vram <= one.vram for one in found)
    section = alternatives_section(found)
    assert section.grid is not None
    assert section.grid.header == ("RAM", "VRAM", "read", "re-reads", "to the GPU", "time", "")
    assert [row[-1] for row in section.grid.rows].count("this plan") == 1


def test_what_is_moved_aside_stays_aside(llamas: dict[str, Path], tmp_path: Path) -> None:
    planned = with_reflinks(plan(stacked((llamas["a"], (0, 2)), (llamas["b"], (1, 4)))), tmp_path / "out")
    for one in alternatives(planned):
        assert one.bytes_read == planned.bytes_read


def test_the_command(ties: dict[str, object], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(ties))
    arguments = [
        "plan",
        str(recipe),
        "--what-if",
        "--device",
        "cpu",
        "--max-ram",
        f"{tight(ties).schedule.budget.ram}B",
    ]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert __main__.main(arguments) == 0
    assert "With other budgets" in out.getvalue()
    assert "time" not in out.getvalue().partition("With other budgets")[2]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert __main__.main([*arguments, "--rates", "disk_read=1GB/s", "--json"]) == 0
    found = json.loads(out.getvalue())
    assert len(found["alternatives"]) > 2
    assert [one["planned"] for one in found["alternatives"]].count(True) == 1
    assert all(one["seconds"] > 0 for one in found["alternatives"])
    assert found["time"]["seconds"] == next(one["seconds"] for one in found["alternatives"] if one["planned"])
