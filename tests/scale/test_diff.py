"""Comparisons of models of real shapes: every byte is read once, within the budget."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergeloom.engine.run.diff.pairs import Opened, pair_tensors
from mergeloom.engine.run.diff.units import BUFFER_BYTES, make_units
from mergeloom.io.checkpoint.checkpoint import open_checkpoint
from tests.support.models import encode, llama_3_1_405b, llama_3_2_1b, normal, write_checkpoint

MIB = 1 << 20
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def put(model: Path, name: str, start: int, count: int, key: str) -> torch.Tensor:
    """Store random bfloat16 values in a tensor of a model that is all holes, from element `start` on."""
    ref = open_checkpoint(model).tensors[name]
    data = encode(normal(key, start, count), "BF16")
    with ref.file.open("r+b") as file:
        file.seek(ref.offset + 2 * start)
        file.write(data)
    return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).double()


@pytest.mark.parametrize("budget", [96 * MIB, 512 * MIB])
def test_two_models_of_1b_shapes(budget: int, tmp_path: Path) -> None:
    shapes = llama_3_2_1b()
    a, b = (write_checkpoint(tmp_path / name, shapes, fill=None, shard_bytes=10**9) for name in "ab")
    norms = [put(model, NORM, 0, 2048, str(model)) for model in (a, b)]
    parts = [put(model, EMBEDDING, 100_000_000, 1_000_000, str(model)) for model in (a, b)]
    command = [sys.executable, "-m", "mergeloom", "diff", str(a), str(b), "--json", "--max-ram", str(budget)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["bytes_read"] == 2 * 2 * shapes.parameters
    assert found["peak_rss"] <= found["peak_ram"] <= found["max_ram"] == budget
    assert found["total"]["elements"] == shapes.parameters
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    for name, (x, y) in ((NORM, norms), (EMBEDDING, parts)):
        assert math.isclose(tensors[name]["relative_distance"], (x - y).norm() / x.norm(), rel_tol=1e-11)
        assert math.isclose(tensors[name]["cosine"], x @ y / (x.norm() * y.norm()), rel_tol=1e-11)
        elements = tensors[name]["elements"]
        assert tensors[name]["equal"] == (elements - int((x != y).sum())) / elements
    others = [tensor for name, tensor in tensors.items() if name not in (NORM, EMBEDDING)]
    assert len(others) == 144
    assert all(
        (tensor["relative_distance"], tensor["cosine"], tensor["equal"]) == (0.0, None, 1.0) for tensor in others
    )


def test_each_tensor_of_405b_shapes_is_read_once(tmp_path: Path) -> None:
    a, b = (
        Opened(name, open_checkpoint(write_checkpoint(tmp_path / name, llama_3_1_405b(), fill=None))) for name in "ab"
    )
    units = make_units(pair_tensors(a, b).pairs)
    assert sum(unit.bytes_read(BUFFER_BYTES) for unit in units) == 2 * 2 * llama_3_1_405b().parameters
    assert max(unit.sums_bytes for unit in units) < 3 * MIB


@pytest.mark.parametrize("option", ["--quiet", "--json", "--tensors"])
def test_the_results_of_many_tensors_are_within_the_smallest_budget(option: str, tmp_path: Path) -> None:
    names = [f"model.layers.{n}.mlp.experts.{e}.up_proj.weight" for n in range(100) for e in range(200)]
    models = [write_checkpoint(tmp_path / name, dict.fromkeys(names, (8, 8)), fill=s) for s, name in enumerate("ab")]
    command = [sys.executable, "-m", "mergeloom", "diff", *map(str, models), option, "--max-ram"]
    refused = subprocess.run([*command, "1MiB"], capture_output=True, text=True, check=False)
    smallest = re.search(r"use --max-ram (\S+) or more", refused.stderr)
    assert smallest is not None, refused.stderr
    ended = subprocess.run([*command, smallest[1]], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr  # the command itself fails if it exceeds its budget
    assert "model.layers.*.mlp.experts.*.up_proj.weight" in ended.stdout
