"""A merge of many small tensors stays within its budget: what grows with tensors, steps and records is in the plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.models import write_checkpoint

LAYERS, PER_LAYER = 300, 10
TENSORS = LAYERS * PER_LAYER
KILLED = 9
FIXED = 6
"""Memory in MiB that any merge takes: threads, lanes, compiled loops, and the library that checks shards."""

MERGE = """
import json, os, sys
from mergeloom.engine.cost.machine import process_memory
from mergeloom.engine.cost.process_size import GraphSize
from mergeloom.engine.run import planning
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.io import platform
from mergeloom.io.output.journal import Journal
recipe, out, max_ram, kill_after = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
platform.OWN_PROCESS = True
make_budget, append, before = planning.make_budget, Journal.append, []
def measured_budget(*args, **options):
    before.append(process_memory().now)
    return make_budget(*args, **options)
def counted_append(self, records):
    append(self, records)
    if kill_after and self.records > kill_after:
        os._exit(9)
planning.make_budget, Journal.append = measured_budget, counted_append
result = merge(recipe, out, Options(device="cpu", threads=2, max_ram=max_ram))
schedule, graph = result.plan.schedule, result.plan.built.graph
print(json.dumps({
    "peak": process_memory().peak, "before": before[0], "max_ram": schedule.budget.ram, "minimum": schedule.minimum_ram,
    "counted": GraphSize.of(graph).nbytes(), "arena": schedule.ram_slots * schedule.slot_bytes,
    "steps": len(schedule.steps), "earlier": result.earlier.bytes_written, "written": result.plan.bytes_written,
}))
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge by ties of three models, with so many steps that their objects would take 16 MiB."""
    root = tmp_path_factory.mktemp("many")
    shapes = {f"model.layers.{layer}.w{n}.weight": (4, 8) for layer in range(LAYERS) for n in range(PER_LAYER)}
    models = [write_checkpoint(root / name, shapes, dtype="F32", fill=seed) for seed, name in enumerate("abc")]
    named = [{"model": str(model), "parameters": {"weight": 0.5, "density": 0.5}} for model in models[1:]]
    content = {"merge_method": "ties", "base_model": str(models[0]), "models": named, "dtype": "float32"}
    (root / "recipe.yml").write_text(yaml.safe_dump(content))
    return root / "recipe.yml"


def planned_minimum(recipe: Path) -> int:
    """The smallest budget that `plan` allows, in bytes."""
    command = [sys.executable, "-m", "mergeloom", "plan", str(recipe), "--json", "--device", "cpu", "--threads", "2"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(ran.stdout)["minimum_ram"])


def merged(recipe: Path, out: Path, max_ram: int, kill_after: int = 0) -> dict[str, Any] | None:
    """Merge in a process of its own, and return what it measured; None if it was killed after this many records."""
    arguments = [str(recipe), str(out), str(max_ram), str(kill_after)]
    ran = subprocess.run([sys.executable, "-c", MERGE, *arguments], capture_output=True, text=True, check=False)
    if kill_after and ran.returncode == KILLED:
        return None
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


# a tensor has four records: its own, and those of three inputs
@pytest.mark.parametrize("kill_after", [0, 2 * TENSORS])
def test_memory_is_bounded_at_the_minimum(kill_after: int, recipe: Path, tmp_path: Path) -> None:
    """The kernel's VmHWM is within --max-ram, for a new merge and for one that reads a long journal."""
    minimum = planned_minimum(recipe)
    first = merged(recipe, tmp_path / ("out" if kill_after else "first"), minimum, kill_after)
    if kill_after:
        assert first is None
    else:
        assert first is not None  # it has compiled the loops, whose memory would hide what grows
        assert first["peak"] <= minimum
    found = merged(recipe, tmp_path / "out", minimum)
    assert found is not None
    assert found["peak"] <= found["max_ram"] == minimum
    # the budget has reserves for what other merges need; what grows must fit without them
    assert found["peak"] - found["before"] <= found["counted"] + found["arena"] + (FIXED << 20)
    if kill_after:
        assert 0.3 < found["earlier"] / found["written"] < 0.9
    else:
        assert found["steps"] > 5 * TENSORS
