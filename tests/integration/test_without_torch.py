"""CPU merges need no torch, a GPU without it is an error or a warning, and the compiler keeps within the budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeloom.engine.cost import devices
from tests.support.command_line import run, spawn
from tests.support.plans import linear, slerp, task_vectors

BLOCKED = """
import sys
sys.modules["torch"] = None  # importing it fails, as where it is not installed
from mergeloom.__main__ import main
code = main(sys.argv[1:])
assert not [name for name in sys.modules if name.startswith("torch.")]
sys.exit(code)
"""


def without_torch(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run mergeloom in a process of its own that cannot import torch."""
    command = [sys.executable, "-c", BLOCKED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def write(recipe: object, directory: Path) -> Path:
    """Write a recipe."""
    file = directory / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def test_commands_of_the_cpu_need_no_torch(llamas: dict[str, Path], tmp_path: Path) -> None:
    parameters = {"weight": 0.5, "density": 0.5}
    recipe = write(task_vectors("ties", llamas["base"], llamas["a"], llamas["b"], parameters=parameters), tmp_path)
    out = tmp_path / "out"
    for command in (
        ("plan", recipe, "--device", "cpu", "--time", "--what-if"),
        ("merge", recipe, out, "--device", "cpu", "--quiet"),
        ("verify", out),
        ("diff", out, llamas["a"]),
        ("inspect", out),
    ):
        ended = without_torch(*command)
        assert ended.returncode == 0, (command, ended.stderr)
    with_torch = tmp_path / "again"
    assert run("merge", recipe, with_torch, "--device", "cpu", "--quiet").returncode == 0
    assert len(list(out.glob("*.safetensors"))) == len(list(with_torch.glob("*.safetensors"))) > 0
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (with_torch / file.name).read_bytes()


@pytest.mark.parametrize("wanted", ["cuda", "cuda:0", "cuda:0,cuda:1"])
def test_a_gpu_without_torch_is_an_error_that_says_how_to_install_it(
    wanted: str, llamas: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write(linear(llamas["a"], llamas["b"]), tmp_path)
    ended = without_torch("merge", recipe, tmp_path / "out", "--device", wanted)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"mergeloom: --device {wanted}: computing on a GPU needs torch, which is not installed: run "
        "pip install 'mergeloom[cuda]', or use --device cpu\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_plan_for_a_gpu_elsewhere_needs_torch(llamas: dict[str, Path], tmp_path: Path) -> None:
    recipe = write(linear(llamas["a"], llamas["b"]), tmp_path)
    ended = without_torch("plan", recipe, "--for", "vram=24GiB")
    assert ended.returncode == 2
    assert "run pip install 'mergeloom[cuda]'" in ended.stderr


def test_a_gpu_that_is_left_idle_for_want_of_torch_causes_a_warning(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_has_gpu_driver", lambda: True)
    monkeypatch.setattr(devices, "_has_torch", lambda: False)
    recipe = write(linear(llamas["a"], llamas["b"]), tmp_path)
    ended = run("plan", recipe, "--json")
    assert ended.returncode == 0
    planned = json.loads(ended.stdout)
    assert planned["device"] == "cpu"
    (warning,) = planned["warnings"]
    assert "run pip install 'mergeloom[cuda]', or give --device cpu" in warning
    assert run("plan", recipe, "--strict").returncode == 4
    assert not json.loads(run("plan", recipe, "--json", "--device", "cpu").stdout)["warnings"]


RECIPES = {
    "linear": lambda models: linear(models["base"], models["a"], models["b"]),
    "slerp": lambda models: slerp(models["a"], models["b"]),
    "ties": lambda models: task_vectors(
        "ties", models["base"], models["a"], models["b"], models["c"], parameters={"weight": 0.5, "density": 0.4}
    ),
    "karcher": lambda models: {"merge_method": "karcher", "models": [{"model": str(models[name])} for name in models]},
}


@pytest.mark.parametrize("method", RECIPES)
def test_the_smallest_budget_is_kept_with_an_empty_and_with_a_filled_cache_of_kernels(
    method: str, llamas: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write(RECIPES[method](llamas), tmp_path)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    planned = json.loads(spawn("plan", recipe, "--json", "--device", "cpu", env=environment).stdout)
    kernels = tmp_path / "cache" / "mergeloom" / "kernels"
    assert not kernels.exists()
    for out in ("empty", "filled"):
        assert kernels.exists() == (out == "filled")
        report = tmp_path / f"{out}.json"
        limits = ("--device", "cpu", "--max-ram", planned["minimum_ram"])
        ended = spawn("merge", recipe, tmp_path / out, *limits, "--report", report, env=environment)
        assert ended.returncode == 0, ended.stderr
        measured = json.loads(report.read_text())["measured"]
        assert measured["peak_rss"] <= planned["minimum_ram"]
