"""Stages, `diff` and `plan` see the values of quantized models in every format, as those of their twins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mergeloom
from mergeloom.engine.run.planning import plan
from mergeloom.report.explain import explain
from tests.support.models import quantized
from tests.support.outputs import read_model

STAGES = """\
name: copied
merge_method: passthrough
models: [{{model: {first}}}]
---
merge_method: linear
models: [{{model: copied}}, {{model: {second}}}]
parameters: {{weight: 0.5}}
dtype: float32
"""


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_a_stage_that_copies_codes_passes_on_their_values(tmp_path: Path, form: str) -> None:
    (model, values), (other, _) = (quantized.write_pair(tmp_path, form, seed) for seed in (1, 2))
    merged = []
    for number, first in enumerate((model, values)):
        file = tmp_path / f"{number}.yml"
        file.write_text(STAGES.format(first=first, second=other))
        mergeloom.merge(file, tmp_path / f"out{number}", device="cpu")
        merged.append(
            {name: tensor.numpy().tobytes() for name, tensor in read_model(tmp_path / f"out{number}").items()}
        )
    assert merged[0] == merged[1]


@pytest.mark.parametrize("form", quantized.FORMATS)
@pytest.mark.parametrize("save", [False, True])
def test_what_stages_only_copy_is_stored_as_it_was(tmp_path: Path, form: str, save: bool) -> None:
    """Exponents in bytes, packed codes and the only scale of a tensor are read in another dtype or shape."""
    model, _ = quantized.write_pair(tmp_path, form, 1)
    layers = [{"sources": [{"model": str(model), "layer_range": [n, n + 1]}]} for n in range(quantized.LAYERS)]
    stages: list[dict[str, Any]] = [
        {"name": "first", "merge_method": "passthrough", "slices": layers, "save": save},
        {"merge_method": "passthrough", "models": [{"model": "first"}]},
    ]
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump_all(stages))
    mergeloom.merge(tmp_path / "recipe.yml", tmp_path / "out", device="cpu")
    expected = read_model(model)
    for out in (tmp_path / "out", *([tmp_path / "out" / "first"] if save else [])):
        found = read_model(out)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_a_model_and_its_values_are_equal(tmp_path: Path, form: str) -> None:
    (model, values), (other, others) = (quantized.write_pair(tmp_path, form, seed) for seed in (1, 2))
    assert mergeloom.diff(model, values).equal
    found, expected = mergeloom.diff(model, other), mergeloom.diff(values, others)
    similarities = [{tensor.name: tensor.similarity for tensor in each.tensors} for each in (found, expected)]
    assert similarities[0] == similarities[1]
    assert any(each.formats[0] for each in found.tensors)


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_a_plan_that_copies_codes_counts_the_parameters_of_values(tmp_path: Path, form: str) -> None:
    model, values = quantized.write_pair(tmp_path, form, 1)
    copied, expected = (
        plan({"merge_method": "passthrough", "models": [{"model": str(each)}]}).to_dict() for each in (model, values)
    )
    assert copied["output"]["parameters"] == expected["output"]["parameters"]
    assert copied["inputs"]["tensors"] == expected["inputs"]["tensors"]
    merged = plan({"merge_method": "passthrough", "models": [{"model": str(model)}], "dtype": "float32"})
    for name in read_model(values):
        assert [source.name for source in explain(merged, name).sources] == [name]
