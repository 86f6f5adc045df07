"""A merge with an adapter writes what PEFT's merge_and_unload computes, for every kind of adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mergeloom
from tests.support.adapters.kinds import KINDS, load_report, merged_by_peft, write_kind
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
