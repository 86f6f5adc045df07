"""Wrong inputs and options of `extract-lora`: one clear error each, with its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mergeloom
from mergeloom.errors import UsageError
from tests.support.command_line import run
from tests.support.extraction.families import save_pair
from tests.support.extraction.matrices import noise, save_models

LAYERS = ("model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight")


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A model and its base, of two layers."""
    base = {name: noise(seed, 24, 16) for seed, name in enumerate(LAYERS)}
    return save_models(tmp_path, base, {name: noise(5, 24, 16, 0.1) for name in base})


def rewrite(model: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of a model, by the number of the layer after an underscore; None removes one."""
    file = model / "model.safetensors"
    stored = load_file(file)
    for layer, tensor in tensors.items():
        name = f"model.layers.{layer[1:]}.q_proj.weight"
        if tensor is None:
            del stored[name]
        else:
            stored[name] = tensor
    save_file(stored, file)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--rank", "0"), 2, "invalid rank 0: use 1 or more"),
        (("--rank", "17"), 2, "--rank 17 exceeds the shorter side of every matrix: use 16 or less"),
        ((), 2, "Missing option '--rank'"),
        (("--rank", "x"), 2, "is not a valid integer"),
        (("--rank", "2", "--seed", "-1"), 2, "invalid seed -1: use 0 or more"),
        (("--rank", "2", "--include", "("), 2, "--include '(' is not a valid regular expression"),
        (("--rank", "2", "--exclude", "q_proj"), 4, "no tensor that the options select"),
        (("--rank", "2", "--max-ram", "1MiB"), 3, "the smallest budget that works is"),
        (("--rank", "2", "--report", "/nowhere/x.json"), 2, "there is no directory"),
    ],
)
def test_options(models: tuple[Path, Path], tmp_path: Path, options: tuple[str, ...], code: int, message: str) -> None:
    ended = run("extract-lora", *models, tmp_path / "out", *options)
    assert ended.returncode == code, ended.stderr
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


def refused(models: tuple[Path, Path], out: Path) -> str:
    """The message of an extraction that ends with exit code 4."""
    ended = run("extract-lora", *models, out, "--rank", 2)
    assert (ended.returncode, ended.stdout) == (4, ""), ended.stderr
    assert "Traceback" not in ended.stderr
    assert not out.exists()
    return ended.stderr


def test_other_shapes(models: tuple[Path, Path], tmp_path: Path) -> None:
    rewrite(models[0], _1=torch.zeros(24, 17))
    message = refused(models, tmp_path / "out")
    assert f"{LAYERS[1]}: shape [24, 16] in BASE, [24, 17] in MODEL" in message
    assert "choose another BASE, or leave these tensors out with --exclude" in message
    result = mergeloom.extract_lora(*models, tmp_path / "out", rank=2, exclude=[r"layers\.1\."])
    assert [matrix.name for matrix in result.matrices] == [LAYERS[0]]


def test_other_layers(tmp_path: Path) -> None:
    save_pair(tmp_path, "llama")
    file = tmp_path / "tuned" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if ".layers.1." not in n}, file, {"format": "pt"})
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    message = refused((tmp_path / "tuned", tmp_path / "base"), tmp_path / "out")
    assert "has 2 layers in model.layers, but" in message
    assert "has 1: an adapter can't add or remove layers" in message


def test_another_architecture(models: tuple[Path, Path], tmp_path: Path) -> None:
    save_file({"encoder.weight": torch.zeros(3, 3)}, models[1] / "model.safetensors")
    assert "have no tensor name in common" in refused(models, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(models: tuple[Path, Path], tmp_path: Path, value: float) -> None:
    changed = torch.zeros(24, 16)
    changed[3, 3] = value
    rewrite(models[0], _0=changed)
    assert f"{LAYERS[0]}: has NaN or infinite values in MODEL or BASE" in refused(models, tmp_path / "out")


def test_equal_models(models: tuple[Path, Path], tmp_path: Path) -> None:
    assert "there is nothing to extract" in refused((models[1], models[1]), tmp_path / "out")


def test_a_missing_model(models: tuple[Path, Path], tmp_path: Path) -> None:
    assert "nowhere" in refused((tmp_path / "nowhere", models[1]), tmp_path / "out")


def test_an_adapter_instead_of_a_model(models: tuple[Path, Path], tmp_path: Path) -> None:
    mergeloom.extract_lora(*models, tmp_path / "adapter", rank=2)
    assert "adapter" in refused((tmp_path / "adapter", models[1]), tmp_path / "out")


def test_out_with_other_files(models: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    ended = run("extract-lora", *models, out, "--rank", 2)
    assert ended.returncode == 2
    assert "is not empty (notes.txt)" in ended.stderr
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_out_is_an_input(models: tuple[Path, Path]) -> None:
    ended = run("extract-lora", *models, models[1], "--rank", 2)
    assert ended.returncode == 2
    assert "is not empty (model.safetensors)" in ended.stderr


def test_what_has_no_place_in_an_adapter_is_named(tmp_path: Path) -> None:
    """A parameter next to modules, and fused experts."""
    names = {"model.layers.0.q_proj.weight": (8, 8), "model.gain": (8,), "model.layers.0.mlp.experts.up": (2, 8, 8)}
    base = {name: np.resize(noise(1, 16, 16), shape) for name, shape in names.items()}
    models = save_models(tmp_path, base, {name: np.full(value.shape, 0.25) for name, value in base.items()})
    ended = run("extract-lora", *models, tmp_path / "out", "--rank", 1)
    assert ended.returncode == 0, ended.stderr
    assert "PEFT would save all of model, which contains other modules" in ended.stderr
    assert "fused experts: an adapter needs separate ones" in ended.stderr
    assert "model.gain" in ended.stderr


def test_tensors_that_only_one_model_has_are_named(models: tuple[Path, Path], tmp_path: Path) -> None:
    for model, extra in zip(models, ("score.weight", "pooler.weight"), strict=True):
        file = model / "model.safetensors"
        save_file(load_file(file) | {extra: torch.ones(2, 2)}, file)
    result = mergeloom.extract_lora(*models, tmp_path / "out", rank=2)
    assert result.left_out == (("score.weight", "only in MODEL"),)
    assert any("only in BASE" in warning and "pooler.weight" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": "2"}, "invalid rank '2'"),
        ({"rank": 2, "include": [3]}, "invalid include 3"),
        ({"rank": 2, "threads": 0}, "invalid threads 0"),
        ({"rank": 2, "max_ram": "much"}, "invalid size 'much'"),
    ],
)
def test_invalid_arguments_in_python(
    models: tuple[Path, Path], tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        mergeloom.extract_lora(*models, tmp_path / "out", **arguments)  # type: ignore[arg-type]
