"""Recipes as they were published, through the command line on small Llamas: what they make, and what they say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.command_line import run
from tests.support.outputs import read_model, same_tensors


def merge(recipe: dict[str, object], directory: Path) -> subprocess.CompletedProcess[str]:
    """`mergeloom merge` of this recipe into `directory`/out."""
    file = directory / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return run("merge", file, directory / "out", "--device", "cpu")


@pytest.mark.parametrize("tune", ["a", "b", "c"])
def test_ties_of_one_fine_tune_twice_is_the_fine_tune(llamas: dict[str, Path], tmp_path: Path, tune: str) -> None:
    entry = {"model": str(llamas[tune]), "parameters": {"weight": 1, "density": 1}}
    recipe: dict[str, object] = {
        "merge_method": "ties",
        "base_model": str(llamas["base"]),
        "models": [entry, dict(entry)],
        "parameters": {"weight": 1, "density": 1, "normalize": True, "int8_mask": True},
        "dtype": "bfloat16",
    }
    done = merge(recipe, tmp_path)
    assert done.returncode == 0, done.stderr
    assert same_tensors(read_model(tmp_path / "out"), read_model(llamas[tune]))


def test_dare_ties_with_the_base_listed_and_an_unknown_parameter(llamas: dict[str, Path], tmp_path: Path) -> None:
    shares = {"base": (0.3, 0.35), "a": (0.25, 0.25), "b": (0.25, 0.25), "c": (0.2, 0.15)}
    recipe: dict[str, object] = {
        "merge_method": "dare_ties",
        "base_model": str(llamas["base"]),
        "models": [
            {"model": str(llamas[name]), "parameters": {"weight": weight, "density": density}}
            for name, (weight, density) in shares.items()
        ],
        "parameters": {"interpolation_factor": 0.5},
        "dtype": "bfloat16",
    }
    done = merge(recipe, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "interpolation_factor" in done.stdout + done.stderr
    made, base = read_model(tmp_path / "out"), read_model(llamas["base"])
    assert made.keys() == base.keys()
    assert not same_tensors(made, base)
