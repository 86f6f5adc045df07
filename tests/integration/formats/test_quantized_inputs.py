"""Merges of quantized models equal the merges of models that store the decoded values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mergeloom
from tests.support.models import quantized, write_checkpoint
from tests.support.outputs import read_model

RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"parameters": {"weight": 0.5}},
    "slerp": {"parameters": {"t": 0.25}},
    "ties": {"parameters": {"weight": 0.5, "density": 0.5}},
    "della": {"parameters": {"weight": 0.5, "density": 0.5, "epsilon": 0.1}},
}


def recipe(method: str, models: list[Path], dtype: str | None) -> dict[str, Any]:
    """A recipe of a method over some models, the first of which is the base."""
    made: dict[str, Any] = {"merge_method": method, "models": [{"model": str(model)} for model in models]}
    made |= RECIPES.get(method, {})
    if method != "linear" and method != "passthrough":
        made["base_model"] = str(models[0])
    return made if dtype is None else made | {"dtype": dtype}


def weights(out: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """The dtype, the shape and the bytes of each tensor."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in read_model(out).items()
    }


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_decoded_values_equal_those_of_the_formats_library(tmp_path: Path, form: str) -> None:
    model, values = quantized.write_pair(tmp_path, form, 1)
    mergeloom.merge(recipe("passthrough", [model], "float32"), tmp_path / "out")
    found, expected = read_model(tmp_path / "out"), read_model(values)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("form", quantized.FORMATS)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_merge_equals_that_of_the_values(tmp_path: Path, form: str, method: str) -> None:
    pairs = [quantized.write_pair(tmp_path, form, seed) for seed in (1, 2, 3)]
    mergeloom.merge(recipe(method, [model for model, _ in pairs], "bfloat16"), tmp_path / "quantized")
    mergeloom.merge(recipe(method, [values for _, values in pairs], "bfloat16"), tmp_path / "values")
    assert weights(tmp_path / "quantized") == weights(tmp_path / "values")


@pytest.mark.parametrize("method", RECIPES)
def test_models_in_different_formats_merge(tmp_path: Path, method: str) -> None:
    forms = ("fp8 blocks", "int4", "mxfp4")[: 2 if method == "slerp" else 3]
    pairs = [quantized.write_pair(tmp_path, form, seed) for seed, form in enumerate(forms)]
    mixed = [model for model, _ in pairs[:-1]] + [pairs[-1][1]]  # the last one is not quantized
    mergeloom.merge(recipe(method, mixed, "bfloat16"), tmp_path / "quantized")
    mergeloom.merge(recipe(method, [values for _, values in pairs], "bfloat16"), tmp_path / "values")
    assert weights(tmp_path / "quantized") == weights(tmp_path / "values")


def test_models_that_differ_only_in_config_are_decoded_by_their_own(tmp_path: Path) -> None:
    """Names, dtypes and shapes are the same, so what is known about one model could be taken for the other."""
    name, models, expected = "model.layers.0.mlp.up_proj.weight", [], torch.zeros(64, 64, dtype=torch.float64)
    for seed, block in enumerate(([32, 48], [48, 32])):
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        codes, scales, value = quantized.blocks(weight, *block, lambda each: each)
        assert scales.shape == (2, 2)
        expected += value.double() / 2
        config = {"num_hidden_layers": 1, "quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
        tensors = {name: codes, f"{name}_scale_inv": scales}
        models.append(write_checkpoint(tmp_path / str(seed), tensors, config=config))
    mergeloom.merge(recipe("linear", models, "float32"), tmp_path / "out")
    assert torch.allclose(read_model(tmp_path / "out")[name].double(), expected, rtol=2**-22, atol=0)


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_a_copy_keeps_codes_scales_and_what_belongs_to_them(tmp_path: Path, form: str) -> None:
    model, _ = quantized.write_pair(tmp_path, form, 1)
    mergeloom.merge(recipe("passthrough", [model], None), tmp_path / "out")
    assert weights(tmp_path / "out") == weights(model)
    copied, original = (json.loads((each / "config.json").read_text()) for each in (tmp_path / "out", model))
    assert copied["quantization_config"] == original["quantization_config"]


def test_a_format_that_is_not_written_becomes_bfloat16_and_config_says_so(tmp_path: Path) -> None:
    models = [quantized.write_pair(tmp_path, "int4", seed)[0] for seed in (1, 2)]
    warnings = mergeloom.plan(recipe("linear", models, None)).warnings
    mergeloom.merge(recipe("linear", models, None), tmp_path / "out")
    assert {tensor.dtype for tensor in read_model(tmp_path / "out").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"
    assert any("quantization_config" in str(warning) for warning in warnings)
    assert any("stores quantized (compressed-tensors" in str(warning) for warning in warnings)


def test_modules_that_are_no_longer_quantized_are_listed(tmp_path: Path) -> None:
    """Only the second model's MLPs count, so the first one's attention is copied."""
    models = [quantized.write_pair(tmp_path, "fp8 blocks", seed) for seed in (1, 2)]
    weight = [{"filter": "mlp", "value": 0.5}, {"value": 1.0}], [{"filter": "mlp", "value": 0.5}, {"value": 0.0}]
    made = {
        "merge_method": "linear",
        "models": [
            {"model": str(model), "parameters": {"weight": each}}
            for (model, _), each in zip(models, weight, strict=True)
        ],
    }
    made["out_dtype"] = [{"filter": "mlp", "value": "bfloat16"}, {"value": "same"}]
    mergeloom.merge(made, tmp_path / "out")
    found, stored = weights(tmp_path / "out"), weights(models[0][0])
    name = "model.layers.1.self_attn.o_proj.weight"
    assert (found[name], found[f"{name}_scale_inv"]) == (stored[name], stored[f"{name}_scale_inv"])
    assert found["model.layers.1.mlp.up_proj.weight"][0] == torch.bfloat16
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    modules = {f"model.layers.{layer}.mlp.{each}_proj" for layer in range(2) for each in ("up", "down")}
    assert set(section.pop("modules_to_not_convert")) == modules
    original = json.loads((models[0][0] / "config.json").read_text())["quantization_config"]
    assert section == original


def test_planned_bytes_are_executed_and_a_resumed_merge_is_the_same(tmp_path: Path) -> None:
    models = [quantized.write_pair(tmp_path, form, 1)[0] for form in ("fp8 blocks", "nvfp4")]
    made = recipe("linear", models, "float16")
    planned = mergeloom.plan(made).to_dict()
    result = mergeloom.merge(made, tmp_path / "out")
    stored = sum(tensor.nbytes for model in models for tensor in read_model(model).values())
    assert planned["bytes_read"] == result.measured.bytes_read == stored
    assert planned["bytes_written"] == result.measured.bytes_written
