"""The engine on a CUDA GPU: the bytes of the CPU, within the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.schedule import make_schedule
from tests.support.blueprints import SLOT, Blueprint, blueprints, build, execute
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.outputs import digests

pytestmark = pytest.mark.gpu

RECIPES = {
    "linear": {"weight": 0.4},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weight": 0.4},
    "ties": {"weight": 0.4, "density": 0.3},
    "dare_ties": {"weight": 0.4, "density": 0.5},
    "della": {"weight": 0.4, "density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"weight": 0.4, "density": 0.8, "gamma": 0.01},
    "sce": {"select_topk": 0.5},
    "model_stock": {},
    "karcher": {},
    "nearswap": {"t": 0.001},
}


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(blueprints(), st.sampled_from([0, 3, 20]), st.sampled_from([0, 3, 20]))
def test_it_keeps_what_the_schedule_promises(blueprint: Blueprint, ram: int, vram: int) -> None:
    from mergeloom.engine.execute.devices.cuda import CudaDevice

    world = build(blueprint)
    large = (DeviceBudget("cuda:0", 1 << 40, 2),)
    least = make_schedule(world.graph, Budget(1 << 40, 0, large), slot_bytes=SLOT)
    budget = (DeviceBudget("cuda:0", least.minimum_vram + vram * SLOT, 2),)
    schedule = make_schedule(world.graph, Budget(least.minimum_ram + ram * SLOT, 0, budget), slot_bytes=SLOT)
    execute(world, schedule, [CudaDevice(0)])


@pytest.mark.parametrize("method", RECIPES)
def test_the_bytes_are_those_of_the_cpu(method: str, tmp_path: Path) -> None:
    paths = [
        write_checkpoint(tmp_path / name, tiny_llama(hidden=256), fill=seed)
        for seed, name in enumerate(("base", "a", "b"))
    ]
    others = paths[1:2] if method in ("slerp", "nearswap") else paths[1:]
    recipe = {
        "merge_method": method,
        "base_model": str(paths[0]),
        "models": [{"model": str(path)} for path in others],
        "parameters": RECIPES[method],
        "dtype": "bfloat16",
    }
    if method in ("linear", "karcher"):
        del recipe["base_model"]
    results = {}
    for device in ("cpu", "cuda"):
        result = merge(recipe, tmp_path / device, Options(device=device, max_ram=8 << 30, max_vram=2 << 30))
        results[device] = digests(tmp_path / device, "*.safetensors")
    assert results["cpu"] == results["cuda"]
    assert result.measured.vram_peak <= 2 << 30
