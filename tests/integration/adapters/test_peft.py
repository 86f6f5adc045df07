"""A merge with an adapter writes what PEFT's merge_and_unload computes, for every kind of adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mergeloom
from tests.support.adapters.files import product, write_lora
from tests.support.adapters.kinds import KINDS, Kind, load_report, merged_by_peft, write_kind
from tests.support.models import write_checkpoint
from tests.support.models.tokenizers import update_json
from tests.support.outputs import read_model

BOUND = 1e-6
"""Largest error of a value, as a share of the tensor's largest one."""


@pytest.mark.parametrize("name", KINDS)
def test_values_are_those_of_peft_in_float64(tmp_path: Path, name: str) -> None:
    base, adapter = write_kind(KINDS[name], tmp_path)
    expected, report = merged_by_peft(base, adapter, tmp_path / "peft")
    recipe = {"merge_method": "passthrough", "out_dtype": "float32", "models": [{"model": f"{base}+{adapter}"}]}
    result = mergeloom.merge(recipe, tmp_path / "out")
    found = read_model(tmp_path / "out")
    assert found.keys() == expected.keys()
    unchanged = read_model(base)
    changed = 0
    for tensor_name, tensor in found.items():
        reference = expected[tensor_name].double()
        error = (tensor.double() - reference).abs().max()
        assert error <= BOUND * reference.abs().max(), tensor_name
        own = unchanged.get(tensor_name)
        changed += own is None or not torch.equal(own.double(), reference)
    assert changed > 0
    assert load_report(tmp_path / "out") == report
    assert {entry["model"] for entry in result.plan.to_dict()["bytes_by_model"]} == {str(base), str(adapter)}


def test_fan_in_fan_out_means_nothing_for_linear_layers(tmp_path: Path) -> None:
    """PEFT ignores it there, and keeps it in the config of an adapter that was trained on a 4-bit base."""
    base, adapter = write_kind(Kind("llama", {"target_modules": ["q_proj", "o_proj"]}), tmp_path)  # square matrices
    expected, _ = merged_by_peft(base, adapter, tmp_path / "peft")
    update_json(adapter / "adapter_config.json", fan_in_fan_out=True)
    assert merged_by_peft(base, adapter, tmp_path / "again")[0].keys() == expected.keys()
    recipe = {"merge_method": "passthrough", "out_dtype": "float32", "models": [{"model": f"{base}+{adapter}"}]}
    mergeloom.merge(recipe, tmp_path / "out")
    found, again = read_model(tmp_path / "out"), read_model(tmp_path / "again")
    for name, tensor in found.items():
        assert torch.equal(again[name], expected[name])
        assert (tensor.double() - expected[name]).abs().max() <= BOUND * expected[name].abs().max(), name


def test_fan_in_fan_out_of_a_matrix_that_fits_no_other_way(tmp_path: Path) -> None:
    """A model of own code, with layers that are stored as [in, out]."""
    shapes = {"model.layers.0.mlp.w.weight": (24, 16), "model.layers.0.mlp.v.weight": (16, 16)}
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base = write_checkpoint(tmp_path / "base", tensors, config={"model_type": "own", "num_hidden_layers": 1})
    transposed = {name: shape[::-1] for name, shape in shapes.items()}
    adapter = write_lora(tmp_path / "a", transposed, targets=["w", "v"], fan_in_fan_out=True)
    mergeloom.merge({"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}, tmp_path / "out")
    found = read_model(tmp_path / "out")
    for name, tensor in tensors.items():
        expected = tensor.double() + product(adapter, name.removesuffix(".weight")).T
        assert (found[name].double() - expected).abs().max() <= BOUND * expected.abs().max(), name


@pytest.mark.parametrize("name", ["linear layers", "DoRA of Conv1D", "fused experts of Mixtral", "trained tokens"])
def test_without_a_dtype_the_base_s_is_kept_and_each_value_rounded_once(tmp_path: Path, name: str) -> None:
    base, adapter = write_kind(KINDS[name], tmp_path)
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
    mergeloom.merge(recipe | {"out_dtype": "float32"}, tmp_path / "exact")
    mergeloom.merge(recipe, tmp_path / "out")
    mergeloom.merge(recipe | {"out_dtype": "same"}, tmp_path / "same")
    exact, found, same = (read_model(tmp_path / each) for each in ("exact", "out", "same"))
    for tensor_name, tensor in found.items():
        assert torch.equal(tensor, exact[tensor_name].bfloat16())
        assert torch.equal(tensor, same[tensor_name])
